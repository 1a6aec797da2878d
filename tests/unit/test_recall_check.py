"""The offline check of recall by pages on the synthetic stress: diffuse attention and outlier channels."""

from __future__ import annotations

import math
import subprocess
import sys

import pytest
import torch

from benchmarks.recall_check import synthetic
from benchmarks.recall_check.__main__ import verdict
from benchmarks.recall_check.evaluate import Figures, LayerKV, Rule, _kept_states, _wanted, evaluate
from vllm_calidrop.evicted.recall.looks import page_shares
from vllm_calidrop.evicted.recall.sketch import encode, estimate

TOKENS, BUDGET, SPREAD = 1024, 128, 1.5
SCALE = 128**-0.5


@pytest.fixture(scope="module")
def stress() -> LayerKV:
    return synthetic.layer(TOKENS, BUDGET, 6, SPREAD, seed=0)


def figures_of(layer: LayerKV, rule: Rule) -> Figures:
    figures = Figures()
    evaluate(layer, TOKENS, SCALE, rule, figures)
    return figures


def test_the_stress_is_what_it_says(stress: LayerKV) -> None:
    figures = figures_of(stress, Rule())
    assert figures.mean("spread") == pytest.approx(SPREAD, rel=0.02)
    assert 0.3 < figures.mean("noise") < 0.65
    assert figures.mean("evicted mass") > 0.75


@pytest.mark.parametrize("top_p", [0.5, 0.8, 0.95])
def test_top_p_reads_on_until_its_bound_holds(stress: LayerKV, top_p: float) -> None:
    """For every head of every look the estimated unread mass is below 1 - p, and without the last page it was not;
    the true one is near it."""
    mu = stress.keys[:, :TOKENS].mean(1)
    evicted = stress.keys.gather(1, stress.evicted.unsqueeze(-1).expand(-1, -1, 128))
    queries = stress.queries.transpose(0, 1)
    guess = estimate(queries.flatten(1, 2), *encode(evicted, mu), mu).unflatten(1, queries.shape[1:3]) * SCALE
    kept = _kept_states(stress, TOKENS, SCALE).lse
    wanted = _wanted(guess, kept, Rule(top_p=top_p, pages=10**6), ranked=True)
    shares = page_shares(guess.flatten(0, 1), torch.full((guess.shape[0] * guess.shape[1],), TOKENS - BUDGET),
                         kept.flatten(0, 1)).unflatten(0, guess.shape[:2])  # fmt: skip
    for head in range(guess.shape[0]):
        for step in range(guess.shape[1]):
            pages = wanted[head, step]
            pages = pages[pages >= 0]
            everything = shares[head, step].sum(-1)
            assert (everything - shares[head, step][:, pages].sum(-1)).max() <= 1 - top_p + 1e-5
            assert (everything - shares[head, step][:, pages[:-1]].sum(-1)).max() > 1 - top_p - 1e-5
    figures = figures_of(stress, Rule(top_p=top_p, pages=10**6))
    assert figures.mean("unread") < 1.15 * (1 - top_p)
    assert figures.mean("read pages, look always") > 0.2


def test_few_pages_of_diffuse_attention_are_not_enough(stress: LayerKV) -> None:
    """The caveat: pages above eps hold nearly nothing, and their number bounds what is read."""
    few, more = (figures_of(stress, Rule(eps=eps, pages=k)) for eps, k in ((0.02, 4), (0.001, 1000)))
    assert few.mean("unread") > 0.6 and few.mean("read pages, look always") < 0.1
    assert more.mean("error pages, look always") < few.mean("error pages, look always") / 2


@pytest.mark.parametrize("rule", [Rule(eps=0.0, pages=10**6), Rule(top_p=1.0, pages=10**6)])
def test_every_page_at_every_look_is_full_attention(stress: LayerKV, rule: Rule) -> None:
    figures = figures_of(stress, rule)
    assert figures.quantile("error pages, look always", 1.0) < 1e-4
    assert figures.mean("read pages, look always") == 1.0
    assert not math.isclose(figures.mean("error none"), 0)


def test_the_verdict_names_the_layers_where_a_rule_is_worse_than_none() -> None:
    """Two layers: pages help in the first and harm in the second, the buffer helps in both."""
    layers = {}
    for layer, pages in enumerate((0.2, 0.9)):
        figures = layers[layer] = Figures()
        for name, value in {"none": 0.5, "pages": pages, "buffer": 0.1, "all": 0.4}.items():
            figures.add(f"error {name}", torch.tensor([value]))
            figures.add(f"read {name}", torch.tensor([0.25]))
        figures.add("unread", torch.full((40,), 0.1 * (layer + 1)))
    text = verdict(layers)
    assert "pages: mean error 0.550 of 0.500" in text and "worse than nothing recalled in 1 of 2 layers (1)" in text
    assert "pages with the buffer: mean error 0.100 of 0.500" in text and text.count("in no layer") == 2
    assert "reading 25.00 %" in text and "most unread in layer 1" in text


def test_a_model_is_reported_with_header_and_verdict() -> None:
    """The small model on its own language, as the command prints it."""
    command = [sys.executable, "-m", "benchmarks.recall_check", "--model", "benchmarks/small_model/smooth"]
    done = subprocess.run(
        [*command, "--count", "1", "--length", "200", "--steps", "4"], capture_output=True, text=True, check=True
    )
    header, rule, *rest = done.stdout.splitlines()
    assert header.startswith("benchmarks/small_model/smooth, 1 prompts of ") and "64 tokens kept per KV head" in header
    assert rule.startswith("Pages: k 4, eps 0.02")
    assert sum(line.startswith("| ") for line in rest) == 2 + 4, "a head, a rule below it and four layers"
    assert "On this model and these prompts" in done.stdout and "prompts: 100%" in done.stderr
