"""Stands in for the package `vllm` in LOOM-Scope's environment, so that it asks a server instead of loading a model.

LOOM-Scope 0.8 knows only engines inside its own process (`--server transformers | vllm | rwkv | sglang`). Its vLLM
engine uses two names, `LLM` and `SamplingParams`; here they are, over an OpenAI-compatible endpoint. Put this folder
first on PYTHONPATH, do not install vLLM beside it, and run LOOM-Scope with `--server vllm`:

    CALIDROP_BASE_URL=http://127.0.0.1:8000/v1 CALIDROP_SETTINGS='{"kv_budget": 64}' \\
    PYTHONPATH=benchmarks/accuracy/loom_scope loom-scope.run --server vllm --model_path MODEL --cfg_path CFG

Standard library only. LOOM-Scope applies the chat template itself, so prompts go to the completions route.
"""

from __future__ import annotations

import json
import os
import time
import urllib.error
import urllib.request
from types import SimpleNamespace
from typing import Any

RETRIES = 6


class SamplingParams:
    """Whatever is given, under the OpenAI API's names, which are vLLM's."""

    def __init__(self, **fields: Any) -> None:
        self.fields = {name: value for name, value in fields.items() if value is not None}


class LLM:
    """The served model. Arguments that are an engine's (memory, parallelism) are the server's affair and ignored."""

    def __init__(self, model: str, **_: Any) -> None:
        self.base_url = os.environ.get("CALIDROP_BASE_URL", "http://127.0.0.1:8000/v1").rstrip("/")
        self.settings = json.loads(os.environ.get("CALIDROP_SETTINGS", "{}"))
        self.name = os.environ.get("CALIDROP_MODEL") or self._send("models")["data"][0]["id"]

    def generate(self, prompts: str | list[str], sampling_params: SamplingParams) -> list[SimpleNamespace]:
        """One answer per prompt, shaped as vLLM's RequestOutput as far as LOOM-Scope looks; `report` is calidrop's."""
        outputs = []
        for prompt in [prompts] if isinstance(prompts, str) else prompts:
            # LOOM-Scope drops `do_sample: false` on the way to vLLM; it means greedy.
            body = {"model": self.name, "prompt": prompt, "temperature": 0}
            body |= sampling_params.fields | self.settings
            answer = self._send("completions", body)
            texts = [SimpleNamespace(text=choice["text"]) for choice in answer["choices"]]
            outputs.append(SimpleNamespace(outputs=texts, report=answer.get("calidrop")))
        return outputs

    def _send(self, route: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
        """Tried again while the server is unreachable or overloaded."""
        key = os.environ.get("OPENAI_API_KEY", "none")
        headers = {"Content-Type": "application/json", "Authorization": f"Bearer {key}"}
        data = json.dumps(body).encode() if body is not None else None
        for attempt in range(RETRIES + 1):
            request = urllib.request.Request(f"{self.base_url}/{route}", data, headers)
            try:
                with urllib.request.urlopen(request, timeout=600) as response:
                    return dict(json.load(response))
            except urllib.error.HTTPError as error:
                if error.code not in (429, 500, 502, 503) or attempt == RETRIES:
                    raise RuntimeError(f"{route}: {error.code} {error.read().decode()}") from error
            except urllib.error.URLError:
                if attempt == RETRIES:
                    raise
            time.sleep(min(30.0, 0.5 * 2**attempt))
        raise AssertionError("unreachable")
