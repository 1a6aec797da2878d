"""The Triton kernel of the look: right under Triton's interpreter, and compiled for the GPUs it is meant for.

Triton decides when it is imported whether it interprets, so each half runs in a process of its own.
"""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

pytest.importorskip("triton")

INTERPRETED = """
import itertools
import torch
from benchmarks.kernels.look_triton import page_masses
from vllm_calidrop.evicted.recall.sketch import encode, estimate
from vllm_calidrop.evicted.recall.store import by_token, by_word

torch.manual_seed(0)
for head_dim, group in itertools.product((64, 80, 128), (1, 4)):
    heads, width = 2, 3
    stored, kv_heads = torch.tensor([1, 129, 384, 300]), torch.tensor([0, 1, 1, 0])
    pairs = len(stored)
    blocks = torch.randperm(pairs * width).view(pairs, width)
    keys = 3 * torch.randn(pairs * width * heads, 128, head_dim)
    mu = torch.randn(pairs, head_dim)
    codes, scales = encode(keys, torch.zeros(len(keys), head_dim))
    codes = by_word(codes.view(pairs * width, heads, 128, -1)).contiguous()
    scales = scales.view(pairs * width, heads, 128)
    query = torch.randn(pairs, group, head_dim)
    found = page_masses(query, mu, codes, scales, blocks, kv_heads, stored, 0.125)
    of_pair = (blocks, kv_heads[:, None])
    logits = estimate(query, by_token(codes[of_pair].flatten(1, 2)), scales[of_pair].flatten(1), mu) * 0.125
    logits = torch.where((torch.arange(384) < stored[:, None])[:, None], logits, -torch.inf)
    torch.testing.assert_close(found, logits.unflatten(-1, (-1, 16)).logsumexp(-1), atol=1e-4, rtol=1e-5)
"""

COMPILED = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from benchmarks.kernels.look_triton import look_kernel

pointers = ["*fp32", "*fp32", "*u8", "*fp16", "*i64", "*i64", "*i64", "*fp32"]
numbers = ["fp32", "i32", "i32", "fp32", "fp32"]
constants = {"GROUP": 4, "BYTES": 32, "TOKENS": 128, "PAGES": 8}
names = look_kernel.arg_names
signature = dict(zip(names, pointers + numbers + ["constexpr"] * len(constants), strict=True))
for capability in (80, 90):
    source = ASTSource(look_kernel, signature, constexprs=constants)
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32))
    assert len(compiled.asm["cubin"]) > 1000
    print(capability, len(compiled.asm["cubin"]), compiled.metadata.shared)
"""


@pytest.mark.parametrize(("program", "interpret"), [(INTERPRETED, "1"), (COMPILED, "0")], ids=["interpreted", "cubin"])
def test_look_kernel(program: str, interpret: str) -> None:
    environment = os.environ | {"TRITON_INTERPRET": interpret}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
