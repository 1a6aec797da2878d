"""Asks for answers with their log-probabilities, of an engine in this process or of a server over HTTP."""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Protocol

FIELD = "forced_token_ids"
PROCESSOR = "vllm_calidrop.forcing:ForcedTokens"
TOP = 20


class FidelityError(RuntimeError):
    """What keeps a measurement from being one; the message says what to do."""


@dataclass(frozen=True)
class Question:
    """`fields` are the request's `kv_*` fields, none for full KV. `forced` are the tokens of the answer, None where the
    model chooses them; then the answer ends after `steps` tokens or where the model ends it.
    """

    prompt: list[int]
    fields: dict[str, Any]
    steps: int
    forced: list[int] | None = None

    @property
    def extra(self) -> dict[str, Any]:
        return self.fields if self.forced is None else self.fields | {FIELD: self.forced}

    @property
    def max_tokens(self) -> int:
        return self.steps if self.forced is None else len(self.forced)


@dataclass(frozen=True)
class Answer:
    """`logprobs`: of each output token's step, the natural logarithms of the probabilities of the TOP likeliest tokens
    and of the token that was drawn, by token id. `report` is the server's `calidrop` object, None without one.
    """

    tokens: list[int]
    logprobs: list[dict[int, float]]
    report: dict[str, Any] | None


class Asker(Protocol):
    def ask(self, questions: Sequence[Question]) -> list[Answer]: ...


class Offline:
    """vLLM in this process with the CALIDROP backend. All questions of a call are one batch."""

    def __init__(self, model: str, dtype: str, max_model_len: int) -> None:
        # Before vLLM is imported: the engine in this process, and no binding to the first core.
        os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
        os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
        os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "2")
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
        from vllm import LLM

        self._llm = LLM(
            model,
            attention_backend="CALIDROP",
            logits_processors=[PROCESSOR],
            max_logprobs=TOP,
            dtype=dtype,
            max_model_len=max_model_len,
            max_num_seqs=32,
            enforce_eager=True,
            disable_log_stats=True,
        )

    def ask(self, questions: Sequence[Question]) -> list[Answer]:
        from vllm import SamplingParams

        prompts = [{"prompt_token_ids": question.prompt} for question in questions]
        parameters = [
            SamplingParams(
                temperature=0,
                max_tokens=question.max_tokens,
                logprobs=TOP,
                ignore_eos=question.forced is not None,
                extra_args=question.extra or None,
                detokenize=False,
            )
            for question in questions
        ]
        outputs = self._llm.generate(prompts, parameters, use_tqdm=False)
        answers = []
        for output in outputs:
            completion = output.outputs[0]
            steps = [{token: entry.logprob for token, entry in step.items()} for step in completion.logprobs]
            answers.append(Answer(list(completion.token_ids), steps, getattr(completion, "calidrop", None)))
        return answers


class Endpoint:
    """A server's `/v1/completions`. `base_url` ends in /v1."""

    def __init__(self, base_url: str, model: str | None = None, timeout: float = 3600) -> None:
        import httpx

        key = os.environ.get("OPENAI_API_KEY", "none")
        self._http = httpx.Client(base_url=base_url, timeout=timeout, headers={"authorization": f"Bearer {key}"})
        self._base_url = base_url
        self._model = model or self._http.get("models").raise_for_status().json()["data"][0]["id"]
        self._refuse_without_forcing()

    def ask(self, questions: Sequence[Question]) -> list[Answer]:
        with ThreadPoolExecutor(max_workers=len(questions)) as pool:
            return list(pool.map(self._ask, questions))

    def _ask(self, question: Question) -> Answer:
        body = {
            "model": self._model,
            "prompt": question.prompt,
            "max_tokens": question.max_tokens,
            "temperature": 0,
            "logprobs": TOP,
            "ignore_eos": question.forced is not None,
            "return_token_ids": True,
            "return_tokens_as_token_ids": True,
            "vllm_xargs": question.extra,
        }
        response = self._http.post("completions", json=body)
        if response.status_code != 200:
            raise FidelityError(f"{self._base_url} answered {response.status_code}: {response.text[:500]}")
        whole = response.json()
        choice = whole["choices"][0]
        steps = [
            {int(name.removeprefix("token_id:")): value for name, value in step.items()}
            for step in choice["logprobs"]["top_logprobs"]
        ]
        reports = whole.get("calidrop")
        return Answer(choice["token_ids"], steps, reports[0] if reports else None)

    def _refuse_without_forcing(self) -> None:
        """Two answers that no model would both give: a server that gives others does not force tokens."""
        for forced in ([5, 5, 6], [6, 5, 5]):
            answer = self._ask(Question([7, 8, 9], {}, 3, forced))
            if answer.tokens != forced:
                raise FidelityError(
                    f"the server at {self._base_url} does not force tokens: start it with `--logits-processors "
                    f"{PROCESSOR}` (and vllm-calidrop installed)"
                )
