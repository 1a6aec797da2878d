"""RULER's 13 tasks (arXiv 2404.06654), generated at any length with the served tokenizer.

Structure and numbers are the paper's (needles, hops, frequencies, output lengths); the wording is ours, so scores
compare between rows of one table, not with published ones. As there, `length` is prompt and reply together. Where the
next piece of haystack would be too long, it is cut, so that prompts reach their length within 1 %.

Options: haystack (text file or folder), qa_1 and qa_2 (JSON files, see data/README.md), reserve (tokens left free for
a chat template; default 0).
"""

from __future__ import annotations

import random
import string
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any

from benchmarks.accuracy import haystack
from benchmarks.accuracy.config import Tasks
from benchmarks.accuracy.qa_data import load_qa
from benchmarks.accuracy.samples import Sample
from benchmarks.accuracy.tokens import Tokens, fit
from benchmarks.accuracy.words import Names

DEPTHS = [step / 40 for step in range(41)]  # where a needle may lie
NEEDLE_LIMIT = 128


@dataclass
class Draft:
    """What a generator needs: its own random numbers, and how long a prompt may be."""

    rng: random.Random
    limit: int
    tokens: Tokens
    options: dict[str, Any]
    index: int

    def fit(self, build: Callable[[int], str], prefix: str, most: int | None = None) -> int:
        return fit(lambda n: build(n) + prefix, self.limit, self.tokens.count, most)


@dataclass
class Question:
    """A finished prompt; `prefix` is how the reply begins."""

    prompt: str
    prefix: str
    answers: list[str]
    meta: dict[str, Any]


# Needles


@dataclass(frozen=True)
class Needles:
    """keys: needles in the text; values: per key; queries: keys asked for; the haystack is an essay, the repeated
    noise or nothing but needles."""

    haystack: str
    key: str = "pair"
    value: str = "number"
    keys: int = 1
    values: int = 1
    queries: int = 1


NIAH = {
    "niah_single_1": Needles("noise"),
    "niah_single_2": Needles("essay"),
    "niah_single_3": Needles("essay", value="identifier"),
    "niah_multikey_1": Needles("essay", keys=4),
    "niah_multikey_2": Needles("needles"),
    "niah_multikey_3": Needles("needles", key="identifier", value="identifier"),
    "niah_multivalue": Needles("essay", values=4),
    "niah_multiquery": Needles("essay", keys=4, queries=4),
}


def _needle(key: str, value: str, kind: str) -> str:
    return f"Note that one secret {kind} of {key} is {value}."


def niah(draft: Draft, spec: Needles) -> Question:
    names = Names(draft.rng)
    draw = {"pair": names.pair, "number": names.number, "identifier": names.identifier}
    kind = spec.value
    facts = {draw[spec.key](): [draw[kind]() for _ in range(spec.values)] for _ in range(spec.keys)}
    asked = draft.rng.sample(list(facts), spec.queries)
    needles = [_needle(key, value, kind) for key, values in facts.items() for value in values]
    depths = draft.rng.sample(DEPTHS, len(needles))
    plural = "s" if spec.queries * spec.values > 1 else ""
    keys = asked[0] if len(asked) == 1 else ", ".join(asked[:-1]) + " and " + asked[-1]
    ask = f"What secret {kind}{plural} of {keys} does the text mention? Give every one of them."
    prefix = f"\nThe text mentions, for {keys}, the secret {kind}{plural}"
    frame = f"Somewhere in the text below secret {kind}s are mentioned. Keep them in mind for the question after it."
    start = draft.rng.randrange(1 << 20)
    if spec.haystack == "needles":
        others: list[str] = []

        def context(n: int) -> str:
            while len(others) < n:
                others.append(_needle(draw[spec.key](), draw[kind](), kind))
            at = round(depths[0] * n)
            return " ".join([*others[:at], *needles, *others[at:n]])

        count = draft.fit(lambda n: f"{frame}\n\n{context(n)}\n\n{ask}", prefix)
        text = context(count)

        def build(n: int) -> str:  # the rest, shorter than a needle, is noise in front
            noise = " ".join(haystack.take(haystack.NOISE_WORDS, n))
            return f"{frame}\n\n{noise + ' ' if n else ''}{text}\n\n{ask}"

        most: int | None = 1000
    else:
        source = haystack.NOISE_WORDS
        if spec.haystack == "essay":
            source = haystack.essay(draft.options.get("haystack"))

        def build(n: int) -> str:
            words = haystack.take(source, n, start if spec.haystack == "essay" else 0)
            return f"{frame}\n\n{haystack.insert(words, needles, depths)}\n\n{ask}"

        most = None
    prompt = build(draft.fit(build, prefix, most))
    answers = [value for key in asked for value in facts[key]]
    return Question(prompt, prefix, answers, {"depths": depths, "keys": asked})


# Variable tracking


def vt(draft: Draft, chains: int = 1, hops: int = 4) -> Question:
    """Variables set to one another in turn; which of them hold the value? One small example comes first."""
    names = Names(draft.rng)

    def chain(length: int) -> tuple[list[str], str, list[str]]:
        variables = [names.letters(5, string.ascii_uppercase) for _ in range(length + 1)]
        value = names.number(5)
        sets = [f"VAR {variables[0]} = {value}."]
        sets += [f"VAR {later} = VAR {earlier}." for earlier, later in pairwise(variables)]
        return variables, value, sets

    frame = "Variables are set in the text below. Follow which of them end up with the same value."

    def ask(value: str) -> str:
        return f"Question: which variables have the value {value}? Name every one of them."

    def begin(value: str, count: int) -> str:
        return f"\nAnswer: the {count} variables with the value {value} are"

    shown, shown_value, shown_sets = chain(hops)
    shown_words = haystack.take(haystack.NOISE_WORDS, 2 * len(haystack.NOISE_WORDS))
    shown_text = haystack.insert(shown_words, shown_sets, sorted(draft.rng.sample(DEPTHS, len(shown_sets))))
    example = f"{frame}\n\n{shown_text}\n\n{ask(shown_value)}"
    example += f"{begin(shown_value, len(shown))} {', '.join(shown)}.\n\n"
    made = [chain(hops) for _ in range(chains)]
    sentences = [sentence for _, _, sets in made for sentence in sets]
    depths = [depth for _ in made for depth in sorted(draft.rng.sample(DEPTHS, hops + 1))]
    variables, value, _ = made[0]

    def build(n: int) -> str:
        text = haystack.insert(haystack.take(haystack.NOISE_WORDS, n), sentences, depths)
        return f"{example}{frame}\n\n{text}\n\n{ask(value)}"

    prefix = begin(value, len(variables))
    prompt = build(draft.fit(build, prefix))
    return Question(prompt, prefix, variables, {"depths": depths, "value": value})


# Words by frequency


def cwe(draft: Draft, common: int = 10) -> Question:
    """Ten words occur often, the others seldom (one of them perhaps even less). Short contexts: both less often."""
    often, seldom = (30, 3) if draft.limit >= 3900 else (10, 3) if draft.limit >= 1500 else (6, 2)
    names = Names(draft.rng)
    frame = "Below is a numbered list of words. Find the words that occur most often in it."
    ask = f"Question: which are the {common} most frequent words of the list?"
    begin = f"\nAnswer: the {common} most frequent words are"

    def listed(words: list[str]) -> str:
        return " ".join(f"{i}. {word}" for i, word in enumerate(words, 1))

    shown = [names.word() for _ in range(common)]
    shown_words = shown * 3 + [names.word() for _ in range(10)]
    draft.rng.shuffle(shown_words)
    example = f"{frame}\n{listed(shown_words)}\n{ask}{begin} {', '.join(shown)}.\n\n"
    frequent = [names.word() for _ in range(common)]
    others: list[str] = []
    seed = draft.rng.randrange(1 << 30)

    def build(n: int) -> str:
        while len(others) < n:
            others.extend([names.word()] * seldom)
        words = frequent * often + others[:n]
        random.Random(seed).shuffle(words)
        return f"{example}{frame}\n{listed(words)}\n{ask}"

    prompt = build(draft.fit(build, begin))
    return Question(prompt, begin, frequent, {"often": often, "seldom": seldom})


def fwe(draft: Draft, alpha: float = 2.0) -> Question:
    """A coded text whose word frequencies fall as rank ** -alpha; the most frequent sign, dots, is noise."""
    names = Names(draft.rng)
    coded = [names.letters(6, string.ascii_lowercase) for _ in range(2000)]
    weights = [rank**-alpha for rank in range(1, len(coded) + 2)]
    zeta = sum(weights)
    seed = draft.rng.randrange(1 << 30)
    frame = "The text below is in code. Find the words that occur most often in it; dots do not count."
    ask = "Question: which are the three most frequent words of the coded text?"

    def counts(n: int) -> list[int]:
        return [int(n * weight / zeta) for weight in weights[1:]]

    def build(n: int) -> str:
        words = [word for word, count in zip(coded, counts(n)) for _ in range(count)]
        words += ["...."] * (n - len(words))
        random.Random(seed).shuffle(words)
        return f"{frame}\n\n{' '.join(words)}\n\n{ask}"

    begin = "\nAnswer: the three most frequent words are"
    n = draft.fit(build, begin)
    if not counts(n)[2] > counts(n)[3]:
        raise ValueError(f"fwe: {draft.limit} tokens are too few for three words to be the most frequent")
    return Question(build(n), begin, coded[:3], {"words": n})


# Questions


def qa(draft: Draft, name: str) -> Question:
    """A question, the documents that answer it, and others around them."""
    data = load_qa(name, draft.options.get(name))
    item = data.questions[draft.index % len(data.questions)]
    gold = [data.documents[at] for at in item.documents]
    pool = [document for at, document in enumerate(data.documents) if at not in item.documents]
    draft.rng.shuffle(pool)
    places = random.Random(draft.rng.randrange(1 << 30))
    seeds = [places.random() for _ in gold]
    frame = "Answer the question from the documents below. Reply with the answer only, nothing else."
    ask = f"Question: {item.question}"

    def build_with(others: list[str]) -> str:
        documents = list(others)
        for document, place in zip(gold, seeds):
            documents.insert(round(place * len(documents)), document)
        text = "\n\n".join(f"Document {i}:\n{document}" for i, document in enumerate(documents, 1))
        return f"{frame}\n\n{text}\n\n{ask}"

    def chosen(n: int) -> list[str]:
        return [pool[i % len(pool)] for i in range(n)]

    prefix = "\nAnswer:"
    count = draft.fit(lambda n: build_with(chosen(n)), prefix)
    rest = pool[count % len(pool)].split()  # one more would be too long: as much of it as fits

    def build(n: int) -> str:
        return build_with([*chosen(count), " ".join(rest[:n])] if n else chosen(count))

    prompt = build(draft.fit(build, prefix, len(rest)))
    return Question(prompt, prefix, item.answers, {"gold": gold, "question": item.question})


# name -> generator, metric, reply length
GENERATORS: dict[str, tuple[Callable[[Draft], Question], str, int]] = {
    **{name: (partial(niah, spec=spec), "all_in", NEEDLE_LIMIT) for name, spec in NIAH.items()},
    "vt": (vt, "all_in", 30),
    "cwe": (cwe, "all_in", 120),
    "fwe": (fwe, "all_in", 50),
    "qa_1": (partial(qa, name="qa_1"), "any_in", 32),
    "qa_2": (partial(qa, name="qa_2"), "any_in", 32),
}


def samples(entry: Tasks, tokens: Tokens) -> list[Sample]:
    names = entry.names or list(GENERATORS)
    assert entry.lengths, "ruler: say which lengths"
    return [
        sample_of(name, length, index, entry, tokens)
        for length in entry.lengths
        for name in names
        for index in range(entry.count)
    ]


def sample_of(name: str, length: int, index: int, entry: Tasks, tokens: Tokens) -> Sample:
    generate, metric, reply = GENERATORS[name]
    rng = random.Random(f"ruler/{name}/{length}/{entry.seed}/{index}")
    limit = length - reply - entry.options.get("reserve", 0)
    draft = Draft(rng, limit, tokens, entry.options, index)
    question = generate(draft)
    return Sample(
        task=name,
        length=length,
        index=index,
        prompt=question.prompt,
        prefix=question.prefix,
        answers=question.answers,
        metric=metric,
        max_tokens=reply,
        meta={"seed": entry.seed, **question.meta},
    )
