"""The wraps of the API process: installed on what they expect or not at all, and what each does, without an engine."""

from __future__ import annotations

import asyncio
import importlib
import json
import subprocess
import sys
import types
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from vllm_calidrop.compat import SUPPORTED_VLLM, installed_vllm_version
from vllm_calidrop.hooks.on_import import when_imported
from vllm_calidrop.hooks.wrap import HookError, installed_hooks, original_of, wrap_method

# The helper


class Wrapped:
    def plain(self, first: int, second: int = 2) -> int:
        return first + second

    @classmethod
    def of_class(cls, first: int) -> int:
        return first

    @staticmethod
    def static(first: int) -> int:
        return first

    not_a_method = 3


class Inheriting(Wrapped):
    pass


def doubled(original: Callable[..., int]) -> Callable[..., int]:
    def wrapper(*args: Any, **kwargs: Any) -> int:
        return 2 * original(*args, **kwargs)

    return wrapper


def test_wraps_once_and_keeps_the_original() -> None:
    for _ in range(3):
        wrap_method(Wrapped, "plain", doubled, ("self", "first"))
        wrap_method(Wrapped, "of_class", doubled, ("cls", "first"))
        wrap_method(Wrapped, "static", doubled, ("first",))
    assert Wrapped().plain(1) == 6
    assert (Wrapped.of_class(2), Wrapped().of_class(2)) == (4, 4)
    assert (Wrapped.static(2), Wrapped().static(2)) == (4, 4)
    assert Wrapped.plain.__name__ == "plain"
    assert original_of(Wrapped, "plain")(Wrapped(), 1) == 3
    symbols = [hook.symbol for hook in installed_hooks() if hook.symbol.startswith(__name__)]
    assert symbols == [f"{__name__}.Wrapped.{name}" for name in ("plain", "of_class", "static")]


@pytest.mark.parametrize(
    ("owner", "name", "expected", "why"),
    [
        (Wrapped, "gone", ("self",), "does not exist"),
        (Inheriting, "static", ("first",), "inherited"),
        (Inheriting, "not_a_method", (), "inherited"),
        (Wrapped, "not_a_method", (), "not a method"),
        (Inheriting, "own", ("self", "first"), r"takes \(self, other\)"),
        (Inheriting, "own", ("self", "other", "third"), r"takes \(self, other\)"),
    ],
)
def test_what_is_not_as_expected_is_an_error_naming_it(
    owner: type, name: str, expected: tuple[str, ...], why: str
) -> None:
    Inheriting.own = lambda self, other: other  # type: ignore[attr-defined]
    with pytest.raises(HookError, match=why) as refusal:
        wrap_method(owner, name, doubled, expected)
    message = str(refusal.value)
    assert f"{__name__}.{owner.__name__}.{name}" in message
    assert installed_vllm_version() in message
    assert SUPPORTED_VLLM in message


def test_functions_of_modules() -> None:
    module = types.ModuleType("some_module")
    module.function = lambda x: x  # type: ignore[attr-defined]
    wrap_method(module, "function", doubled, ("x",))
    assert module.function(4) == 8


def test_when_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "calidrop_probe"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "late.py").write_text("value = 1\n")
    (package / "broken.py").write_text("")
    monkeypatch.syspath_prepend(str(tmp_path))
    seen: list[int] = []

    def callback(module: types.ModuleType) -> None:
        seen.append(module.value)

    for _ in range(2):
        when_imported("calidrop_probe.late", callback)
    when_imported("calidrop_probe.never", callback)
    assert seen == []
    importlib.import_module("calidrop_probe.late")
    assert seen == [1], "once, after the module has run"
    when_imported("calidrop_probe.late", callback)
    assert seen == [1, 1], "at once when it is imported already"
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module("calidrop_probe.never")

    def failing(module: types.ModuleType) -> None:
        raise HookError(f"nothing to wrap in {module.__name__}")

    when_imported("calidrop_probe.broken", failing)
    with pytest.raises(HookError, match=r"calidrop_probe\.broken"):
        importlib.import_module("calidrop_probe.broken")


def test_installing_imports_neither_vllm_nor_torch_and_prints_nothing() -> None:
    code = (
        "import sys; from vllm_calidrop.hooks import install_api_hooks; install_api_hooks(); install_api_hooks();"
        "assert not {'vllm', 'torch', 'fastapi'} & set(sys.modules)"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (run.returncode, run.stdout, run.stderr) == (0, "", "")


# On the real vLLM

API_SYMBOLS = {
    "vllm.v1.engine.input_processor.InputProcessor.process_inputs",
    "vllm.v1.engine.output_processor.RequestState.make_request_output",
    "vllm.v1.engine.output_processor.RequestState._new_completion_output",
    "vllm.v1.engine.output_processor.OutputProcessor.do_tracing",
    "vllm.v1.engine.output_processor.instrument_manual",
    "vllm.entrypoints.generate.beam_search.offline.BeamSearchOfflineMixin.beam_search",
    "vllm.entrypoints.openai.completion.protocol.CompletionRequest.to_sampling_params",
    "vllm.entrypoints.openai.chat_completion.protocol.ChatCompletionRequest.to_sampling_params",
    "vllm.entrypoints.openai.responses.protocol.ResponsesRequest.to_sampling_params",
    "vllm.entrypoints.openai.completion.serving.OpenAIServingCompletion.create_completion",
    "vllm.entrypoints.openai.chat_completion.serving.OpenAIServingChat.create_chat_completion",
    "vllm.entrypoints.openai.chat_completion.batch_serving.OpenAIServingChatBatch.create_batch_chat_completion",
    "vllm.entrypoints.openai.responses.serving.OpenAIServingResponses.create_responses",
    "vllm.entrypoints.openai.responses.serving.OpenAIServingResponses.responses_full_generator",
    "vllm.entrypoints.anthropic.serving.AnthropicServingMessages.create_messages",
    "vllm.entrypoints.launchers.app.init_exception_handler",
    "vllm.v1.engine.async_llm.AsyncLLM.generate",
    "vllm.entrypoints.scale_out.token_in_token_out.serving.ServingTokens.serve_tokens",
}


@pytest.fixture(scope="module")
def hooked() -> None:
    pytest.importorskip("vllm")
    from vllm_calidrop.hooks import install_api_hooks

    install_api_hooks()
    for symbol in sorted(API_SYMBOLS):
        module = symbol.rpartition(".")[0]
        importlib.import_module(module if module.rpartition(".")[2].islower() else module.rpartition(".")[0])


@pytest.mark.usefixtures("hooked")
def test_every_symbol_is_there_and_wrapped() -> None:
    assert {hook.symbol for hook in installed_hooks()} >= API_SYMBOLS


def output(index: int, finish_reason: str | None = None, calidrop: Any = None) -> SimpleNamespace:
    return SimpleNamespace(
        index=index,
        finish_reason=finish_reason,
        calidrop=calidrop,
        finished=lambda: finish_reason is not None,
    )


def test_stream_is_not_delayed_and_its_last_chunk_has_the_reports() -> None:
    from vllm_calidrop.hooks.api.openai_reports import Gathering, PromptReports, with_reports

    async def collect(chunks: list[tuple[str, SimpleNamespace | None]], choices: int) -> list[tuple[str, str]]:
        """Pairs (newest chunk the engine's side has made, chunk the client got)."""
        reports, opened, made = PromptReports(choices), Gathering(), ""
        opened.prompts.append(reports)

        async def stream() -> AsyncIterator[str]:
            nonlocal made
            for chunk, seen in chunks:
                if seen is not None:
                    reports.see([seen])
                made = chunk
                yield chunk

        return [(made, got) async for got in with_reports(stream(), opened)]

    def data(name: str) -> str:
        return f'data: {{"id":"{name}"}}\n\n'

    got = asyncio.run(
        collect(
            [
                (data("a"), output(0, None, {"plain": 1})),
                (data("b"), output(1, "stop", {"plain": 1})),
                (data("c"), output(0, None, {"plain": 2})),
                (data("d"), output(0, "length", {"plain": 3})),
                (data("usage"), None),
                ("data: [DONE]\n\n", None),
            ],
            choices=2,
        )
    )
    assert [chunk for _, chunk in got[:-2]] == [data(name) for name in "abcd"]
    assert [made for made, _ in got[:3]] == [data(name) for name in "abc"], "each was passed on at once"
    last = json.loads(got[-2][1].removeprefix("data: "))
    assert last == {"id": "usage", "calidrop": [{"plain": 3}, {"plain": 1}]}
    assert got[-1][1] == "data: [DONE]\n\n"

    # A stream that failed: nothing is held back, nothing is added to the error.
    error = 'data: {"error": {"message": "x"}}\n\n'
    for finished in (None, "error"):
        chunks = [(data("a"), None), (error, output(0, finished)), ("data: [DONE]\n\n", None)]
        got = asyncio.run(collect(chunks, choices=1))
        assert [chunk for _, chunk in got] == [chunk for chunk, _ in chunks]


def test_closing_the_stream_closes_the_engine_s_generator() -> None:
    from vllm_calidrop.hooks.api.openai_reports import gathering, watched, with_reports, within

    closed: list[str] = []

    async def engine() -> AsyncIterator[Any]:
        try:
            while True:
                yield SimpleNamespace(outputs=[output(0)])
        finally:
            closed.append("engine")

    async def client() -> None:
        with gathering() as opened:
            assert opened is not None
            results = watched(engine(), 1)

        async def stream() -> AsyncIterator[str]:
            async for _ in results:
                yield "data: {}\n\n"

        chunks = with_reports(within(stream(), opened), opened)
        await anext(chunks)
        await chunks.aclose()  # type: ignore[attr-defined]
        await results.aclose()  # type: ignore[attr-defined]

    asyncio.run(client())
    assert closed == ["engine"]


def test_prompts_join_the_gathering_that_is_open_when_they_are_generated() -> None:
    """Some streams give their prompts to the engine only when they are read, each chunk perhaps in another task."""
    from vllm_calidrop.hooks.api.openai_reports import gathering, watched, with_reports, within

    async def engine(report: dict[str, int]) -> AsyncIterator[Any]:
        yield SimpleNamespace(outputs=[output(0, "stop", report)])

    async def late(report: dict[str, int]) -> AsyncIterator[Any]:
        yield "data: {}\n\n"
        async for _ in watched(engine(report), 1):
            yield 'data: {"last": 1}\n\n'
        yield "data: [DONE]\n\n"

    async def read(report: dict[str, int]) -> list[str]:
        assert watched(None, 1) is None, "nothing is open"
        with gathering() as opened, gathering() as inner:
            assert opened is not None and inner is None, "the outer one gathers"
            eager = watched(engine({"plain": 0}), 1)
            stream = within(late(report), opened)
        chunks = with_reports(stream, opened)
        async for _ in eager:
            pass
        got = []
        while True:
            try:
                got.append(await asyncio.create_task(anext(chunks)))
            except StopAsyncIteration:
                return got

    async def both() -> list[list[str]]:
        return await asyncio.gather(read({"plain": 1}), read({"plain": 2}))

    for number, chunks in enumerate(asyncio.run(both()), start=1):
        last = json.loads(chunks[-2].removeprefix("data: "))
        assert last == {"last": 1, "calidrop": [{"plain": 0}, {"plain": number}]}


def test_an_error_and_a_response_without_prompts_stay_as_they_are() -> None:
    from vllm.entrypoints.serve.engine.protocol import ErrorInfo, ErrorResponse

    from vllm_calidrop.hooks.api.openai_reports import Gathering, PromptReports, with_reports

    opened = Gathering()
    queued = SimpleNamespace(status="queued")
    assert vars(with_reports(queued, opened)) == {"status": "queued"}
    opened.prompts.append(PromptReports(1))
    error = ErrorResponse(error=ErrorInfo(message="x", type="y", code=400))
    assert "calidrop" not in with_reports(error, opened).model_dump()
    assert with_reports(SimpleNamespace(), opened).calidrop == [None]


@pytest.mark.usefixtures("hooked")
class TestNames:
    def asked(self, body: dict[str, Any], **fields: Any) -> dict[str, Any]:
        from vllm.entrypoints.openai.completion.protocol import CompletionRequest

        from vllm_calidrop.hooks.api.openai_requests import asked_names

        return asked_names(CompletionRequest(**{"prompt": "x", **body, **fields}), body)

    def test_both_places(self) -> None:
        body = {
            "kv_budget": 8,
            "kv_transfer_params": {},
            "other": 1,
            "vllm_xargs": {"kv_policy": "h2o", "mine": 1},
        }
        assert self.asked(body) == {"kv_budget": 8, "kv_policy": "h2o"}

    def test_booleans_in_xargs_are_seen_as_sent(self) -> None:
        names = self.asked({"vllm_xargs": {"kv_budget": True, "kv_calibration": False, "kv_sinks": 1}})
        assert (names["kv_budget"], names["kv_calibration"], names["kv_sinks"]) == (True, False, 1)
        assert type(names["kv_budget"]) is bool
        assert type(names["kv_sinks"]) is int

    def test_fields_that_a_translated_request_lost_are_found_in_the_body(self) -> None:
        from vllm_calidrop.hooks.api.openai_requests import asked_names

        assert asked_names(SimpleNamespace(vllm_xargs=None, model_extra=None), {"kv_budget": 3}) == {"kv_budget": 3}

    def test_the_same_twice_is_fine_and_different_is_not(self) -> None:
        from vllm.exceptions import VLLMValidationError

        assert self.asked({"kv_budget": 8, "vllm_xargs": {"kv_budget": 8}}) == {"kv_budget": 8}
        for other in (9, True):
            with pytest.raises(VLLMValidationError) as refusal:
                self.asked({"kv_budget": 1, "vllm_xargs": {"kv_budget": other}})
            assert refusal.value.parameter == "kv_budget"

    def test_names_reach_extra_args_in_a_new_dict_and_only_through_a_handler(self) -> None:
        from vllm.entrypoints.openai.completion.protocol import CompletionRequest

        from vllm_calidrop.hooks.api import openai_requests

        request = CompletionRequest(prompt="x", vllm_xargs={"mine": 1}, kv_budget=8)
        assert request.to_sampling_params(4).extra_args == {"mine": 1}
        token = openai_requests._asked.set({"kv_budget": 8})
        try:
            assert request.to_sampling_params(4).extra_args == {"mine": 1, "kv_budget": 8}
        finally:
            openai_requests._asked.reset(token)
        assert request.vllm_xargs == {"mine": 1}


@pytest.mark.usefixtures("hooked")
class TestInputProcessor:
    """`process_inputs` of a stand-in engine: the wrapper's own part."""

    def process(self, extra_args: dict[str, Any] | None, selected: bool = True, resumable: bool = False) -> Any:
        from vllm import SamplingParams

        from vllm_calidrop.hooks.api import input_processor
        from vllm_calidrop.settings.defaults import VersionedSettings
        from vllm_calidrop.settings.server import ServerSettings

        params = SamplingParams(extra_args=extra_args)

        def original(self: Any, request_id: str, prompt: Any, params: Any) -> Any:
            return SimpleNamespace(sampling_params=params.clone(), resumable=resumable)

        versioned = VersionedSettings(1, ServerSettings()) if selected else None
        engine = SimpleNamespace(calidrop_server_settings=versioned)
        wrapped = input_processor._attaching_record(original)
        requests = [wrapped(engine, "id", None, params) for _ in range(2)]
        assert params.extra_args == extra_args, "the caller's own parameters stay as they are"
        assert requests[0].sampling_params.extra_args == requests[1].sampling_params.extra_args
        return requests[0].sampling_params.extra_args

    def test_every_request_of_a_selected_engine_has_a_complete_record(self) -> None:
        from vllm_calidrop.settings.request import RequestSettings

        for extra in (None, {}, {"kv_budget": 8}, {"mine": 1, "kv_budget": None}):
            sent = self.process(extra)
            record = sent.pop("calidrop_settings")
            assert sent == (extra or {})
            assert list(record) == list(RequestSettings.model_fields)
            assert record["kv_budget"] == (extra or {}).get("kv_budget")

    def test_nothing_without_the_backend(self) -> None:
        for extra in (None, {"kv_budget": "nonsense", "calidrop": 1}):
            assert self.process(extra, selected=False) == extra

    @pytest.mark.parametrize(
        ("extra", "name"),
        [
            ({"kv_budget": 0}, "kv_budget"),
            ({"calidrop": {"kv_budget": 1}}, "calidrop"),
            ({"calidrop_settings": {"kv_budget": 1}}, "calidrop_settings"),
            ({"kv_codec": 1}, "kv_codec"),
        ],
    )
    def test_refusals(self, extra: dict[str, Any], name: str) -> None:
        from vllm.exceptions import VLLMValidationError

        with pytest.raises(VLLMValidationError) as refusal:
            self.process(extra)
        assert refusal.value.parameter == name

    def test_streaming_input_sessions(self) -> None:
        from vllm.exceptions import VLLMValidationError

        assert self.process(None, resumable=True)
        with pytest.raises(VLLMValidationError, match="streaming input"):
            self.process({"kv_budget": 8}, resumable=True)


@pytest.mark.usefixtures("hooked")
class TestOutputProcessor:
    """vLLM's own output processor, fed with what an engine core would send."""

    def run(
        self, kind: str, n: int, steps: list[tuple[int, dict[str, Any] | None, bool]], abort: bool = False
    ) -> list[Any]:
        """steps: (child, kv_transfer_params, finished). Returns every RequestOutput, in order."""
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind
        from vllm.v1.engine import EngineCoreOutput, EngineCoreRequest, FinishReason
        from vllm.v1.engine.output_processor import OutputProcessor, RequestOutputCollector
        from vllm.v1.engine.parallel_sampling import ParentRequest

        params = SamplingParams(n=n, output_kind=RequestOutputKind[kind], detokenize=False)
        request = EngineCoreRequest(
            request_id="parent",
            prompt_token_ids=[1, 2, 3],
            mm_features=None,
            sampling_params=params,
            pooling_params=None,
            arrival_time=0.0,
            lora_request=None,
            cache_salt=None,
            data_parallel_rank=None,
            external_req_id="outer",
        )
        processor = OutputProcessor(None, log_stats=False)
        collected: list[Any] = []

        class Collector(RequestOutputCollector):
            def put(self, item: Any) -> None:
                collected.append(item)

        queue = Collector(params.output_kind, "parent")
        parent = ParentRequest(request) if n > 1 else None
        ids = []
        for index in range(n):
            child = request
            if parent is not None:
                request_id, child_params = parent.get_child_info(index)
                child = EngineCoreRequest(**{**_fields(request), "request_id": request_id})
                child.sampling_params = child_params
            ids.append(child.request_id)
            processor.add_request(child, None, parent, index, queue)
        for child_index, kv, finished in steps:
            reason = FinishReason.LENGTH if finished else None
            processor.process_outputs(
                [EngineCoreOutput(ids[child_index], [7], finish_reason=reason, kv_transfer_params=kv)]
            )
        if abort:
            processor.abort_requests(ids, internal=True)
        return collected

    def test_latest_report_and_the_rest_of_the_params(self) -> None:
        first, last = self.run(
            "DELTA",
            1,
            [
                (0, {"calidrop": {"plain": 1}}, False),
                (0, {"remote": "x", "calidrop": {"plain": 2}}, True),
            ],
        )
        assert last.outputs[0].calidrop == {"plain": 2}
        assert last.kv_transfer_params == {"remote": "x"}
        assert first.kv_transfer_params is None

    def test_without_reports_nothing_changes(self) -> None:
        (only,) = self.run("FINAL_ONLY", 1, [(0, {"remote": "x"}, True)])
        assert only.outputs[0].calidrop is None
        assert "calidrop" not in vars(only.outputs[0])
        assert only.kv_transfer_params == {"remote": "x"}

    def test_every_child_keeps_its_own(self) -> None:
        (final,) = self.run(
            "FINAL_ONLY",
            2,
            [
                (1, {"calidrop": {"plain": 10}}, False),
                (0, {"calidrop": {"plain": 1}}, False),
                (1, {"calidrop": {"plain": 11}}, True),
                (0, {"calidrop": {"plain": 2}}, True),
            ],
        )
        assert [completion.calidrop for completion in final.outputs] == [{"plain": 2}, {"plain": 11}]

    def test_an_abort_has_the_latest(self) -> None:
        outputs = self.run("FINAL_ONLY", 1, [(0, {"calidrop": {"plain": 1}}, False)], abort=True)
        assert outputs[-1].outputs[0].finish_reason == "abort"
        assert outputs[-1].outputs[0].calidrop == {"plain": 1}
        assert self.run("FINAL_ONLY", 1, [], abort=True)[-1].outputs[0].calidrop is None

    def test_merged_outputs_of_a_slow_consumer_have_the_latest(self) -> None:
        first, second = self.run(
            "DELTA", 1, [(0, {"calidrop": {"plain": 1}}, False), (0, {"calidrop": {"plain": 2}}, True)]
        )
        first.add(second, aggregate=True)
        assert first.outputs[0].calidrop == {"plain": 2}


def _fields(request: Any) -> dict[str, Any]:
    return {name: getattr(request, name) for name in request.__struct_fields__}
