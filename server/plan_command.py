"""`calidrop-server plan`: prints how much device and host memory a model, context, budget and concurrency take."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from vllm_calidrop.memory import ModelShape, buffer_page_bytes, swap_block_bytes
from vllm_calidrop.settings.request import SettingsError
from vllm_calidrop.settings.server import ServerSettings, resolve_request

from .plan import Plan, Workload, make_plan

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
GIB, MIB = 2**30, 2**20

PURPOSES = {
    "state_table": "state table",
    "recall": "means of recall by pages",
    "prefill_state": "prompts in prefill, at most",
    "scratch": "scratch, at most",
}
# Options that give a number of the model's configuration, or replace it.
NUMBERS = {
    "layers": "num_hidden_layers",
    "query-heads": "num_attention_heads",
    "kv-heads": "num_key_value_heads",
    "head-dim": "head_dim",
    "hidden-size": "hidden_size",
}


def read_shape(config: dict[str, Any], ranks: int, dtype: str | None, max_model_len: int) -> ModelShape:
    """One rank's share of a model by its Hugging Face config.json (or its text_config)."""
    text = config.get("text_config") or config
    missing = [name for name in ("num_hidden_layers", "num_attention_heads") if name not in text]
    if missing:
        raise SettingsError(f"the model's configuration has no {missing[0]}: give --layers, --query-heads", missing[0])
    heads = text["num_attention_heads"]
    kv_heads = text.get("num_key_value_heads") or heads
    head_dim = text.get("head_dim") or text["hidden_size"] // heads
    name = dtype or text.get("dtype") or text.get("torch_dtype") or "bfloat16"
    if name not in DTYPES:
        raise SettingsError(f"dtype {name!r}; known are {', '.join(DTYPES)}", "dtype")
    if heads % ranks or (kv_heads % ranks and ranks % kv_heads):
        raise SettingsError(f"{heads} query and {kv_heads} KV heads do not divide over {ranks} ranks", "ranks")
    return ModelShape(
        num_layers=text["num_hidden_layers"],
        num_query_heads=heads // ranks,
        num_kv_heads=max(1, kv_heads // ranks),
        head_dim=head_dim,
        dtype=DTYPES[name],
        max_model_len=max_model_len,
    )


def render(plan: Plan, ranks: int) -> str:
    """The plan as text. Bytes per rank; the host's total where several ranks share it."""
    one, load, shape = plan.one, plan.load, plan.shape
    dtype = str(shape.dtype).removeprefix("torch.")
    full, budget = one.full_blocks * plan.block_bytes, one.budget_blocks * plan.block_bytes
    rows = [
        ("Per sequence, at its last token", ""),
        ("  full KV", f"{_size(full)}  ({one.full_blocks} blocks of {load.block_size} tokens)"),
        ("  with the budget", f"{_size(budget)}  ({one.budget_blocks} blocks)"),
        ("  swap, host", f"{_size(one.swap_blocks * swap_block_bytes(shape))}  ({one.swap_blocks} swap blocks)"),
        ("  sketch", f"{_size(one.sketch_blocks * plan.sketch_block_bytes)}  (coded values: {plan.sketch_rest})"),
        ("  page buffer", _size(one.buffer_pages * buffer_page_bytes(shape))),
        (f"For {load.concurrency} at once", ""),
        ("  KV pool, full KV", _size(plan.needed_full)),
        ("  KV pool, with the budget", f"{_size(plan.needed_budget)}  (one prompt still whole)"),
        ("  swap pool, host", _size(plan.swap_bytes) + (f"  ({_size(ranks * plan.swap_bytes)} in all)" * (ranks > 1))),
        ("  sketches", _size(plan.sketch_bytes)),
        ("  page buffers", _size(plan.buffer_bytes)),
        ("Beside the pools", _size(sum(plan.beside.values()))),
        *((f"  {PURPOSES[name]}", _size(size)) for name, size in plan.beside.items()),
    ]
    if plan.pool_blocks is not None:
        pool = plan.pool_blocks * plan.block_bytes
        rows += [
            ("Of the given memory", ""),
            ("  KV pool that is left", f"{_size(pool)}  ({plan.pool_blocks} blocks)"),
            ("  sequences, full KV", str(plan.fit_full)),
            ("  sequences, with the budget", f"{plan.fit_budget}{_by_swap(plan)}"),
        ]
    head = (
        f"{shape.num_layers} layers, {shape.num_query_heads} query heads, {shape.num_kv_heads} KV heads of "
        f"{shape.head_dim}, {dtype}, per rank ({ranks}); prompts of {load.context}, answers of {load.output}, "
        f"budget {load.settings.kv_budget}"
    )
    wide = max(len(name) for name, _ in rows)
    lines = [f"{name:<{wide}}  {value}".rstrip() for name, value in rows]
    flag = f"--additional-config '{json.dumps({'calidrop': plan.server_settings})}'"
    return "\n".join([head, *lines, "Flags: " + flag])


def _by_swap(plan: Plan) -> str:
    each = plan.one.swap_blocks * swap_block_bytes(plan.shape)
    return f"  (the swap pool holds {plan.swap_bytes // each})" if each else ""


def _size(count: int) -> str:
    return f"{count / GIB:.2f} GiB" if count >= GIB else f"{count / MIB:.1f} MiB"


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser("calidrop-server plan", description=__doc__)
    made.add_argument("model", nargs="?", type=Path, help="a model's folder, or its config.json")
    for name, key in NUMBERS.items():
        made.add_argument(f"--{name}", type=int, help=f"instead of the configuration's {key}")
    made.add_argument("--context", type=int, required=True, help="tokens of a prompt, the longest expected")
    made.add_argument("--output", type=int, default=512, help="tokens of an answer, the longest expected (512)")
    made.add_argument("--concurrency", type=int, required=True, help="sequences at once")
    made.add_argument("--dtype", choices=DTYPES, help="of the KV cache; the model's unless given")
    made.add_argument("--block-size", type=int, default=16, help="as given to the server (16)")
    made.add_argument("--tensor-parallel-size", type=int, default=1)
    made.add_argument("--max-model-len", type=int, help="as given to the server; context + output unless given")
    made.add_argument("--max-num-seqs", type=int, help="as given to the server; the concurrency unless given")
    made.add_argument("--max-num-batched-tokens", type=int, default=8192, help="as given to the server (8192)")
    made.add_argument("--no-async-scheduling", action="store_true", help="as given to the server")
    pool = made.add_mutually_exclusive_group()
    pool.add_argument(
        "--kv-memory", type=float, metavar="GIB", help="per rank, what vLLM finds for its KV cache: how many fit"
    )
    pool.add_argument("--kv-pool", type=float, metavar="GIB", help="per rank, a KV cache of fixed size: how many fit")
    made.add_argument("--device", choices=("gpu", "cpu"), default="gpu")
    made.add_argument("--json", action="store_true", help="bytes, as JSON")
    made.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="kv_budget=1024, kv_recall=pages, swap_bytes=...",
    )
    made.add_argument("--budget", type=int, help="short for --set kv_budget=")
    return made


def plan_of(given: argparse.Namespace) -> Plan:
    config: dict[str, Any] = {}
    if given.model is not None:
        path = given.model / "config.json" if given.model.is_dir() else given.model
        config = json.loads(path.read_text())
        config = config.get("text_config") or config
    numbers = {key: getattr(given, name.replace("-", "_")) for name, key in NUMBERS.items()}
    config |= {key: value for key, value in numbers.items() if value is not None}
    for name in ("context", "concurrency", "block_size", "tensor_parallel_size"):
        if getattr(given, name) < 1:
            raise SettingsError(f"{name} must be at least 1", name)
    shape = read_shape(
        config, given.tensor_parallel_size, given.dtype, given.max_model_len or given.context + given.output
    )
    named = [item.partition("=") for item in given.set]
    asked = {name: _value(value) for name, _, value in named}
    asked |= {} if given.budget is None else {"kv_budget": given.budget}
    server = ServerSettings.from_additional_config({"calidrop": asked})
    settings = resolve_request({}, server)
    load = Workload(given.context, given.output, given.concurrency, given.block_size, settings)
    return make_plan(
        shape,
        load,
        server,
        given.device,
        given.max_num_seqs or given.concurrency,
        1 if given.no_async_scheduling else 2,
        kv_memory=None if given.kv_memory is None else int(given.kv_memory * GIB),
        kv_pool=None if given.kv_pool is None else int(given.kv_pool * GIB),
        max_batched=given.max_num_batched_tokens,
    )


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text


def main(arguments: Sequence[str]) -> int:
    made = parser()
    given = made.parse_args(arguments)
    try:
        plan = plan_of(given)
    except (OSError, ValueError, KeyError) as error:
        made.error(str(error))
    print(json.dumps(plan.as_dict(), indent=2) if given.json else render(plan, given.tensor_parallel_size))
    return 0
