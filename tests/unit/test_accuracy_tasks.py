"""Every generated prompt is what it claims: counted, found again, and answered by a reader that knows nothing else."""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from benchmarks.accuracy import haystack
from benchmarks.accuracy.config import Tasks
from benchmarks.accuracy.metrics import score
from benchmarks.accuracy.qa_data import load_qa
from benchmarks.accuracy.samples import Sample
from benchmarks.accuracy.tasks import SUITES, longbench, ruler, samples_of
from benchmarks.accuracy.tokens import Tokens, fit
from benchmarks.accuracy.words import ADJECTIVES, NOUNS

MODEL = Path(__file__).parents[2] / "benchmarks" / "small_model" / "smooth"
LENGTHS = (1024, 4096)
UUID = r"[0-9a-f]{8}-[0-9a-f]{4}-4[0-9a-f]{3}-[0-9a-f]{4}-[0-9a-f]{12}"
VALUE = {"number": r"\d{7}", "identifier": UUID}


@pytest.fixture(scope="module")
def subwords(tmp_path_factory: pytest.TempPathFactory) -> Tokens:
    """A byte-pair tokenizer as large models have, trained on the bundled essay and the common words."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=3000, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), special_tokens=["<s>"]
    )
    text = " ".join([*haystack.essay(None), *(NOUNS + ADJECTIVES) * 3, *map(str, range(200))])
    core.train_from_iterator([text], trainer)
    folder = tmp_path_factory.mktemp("tokenizer")
    PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>").save_pretrained(folder)
    return Tokens(str(folder))


@pytest.fixture(scope="module", params=["words", "subwords"])
def tokens(request: pytest.FixtureRequest) -> Tokens:
    return Tokens(str(MODEL)) if request.param == "words" else request.getfixturevalue("subwords")


def make(tokens: Tokens, suite: str, **fields: Any) -> list[Sample]:
    return SUITES[suite](Tasks.model_validate({"suite": suite} | fields), tokens)


_MADE: dict[Any, list[Sample]] = {}


def made(tokens: Tokens, name: str, length: int, count: int = 3, **fields: Any) -> list[Sample]:
    key = (tokens.name, name, length, count)
    if not fields and key in _MADE:
        return _MADE[key]
    samples = make(tokens, "ruler", names=[name], lengths=[length], count=count, **fields)
    if not fields:
        _MADE[key] = samples
    return samples


# RULER


def test_thirteen_tasks() -> None:
    assert len(ruler.GENERATORS) == 13


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("name", ruler.GENERATORS)
def test_length_within_one_percent(tokens: Tokens, name: str, length: int) -> None:
    for sample in made(tokens, name, length):
        used = tokens.count(sample.prompt + sample.prefix) + sample.max_tokens
        assert 0.99 * length <= used <= length


@pytest.mark.parametrize("name", ruler.GENERATORS)
def test_deterministic_by_seed_and_index(tokens: Tokens, name: str) -> None:
    first, again = made(tokens, name, 1024), made(tokens, name, 1024, seed=0)
    assert first == again
    assert len({sample.prompt for sample in first}) == 3
    other = made(tokens, name, 1024, seed=1)
    assert not {sample.prompt for sample in first} & {sample.prompt for sample in other}


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("name", ruler.NIAH)
def test_needles(tokens: Tokens, name: str, length: int) -> None:
    """Each once, at its depth; the question's keys lead to the answers and to nothing else."""
    spec = ruler.NIAH[name]
    for sample in made(tokens, name, length):
        _, rest = sample.prompt.split("\n\n", 1)
        text, question = rest.rsplit("\n\n", 1)
        kind = spec.value
        stated = re.findall(rf"Note that one secret {kind} of (\S+) is ({VALUE[kind]})\.", text)
        assert len(set(stated)) == len(stated)
        asked = sample.meta["keys"]
        assert all(key in question for key in asked) and len(asked) == spec.queries
        found = [value for key, value in stated if key in asked]
        assert sorted(found) == sorted(sample.answers) and len(found) == spec.queries * spec.values
        assert all(sample.prompt.count(value) == 1 for value in sample.answers)
        if spec.haystack != "needles":
            assert len(stated) == spec.keys * spec.values
            places = [text.index(f"of {key} is {value}") / len(text) for key, value in stated]
            for place, depth in zip(sorted(places), sorted(sample.meta["depths"])):
                assert place == pytest.approx(depth, abs=0.06 if length == 1024 else 0.03)
        else:
            assert len(stated) > (4 if length == 1024 else 12)
            place = [value for _, value in stated].index(sample.answers[0]) / (len(stated) - 1)
            assert place == pytest.approx(sample.meta["depths"][0], abs=1 / len(stated) + 0.01)


@pytest.mark.parametrize("name", ["niah_single_1", "niah_single_2"])
def test_needles_stand_between_sentences(tokens: Tokens, name: str) -> None:
    for sample in made(tokens, name, 4096, count=8):
        before = sample.prompt.split("Note that")[0].rstrip()
        assert before[-1] in ".!?\"'" or before.endswith("after it.")


@pytest.mark.parametrize("length", LENGTHS)
def test_variables_are_tracked(tokens: Tokens, length: int) -> None:
    for sample in made(tokens, "vt", length):
        text = sample.prompt.rsplit("\n\n", 2)[1]
        values: dict[str, str] = {}
        for name, what in re.findall(r"VAR ([A-Z]{5}) = (\d{5}|VAR [A-Z]{5})\.", text):
            values[name] = values[what[4:]] if what.startswith("VAR") else what
        assert sorted(values) == sorted(sample.answers) and len(values) == 5
        assert set(values.values()) == {sample.meta["value"]} and sample.meta["value"] in sample.prompt[-120:]
        assert sample.prompt.count("VAR") == 2 * 9  # the example has as many


@pytest.mark.parametrize("length", LENGTHS)
def test_common_words(tokens: Tokens, length: int) -> None:
    for sample in made(tokens, "cwe", length):
        listing = sample.prompt.split("\n")[-2]
        numbered = re.findall(r"(\d+)\. (\w+)", listing)
        assert [int(number) for number, _ in numbered] == list(range(1, len(numbered) + 1))
        counts = Counter(word for _, word in numbered)
        top = counts.most_common(11)
        assert {word for word, _ in top[:10]} == set(sample.answers)
        assert {count for _, count in top[:10]} == {sample.meta["often"]}
        assert top[10][1] == sample.meta["seldom"] < sample.meta["often"]


@pytest.mark.parametrize("length", LENGTHS)
def test_frequent_coded_words(tokens: Tokens, length: int) -> None:
    for sample in made(tokens, "fwe", length):
        text = sample.prompt.split("\n\n")[1]
        counts = Counter(word for word in text.split() if word != "....")
        top = counts.most_common(4)
        assert [word for word, _ in top[:3]] == sample.answers
        assert top[0][1] > top[1][1] > top[2][1] > top[3][1]
        # rank 1 is the noise: the words have ranks 2, 3, 4
        assert top[0][1] / top[1][1] == pytest.approx(9 / 4, rel=0.15)


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("name", ["qa_1", "qa_2"])
def test_questions_have_their_documents(tokens: Tokens, name: str, length: int) -> None:
    for sample in made(tokens, name, length):
        documents = re.split(r"\n\n(?:Document \d+:\n)?", sample.prompt)[1:-1]
        gold = sample.meta["gold"]
        assert len(gold) == (1 if name == "qa_1" else 2)
        assert all(documents.count(document) == 1 for document in gold)
        assert any(answer in " ".join(gold) for answer in sample.answers)
        assert sample.prompt.endswith(f"Question: {sample.meta['question']}")
        assert len(documents) > len(gold)


def test_two_hops_are_needed() -> None:
    """Neither document alone holds both what the question names and the answer."""
    data = load_qa("qa_2", None)
    for item in data.questions:
        first, second = (data.documents[at] for at in item.documents)
        founder = re.search(r"founded in \d+ by (\w+ \w+)", first)
        assert founder and second.startswith(founder[1])
        assert item.answers[0] in second


def test_too_short_a_context_is_an_error(tokens: Tokens) -> None:
    with pytest.raises(ValueError, match="longer"):
        made(tokens, "vt", 128)


def test_own_haystack_and_questions(tokens: Tokens, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("Zebras graze. " * 50)
    sample = made(tokens, "niah_single_2", 512, count=1, options={"haystack": str(tmp_path)})[0]
    assert "Zebras graze." in sample.prompt and "workshop" not in sample.prompt
    squad = {
        "data": [
            {
                "title": "Rivers",
                "paragraphs": [
                    {
                        "context": "The Ash is 70 km long.",
                        "qas": [
                            {"question": "How long is the Ash?", "answers": [{"text": "70 km"}] * 2},
                            {"question": "Who?", "is_impossible": True, "answers": []},
                        ],
                    },
                    {"context": "The Birch is short. " * 40, "qas": []},
                ],
            }
        ]
    }
    (tmp_path / "squad.json").write_text(json.dumps(squad))
    data = load_qa("qa_1", str(tmp_path / "squad.json"))
    assert [(q.question, q.answers, q.documents) for q in data.questions] == [("How long is the Ash?", ["70 km"], [0])]
    sample = made(tokens, "qa_1", 512, count=1, options={"qa_1": str(tmp_path / "squad.json")})[0]
    assert "The Ash is 70 km long." in sample.prompt and sample.answers == ["70 km"]
    hotpot = [
        {
            "question": "Q?",
            "answer": "A",
            "context": [["One", ["x. ", "y."]], ["Two", ["z."]], ["Three", ["w."]]],
            "supporting_facts": [["One", 0], ["Three", 0], ["One", 1]],
        }
    ]
    (tmp_path / "hotpot.json").write_text(json.dumps(hotpot))
    data = load_qa("qa_2", str(tmp_path / "hotpot.json"))
    assert data.documents == ["One\nx. y.", "Two\nz.", "Three\nw."]
    assert data.questions[0].documents == [0, 2]


@pytest.mark.parametrize("name", ruler.GENERATORS)
def test_the_right_reply_scores_one_and_silence_nothing(tokens: Tokens, name: str) -> None:
    sample = made(tokens, name, 1024, count=1)[0]
    assert score("They are: " + " and ".join(sample.answers).upper(), sample) == 1
    assert score("I do not know", sample) == 0
    if sample.metric == "all_in" and len(sample.answers) > 1:
        assert score(sample.answers[0], sample) == pytest.approx(1 / len(sample.answers))


# Needle in a haystack


@pytest.mark.parametrize("length", LENGTHS)
def test_needle_at_every_depth(tokens: Tokens, length: int) -> None:
    samples = make(tokens, "niah", lengths=[length], count=2)
    assert len(samples) == 22 and len({sample.id for sample in samples}) == 22
    for sample in samples:
        assert sample.prompt.count(sample.meta["needle"]) == 1
        used = tokens.count(sample.prompt + sample.prefix) + sample.max_tokens
        assert 0.99 * length <= used <= length
        text = sample.prompt.split("\n\n", 1)[1].rsplit("\n\n", 1)[0]
        before, after = text.split(sample.meta["needle"])
        words = len(before.split()) + len(after.split())
        assert len(before.split()) / words == pytest.approx(sample.meta["depth"], abs=max(0.011, 5 / words))
        assert score(f"one should {sample.answers[0]}, of course", sample) == 1
        assert score("", sample) == 0
        half = sample.answers[0].split()[0]
        assert 0 < score(half, sample) < 1


# LongBench


def write_rows(folder: Path, name: str, rows: list[dict[str, Any]]) -> None:
    (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_longbench_prompts(tokens: Tokens, tmp_path: Path) -> None:
    """Every data set: context and question are there as they came, braces included, in that order."""
    for name in longbench.DATA_SETS:
        rows = [
            {"context": f"ctx{i} {{input}} {{x}}", "input": f"ask{i} {{context}}", "answers": [f"a{i}"], "_id": str(i)}
            for i in range(3)
        ]
        write_rows(tmp_path, name, rows)
    samples = make(tokens, "longbench", names=list(longbench.DATA_SETS), count=2, options={"folder": str(tmp_path)})
    assert len(samples) == 2 * 16
    for sample in samples:
        assert f"ctx{sample.index} {{input}} {{x}}" in sample.prompt
        uses_input = "{input}" in longbench.DATA_SETS[sample.task].prompt
        assert (f"ask{sample.index} {{context}}" in sample.prompt) == uses_input
        if uses_input:
            assert sample.prompt.index("ctx") < sample.prompt.rindex("ask")
    raw = {sample.task for sample in samples if sample.raw}
    assert raw == {"trec", "triviaqa", "samsum", "lcc", "repobench-p"}
    assert {s.task: s.max_tokens for s in samples} == {
        **dict.fromkeys(("narrativeqa", "qasper", "samsum"), 128),
        **dict.fromkeys(("multifieldqa_en", "trec", "lcc", "repobench-p"), 64),
        **dict.fromkeys(("hotpotqa", "2wikimqa", "musique", "triviaqa", "passage_count", "passage_retrieval_en"), 32),
        **dict.fromkeys(("gov_report", "qmsum", "multi_news"), 512),
    }


def test_truncation_takes_the_middle(tokens: Tokens, tmp_path: Path) -> None:
    words = [f"w{i}" for i in range(3000)]
    row = {"context": " ".join(words), "input": "What?", "answers": ["x"]}
    write_rows(tmp_path, "hotpotqa", [row])
    options = {"folder": str(tmp_path), "max_tokens": 1000}
    sample = make(tokens, "longbench", names=["hotpotqa"], options=options)[0]
    limit = 1000 - 32 - longbench.TEMPLATE_ROOM
    assert limit - 3 <= tokens.count(sample.prompt) <= limit + 1  # a cut may part a token
    assert "w0 w1" in sample.prompt and "w2998 w2999" in sample.prompt and "w1500" not in sample.prompt
    assert sample.prompt.startswith("Here are some passages") and sample.prompt.endswith("Answer:")


def test_missing_folder_is_said(tokens: Tokens) -> None:
    with pytest.raises(SystemExit, match="folder"):
        make(tokens, "longbench")


# Shared


def test_samples_alternate_between_tasks(tokens: Tokens) -> None:
    entries = [Tasks(suite="small", names=["single", "multi_key"], lengths=[96, 128], count=3)]
    order = [(sample.index, sample.length, sample.task) for sample in samples_of(entries, tokens)]
    assert [index for index, _, _ in order] == sorted(index for index, _, _ in order)
    assert len(set(order[:4])) == 4


@pytest.mark.parametrize("limit", [0, 1, 5, 63, 64, 65, 1000])
@pytest.mark.parametrize("most", [None, 40, 64])
def test_fit(limit: int, most: int | None) -> None:
    assert fit(lambda n: "x" * n, limit, len, most) == min(limit, most if most is not None else limit)
