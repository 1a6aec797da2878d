"""The requests of the load: drawn at random, with what each must be answered."""

from __future__ import annotations

import json
import random
from dataclasses import dataclass, field
from typing import Any

# Token ids of the bundled model's words; any model has them.
FIRST_ID, LAST_ID = 10, 700
MOST_PROMPT, MOST_OUTPUT = 900, 64
BAD_SHARE, LEAVING_SHARE, CHAT_SHARE = 0.1, 0.2, 0.2

SETTINGS: tuple[dict[str, Any], ...] = (
    {},
    {"kv_budget": 16},
    {"kv_budget": 64},
    {"kv_budget": 128, "kv_policy": "streaming_llm"},
    {"kv_budget": 64, "kv_policy": "h2o"},
    {"kv_budget": 2000},
    {"kv_budget": 32, "kv_calibration": False},
    {"kv_budget": 64, "kv_calibration_size": 100},
    {"kv_budget": 64, "kv_theta1": 2, "kv_theta2": 2},
    {"kv_budget": 64, "kv_theta1": -2, "kv_theta2": -2},
    {"kv_budget": 48, "kv_recall": "pages"},
    {"kv_budget": 48, "kv_recall": "pages", "kv_recall_buffer": 4},
    {"kv_budget": 64, "kv_codec": "int4"},
    {"kv_budget": 64, "kv_codec": "fp8", "kv_read_budget": 20000},
    {"kv_budget": 64, "kv_on_full": "evict"},
    {"kv_policy": "full", "kv_budget": 64},
)
# What is wrong with a request, as text of its body. Each alone is a 4xx.
WRONG: tuple[str, ...] = (
    '"kv_budget": 0',
    '"kv_budget": -3',
    '"kv_budget": 1e30',
    '"kv_budget": "64"',
    '"kv_budget": 1000000000000000000000000000000',
    '"kv_theta1": NaN',
    '"kv_theta2": Infinity',
    '"kv_theta1": 1.5, "kv_theta2": 0.9',
    '"kv_codec": "int3"',
    '"kv_nothing": 1',
    '"kv_policy": "lru"',
    '"kv_budget": 8, "kv_window": 9',
    '"max_tokens": -1',
    '"max_tokens": 1000000',
    '"stream": "perhaps"',
    '"kv_budget": ',
)


@dataclass(frozen=True)
class Ask:
    """leave_after: chunks after which the client goes, None to stay. wrong: it must be refused."""

    route: str
    content: bytes
    prompt_tokens: int | None
    max_tokens: int
    settings: dict[str, Any] = field(default_factory=dict)
    leave_after: int | None = None
    wrong: bool = False


def draw(rng: random.Random, model: str, longest: int = MOST_PROMPT) -> Ask:
    length = round(40 * (longest / 40) ** rng.random())
    max_tokens = rng.randint(4, MOST_OUTPUT)
    settings = dict(rng.choice(SETTINGS))
    body: dict[str, Any] = {
        "model": model,
        "max_tokens": max_tokens,
        "temperature": rng.choice((0, 1)),
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    chat = rng.random() < CHAT_SHARE
    if chat:
        body["messages"] = [{"role": "user", "content": "let kuki 29 . " * (length // 4)}]
    else:
        body["prompt"] = [rng.randint(FIRST_ID, LAST_ID) for _ in range(length)]
    route, tokens = ("chat/completions", None) if chat else ("completions", length)
    if rng.random() < BAD_SHARE:
        fault = rng.choice(WRONG)
        text = json.dumps({name: value for name, value in body.items() if f'"{name}"' not in fault})
        return Ask(route, f"{text[:-1]}, {fault}}}".encode(), tokens, max_tokens, wrong=True)
    leaves = rng.randint(0, max_tokens // 2) if rng.random() < LEAVING_SHARE else None
    return Ask(route, json.dumps(body | settings).encode(), tokens, max_tokens, settings, leaves)


def fault_of(ask: Ask, chunks: list[dict[str, Any]], done: bool) -> str | None:
    """What is wrong with a whole answer, or None."""
    if not done:
        return "the stream ended without [DONE]"
    if not chunks or any("error" in chunk for chunk in chunks):
        return f"an error in the stream: {chunks[-1:]}"
    usage, reports = chunks[-1].get("usage"), chunks[-1].get("calidrop")
    if not usage or usage["completion_tokens"] != ask.max_tokens:
        return f"{usage} of {ask.max_tokens} tokens"
    if not reports or len(reports) != 1:
        return f"no report: {chunks[-1]}"
    report, prompt = reports[0], ask.prompt_tokens or usage["prompt_tokens"]
    budget = ask.settings.get("kv_budget")
    whole = budget is None or ask.settings.get("kv_policy") == "full" or budget >= prompt
    if report["prompt_tokens"] != prompt or report["kept"] + report["evicted"] != prompt:
        return f"a report that does not add up: {report}"
    if report["kept"] != prompt and (whole or report["kept"] != budget):
        return f"kept {report['kept']} of {prompt} with {ask.settings}"
    if report["kept"] == prompt and not whole and report["reason"] not in ("swap_full", "recall_full"):
        return f"nothing evicted with {ask.settings}: {report}"
    return None
