"""What fidelity is computed from: the divergence and its bins, intervals, rows, the bundled prompts, and memory."""

import math
from pathlib import Path

import numpy as np
import pytest

from benchmarks.fidelity import report, rows
from benchmarks.fidelity.measure import divergence, likeliest
from benchmarks.fidelity.memory import device_share
from benchmarks.fidelity.prompts import DATA, Prompt, entries
from benchmarks.fidelity.run import Setup, key_of
from benchmarks.fidelity.summary import Shape, summarize
from benchmarks.intervals import LEAST, interval

ROWS = Path(rows.__file__).parent / "rows.toml"


def top(probabilities: np.ndarray, count: int) -> dict[int, float]:
    return {int(token): math.log(probabilities[token]) for token in np.argsort(-probabilities)[:count]}


def test_divergence_is_a_lower_bound_that_more_bins_close() -> None:
    generator = np.random.default_rng(0)
    for _ in range(50):
        p, q = generator.dirichlet(np.full(200, 0.05)), generator.dirichlet(np.full(200, 0.05))
        q = 0.7 * p + 0.3 * q
        p, q = (x + 1e-9 for x in (p, q))
        p, q = p / p.sum(), q / q.sum()
        whole = float(np.sum(p * np.log(p / q)))
        found = [divergence(top(p, count), top(q, count)) for count in (5, 20, 200)]
        assert all(value <= whole + 1e-9 for value in found)
        assert found[2] == pytest.approx(whole, abs=1e-9)
        assert divergence(top(p, 20), top(p, 20)) == pytest.approx(0, abs=1e-12)


def test_divergence_where_no_token_is_shared() -> None:
    """The row says of full KV's tokens only that each is less likely than the last it names: that is enough."""
    full = {1: math.log(0.9), 2: math.log(0.05)}
    row = {3: math.log(0.9), 4: math.log(0.001)}
    assert divergence(full, row) > 0.95 * math.log(0.95 / 0.002) - 0.5


def test_likeliest_breaks_ties_by_the_lower_id() -> None:
    assert likeliest({5: -1.0, 3: -1.0, 9: -2.0}) == 3


def test_no_interval_from_few_prompts() -> None:
    assert interval({"a": [1.0] * (LEAST - 1), "b": [0.0, 1.0] * LEAST}) is None
    found = interval({"a": [0.0, 1.0] * LEAST})
    assert found is not None and 0.1 < found[0] < 0.5 < found[1] < 0.9


def test_intervals_are_drawn_within_groups() -> None:
    """Two groups without any spread of their own: the mean is certain, however far apart they are."""
    assert interval({"a": [0.0] * LEAST, "b": [1.0] * LEAST}) == (0.5, 0.5)


def test_the_bundled_prompts_are_enough_and_no_text_serves_both_splits() -> None:
    found = entries()
    assert len(found) >= 24 and len([entry for entry in found if entry.split == "report"]) >= 12
    assert {entry.kind for entry in found} == {"summary", "question", "code", "extraction", "needle"}
    texts = {split: {entry.text for entry in found if entry.split == split} for split in ("tune", "report")}
    assert not texts["tune"] & texts["report"]
    assert len({entry.id for entry in found}) == len(found)
    for entry in found:
        text = (DATA / entry.text).read_text(encoding="utf-8")
        assert entry.start in text, entry.id
    assert {path.name for path in DATA.glob("*.txt")} | {path.name for path in DATA.glob("docs*")} == texts[
        "tune"
    ] | texts["report"] | {"PYTHON_LICENSE.txt"}


def test_rows_say_what_is_asked() -> None:
    found = rows.load(ROWS)
    of = {row.label: row for row in found.row}
    assert found.fields(of["kept only"], 2048) == {
        "kv_budget": 128,
        "kv_policy": "snapkv",
        "kv_calibration": False,
    }
    assert found.fields(of["kept only, 14.1 % of the evicted kept too"], 2048)["kv_budget"] == 128 + round(0.141 * 1920)


def test_device_memory_is_what_the_rule_needs() -> None:
    """recall.md's shares of bfloat16 K and V: 7.0 % and 6.6 % for the codes of keys, 14.1 % and 13.3 % with 2-bit
    values, 10.9 % and 10.2 % with 1-bit ones; four buffered pages are 64 tokens."""
    pages = {"kv_recall": "pages"}
    assert device_share({"kv_calibration": False}, 1000, 64, 2) == 0
    for rest, expected in (("none", (7.0, 6.6)), ("v1", (10.9, 10.2)), ("v2", (14.1, 13.3))):
        for head_dim, share in zip((64, 128), expected):
            found = 100 * device_share(pages | {"kv_recall_rest": rest}, 1920, head_dim, 2)
            assert found == pytest.approx(share, abs=0.06)
    buffered = device_share(pages | {"kv_recall_buffer": 4}, 1920, 64, 2) - device_share(pages, 1920, 64, 2)
    assert buffered == pytest.approx(64 / 1920)


def test_a_report_from_stored_answers(tmp_path: Path) -> None:
    """Ten prompts of two steps after the first, two rows: one is full KV, the other is off by a known amount."""
    setup = Setup("m", "f", "float32", 3)
    table = rows.Rows.model_validate({"row": [{"label": "same"}, {"label": "off", "settings": {"kv_recall": "pages"}}]})
    prompts = [Prompt(f"p{i}", "needle", 256, list(range(i, i + 256))) for i in range(10)]
    full_step, off_step = [[1, math.log(0.75)], [2, math.log(0.25)]], [[1, math.log(0.25)], [2, math.log(0.75)]]
    records = []
    for prompt in prompts:
        full = {"key": key_of(setup, prompt, None), "row": "full KV", "prompt": prompt.id, "logprobs": [full_step] * 3}
        records.append(full | {"tokens": [1, 1, 1]})
        for row, step, read in zip(table.row, (full_step, off_step), (4 * 128 * 2 * 4 * 2, 0)):
            fields = table.fields(row, 256)
            record = {"key": key_of(setup, prompt, fields), "row": row.label, "prompt": prompt.id, "fields": fields}
            record |= {"logprobs": [off_step, step, step], "report": {"evicted": 128, "bytes_read": read}}
            records.append(record)
    # Of K and V of 4 channels in float32, one layer and KV head: everything is read in each of the two steps.
    shape = Shape(layers=1, kv_heads=1, head_dim=4, item_bytes=4)
    found = summarize(setup, table, prompts, records, shape, str)
    same, off = found["rows"]
    assert same["kl"] == 0 and same["agreement"] == 1 and same["read_share"] == 1 and same["kl_interval"] == (0, 0)
    assert off["kl"] == pytest.approx(0.5 * math.log(3)) and off["agreement"] == 0 and off["read_share"] == 0
    assert off["worst"] == {"kl": off["kl"], "prompt": "p0", "step": 1, "full": "1", "row": "2"}
    about = {"title": "M", "length": 256, "split": "report", "weights": "M", "versions": "v", "command": "c"}
    report.write(found, about, tmp_path)
    text = (tmp_path / "report.md").read_text()
    assert "| off | 0.549 [0.549, 0.549] | 0.549 | 0.000 | 0.0000 |" in text and (tmp_path / "fidelity.png").exists()
    assert "`off` is nearest to full KV: its KL is 0.549 (95 % interval 0.549 to 0.549)" in text
    without = [record for record in records if record["prompt"] != "p3" or record["row"] != "off"]
    assert "p3" not in summarize(setup, table, prompts, without, shape, str)["prompts"], "counted in one row only"
