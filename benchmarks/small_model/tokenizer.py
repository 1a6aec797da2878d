"""The small model's Hugging Face tokenizer: one word is one token, and a chat is its contents in a row.

python -m benchmarks.small_model.tokenizer DIRECTORY
"""

from __future__ import annotations

import sys

from tokenizers import Regex, Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split
from transformers import PreTrainedTokenizerFast

from benchmarks.small_model import language

# Every message is its content; an assistant's message is closed by `<end>`, as in training. The question's
# own `?` is the generation prompt, so a user's message gives exactly the tokens of the raw prompt.
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ message['content'] | trim }}"
    "{% if message['role'] == 'assistant' and not message['content'].endswith('<end>') %} <end>{% endif %}"
    "{% if not loop.last %} {% endif %}"
    "{% endfor %}"
)


def build(max_length: int = 1152) -> PreTrainedTokenizerFast:
    """No begin token; marks such as `?` need no space before them; unknown words become `<unk>`."""
    core = Tokenizer(WordLevel(dict(language.WORD_ID), unk_token=language.UNK))
    core.pre_tokenizer = Split(Regex(r"\w+|[^\w\s]"), behavior="removed", invert=True)
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token=language.PAD,
        unk_token=language.UNK,
        eos_token=language.END,
        model_max_length=max_length,
        clean_up_tokenization_spaces=False,
        chat_template=CHAT_TEMPLATE,
    )


if __name__ == "__main__":
    build().save_pretrained(sys.argv[1], save_jinja_files=False)
