"""Request and server settings: every name, the fallbacks, and what is refused under which name."""

from __future__ import annotations

import json
import math
import pickle
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from vllm_calidrop.algorithm.policies import POLICIES
from vllm_calidrop.evicted.codecs import CODECS
from vllm_calidrop.settings.request import MAX_COUNT, LimitError, RequestSettings, SettingsError, is_ours
from vllm_calidrop.settings.server import ServerSettings, resolve_request

NO_DEFAULTS = ServerSettings()

TABLE: dict[str, Any] = {
    "kv_budget": None,
    "kv_policy": "snapkv",
    "kv_theta1": 0.7,
    "kv_theta2": 0.85,
    "kv_gate": "group",
    "kv_calibration": True,
    "kv_calibration_size": None,
    "kv_on_full": "full",
    "kv_codec": "none",
    "kv_read_budget": None,
    "kv_window": 32,
    "kv_pool_kernel": 5,
    "kv_sinks": 32,
    "kv_recall": "all",
    "kv_recall_rest": "none",
    "kv_recall_theta": 0.9,
    "kv_recall_buffer": 0,
    "kv_recall_eps": 0.02,
    "kv_recall_top_p": None,
    "kv_recall_pages": 4,
}
NULLABLE = ("kv_budget", "kv_calibration_size", "kv_read_budget", "kv_recall_top_p")

BAD: list[tuple[str, Any]] = [
    *[(name, value) for name in ("kv_budget", "kv_window") for value in (0, -1)],
    *[(name, -1) for name in ("kv_calibration_size", "kv_sinks", "kv_pool_kernel")],
    *[
        (name, value)
        for name in ("kv_budget", "kv_calibration_size", "kv_window", "kv_pool_kernel", "kv_sinks")
        for value in (True, False, 1.5, 3.0, "3", [3], {}, MAX_COUNT + 1, 10**40, math.nan)
    ],
    *[(name, None) for name in TABLE if name not in NULLABLE],
    *[
        (name, value)
        for name in ("kv_theta1", "kv_theta2")
        for value in (
            True,
            "0.5",
            math.nan,
            math.inf,
            -math.inf,
            2.001,
            -2.001,
            3,
            10**400,
            -(10**400),
            [0.5],
        )
    ],
    *[(name, value) for name in ("kv_policy", "kv_gate", "kv_on_full") for value in ("", "SNAPKV", 1, True, ["full"])],
    *[("kv_calibration", value) for value in (0, 1, "true", 0.0)],
    *[("kv_pool_kernel", value) for value in (0, 2, 4)],
    *[("kv_recall", value) for value in ("", "none", 1, True)],
    *[("kv_recall_pages", value) for value in (0, -1, True, 1.5, "4", MAX_COUNT + 1)],
    *[("kv_recall_buffer", value) for value in (-1, True, 1.5, "4", 65, 10**40)],
    *[("kv_recall_theta", value) for value in (True, "0.9", 2.1, -3, math.nan, math.inf)],
    *[("kv_recall_eps", value) for value in (True, "0", -0.1, 1.1, math.nan, math.inf)],
    *[("kv_recall_top_p", value) for value in (True, "0", 0, -0.1, 1.1, math.nan, math.inf)],
    *[("kv_codec", value) for value in ("", "int3", "INT8", 8, True, ["int8"])],
    *[("kv_read_budget", value) for value in (-1, True, 1.5, "4", 2**62 + 1, 10**40, math.nan)],
    *[(name, 1) for name in ("kv_", "kv_budgets")],
]


def test_the_table() -> None:
    assert resolve_request({}, NO_DEFAULTS).to_record() == TABLE


@pytest.mark.parametrize(("name", "value"), BAD)
def test_refused_under_its_name(name: str, value: Any) -> None:
    with pytest.raises(SettingsError) as refusal:
        resolve_request({name: value}, NO_DEFAULTS)
    assert refusal.value.field == name
    assert name in str(refusal.value)
    assert len(str(refusal.value)) < 500


@pytest.mark.parametrize(
    ("raw", "field", "also"),
    [
        ({"kv_theta2": 0.1}, "kv_theta2", "kv_theta1"),
        ({"kv_theta1": 0.9, "kv_theta2": 0.8}, "kv_theta1", "kv_theta2"),
        ({"kv_budget": 16, "kv_window": 17}, "kv_window", "kv_budget"),
        ({"kv_budget": 16, "kv_sinks": 17}, "kv_sinks", "kv_budget"),
    ],
)
def test_impossible_combinations_name_both(raw: dict[str, Any], field: str, also: str) -> None:
    with pytest.raises(SettingsError) as refusal:
        resolve_request(raw, NO_DEFAULTS)
    assert refusal.value.field == field
    assert field in str(refusal.value)
    assert also in str(refusal.value)


def test_numbers_that_are_fine() -> None:
    settings = resolve_request({"kv_theta1": -2, "kv_theta2": 2, "kv_budget": MAX_COUNT}, NO_DEFAULTS)
    assert (settings.kv_theta1, settings.kv_theta2) == (-2.0, 2.0)
    assert resolve_request({"kv_theta1": 2, "kv_theta2": 2}, NO_DEFAULTS).kv_theta1 == 2.0


@pytest.mark.parametrize(("theta1", "theta2"), [(2, 2.0), (0.9, 0.9), (0.85, 0.85), (0.5, 0.85), (-2, 0.85)])
def test_theta2_follows_a_theta1_that_is_above_its_default(theta1: float, theta2: float) -> None:
    assert resolve_request({"kv_theta1": theta1}, NO_DEFAULTS).kv_theta2 == theta2
    assert resolve_request({}, server(kv_theta1=theta1)).kv_theta2 == theta2


def test_theta2_does_not_follow_beyond_what_the_operator_says() -> None:
    for operator in (server(kv_theta2=0.85), server(max_theta=0.95)):
        with pytest.raises(SettingsError) as refusal:
            resolve_request({"kv_theta1": 2}, operator)
        assert refusal.value.field == "kv_theta1"


@pytest.mark.parametrize("name", ["KV_BUDGET", "Kv_Budget", "kv_BUDGET"])
def test_a_name_in_another_case_is_told_how_it_is_written(name: str) -> None:
    with pytest.raises(SettingsError, match="lower case, send kv_budget") as refusal:
        resolve_request({name: 64}, NO_DEFAULTS)
    assert refusal.value.field == name
    assert resolve_request({"KV_TRANSFER_PARAMS": {}}, NO_DEFAULTS).kv_budget is None, "vLLM's own name"
    assert resolve_request({"kv_budget": 8, "kv_window": 8, "kv_sinks": 8}, NO_DEFAULTS).kv_window == 8
    assert resolve_request({"kv_window": 500}, NO_DEFAULTS).kv_window == 500


@pytest.mark.parametrize(
    ("raw", "eps", "pages"),
    [
        ({}, 0.02, 4),
        ({"kv_recall_buffer": 4}, 0.05, 4),
        ({"kv_recall_buffer": 4, "kv_recall_eps": 0}, 0.0, 4),
        ({"kv_recall_top_p": 0.95}, 0.02, 64),
        ({"kv_recall_top_p": 1, "kv_recall_pages": 7}, 0.02, 7),
    ],
)
def test_recall_defaults_follow_buffer_and_choice(raw: dict[str, Any], eps: float, pages: int) -> None:
    settings = resolve_request({"kv_recall": "pages", **raw}, NO_DEFAULTS)
    assert (settings.kv_recall_eps, settings.kv_recall_pages) == (eps, pages)
    assert settings.kv_recall_theta == 0.9


@pytest.mark.parametrize("rest", ["v1", "v2"])
def test_recall_defaults_follow_the_rest(rest: str) -> None:
    settings = resolve_request({"kv_recall": "pages", "kv_recall_rest": rest, "kv_recall_buffer": 4}, NO_DEFAULTS)
    assert (settings.kv_recall_theta, settings.kv_recall_eps, settings.kv_recall_pages) == (2.0, 0.1, 4)
    own = resolve_request({"kv_recall_rest": rest, "kv_recall_theta": 0.95, "kv_recall_eps": 0.02}, NO_DEFAULTS)
    assert (own.kv_recall_theta, own.kv_recall_eps) == (0.95, 0.02)


def test_a_server_without_room_for_a_rest_refuses_it_by_name() -> None:
    for allowed, refused in (("none", ("v1", "v2")), ("v1", ("v2",)), ("v2", ())):
        server = ServerSettings(sketch_rest=allowed)
        for rest in ("none", "v1", "v2"):
            if rest in refused:
                with pytest.raises(LimitError, match=rf"kv_recall_rest \({rest}\).*{allowed}") as error:
                    resolve_request({"kv_recall_rest": rest}, server)
                assert error.value.field == "kv_recall_rest"
            else:
                assert resolve_request({"kv_recall_rest": rest}, server).kv_recall_rest == rest


@given(st.integers(1, 200))
def test_only_defaults_shrink(budget: int) -> None:
    settings = resolve_request({"kv_budget": budget}, NO_DEFAULTS)
    assert settings.kv_budget == budget
    assert settings.kv_window == max(1, min(32, budget // 2))
    assert settings.kv_sinks == min(32, budget // 2)


@given(
    st.fixed_dictionaries(
        {},
        optional={
            "kv_budget": st.none() | st.integers(-1, 80),
            "kv_policy": st.sampled_from(["snapkv", "h2o", "streaming_llm", "full", "none"]),
            "kv_theta1": st.floats(allow_nan=True) | st.integers(-3, 3),
            "kv_theta2": st.floats(-2, 2),
            "kv_calibration_size": st.none() | st.integers(-1, 50),
            "kv_window": st.integers(-1, 80),
            "kv_sinks": st.integers(-1, 80),
            "kv_pool_kernel": st.integers(-1, 9),
        },
    )
)
def test_either_refused_by_name_or_a_complete_record_that_survives_the_way(raw: dict[str, Any]) -> None:
    try:
        settings = resolve_request(raw, NO_DEFAULTS)
    except SettingsError as error:
        assert error.field in raw
        return
    record = settings.to_record()
    assert list(record) == list(TABLE)
    assert all(record[name] == value for name, value in raw.items())
    assert RequestSettings.from_record(json.loads(json.dumps(record))) == settings
    if settings.kv_budget is not None:
        assert settings.kv_window <= settings.kv_budget
        assert settings.kv_sinks <= settings.kv_budget


def test_what_a_record_means() -> None:
    assert not resolve_request({}, NO_DEFAULTS).compresses
    assert not resolve_request({"kv_budget": 8, "kv_policy": "full"}, NO_DEFAULTS).compresses
    assert resolve_request({"kv_budget": 8}, NO_DEFAULTS).calibrates
    for plain in ({"kv_calibration": False}, {"kv_calibration_size": 0}):
        settings = resolve_request({"kv_budget": 8, **plain}, NO_DEFAULTS)
        assert settings.compresses
        assert not settings.calibrates


def test_frozen() -> None:
    with pytest.raises(ValidationError):
        resolve_request({}, NO_DEFAULTS).kv_budget = 3  # type: ignore[misc]


def test_names_are_those_of_the_registries() -> None:
    for name in CODECS:
        assert resolve_request({"kv_codec": name}, NO_DEFAULTS).kv_codec == name
    for name in (*POLICIES, "full"):
        assert resolve_request({"kv_policy": name}, NO_DEFAULTS).kv_policy == name


@pytest.mark.parametrize(("field", "registry"), [("kv_policy", POLICIES), ("kv_codec", CODECS)])
def test_what_is_registered_later_is_known(field: str, registry: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SettingsError, match=f"{field} should be .*, got 'another'"):
        resolve_request({field: "another"}, NO_DEFAULTS)
    monkeypatch.setitem(registry, "another", next(iter(registry.values())))
    assert getattr(resolve_request({field: "another"}, NO_DEFAULTS), field) == "another"
    assert "another" in RequestSettings.model_json_schema()["properties"][field]["enum"]
    with pytest.raises(SettingsError, match=f"{field} should be .*'another'.*, got 'third'"):
        resolve_request({field: "third"}, NO_DEFAULTS)


def test_read_budgets() -> None:
    for budget in (0, 1, 2**40, 2**62, None):
        assert resolve_request({"kv_read_budget": budget}, NO_DEFAULTS).kv_read_budget == budget
    server = ServerSettings.from_additional_config({"calidrop": {"kv_codec": "int8", "kv_read_budget": 9}})
    assert resolve_request({}, server).kv_read_budget == 9
    assert resolve_request({"kv_read_budget": None}, server).kv_read_budget is None
    assert resolve_request({"kv_read_budget": 3}, server).kv_codec == "int8"


def test_names_that_are_not_ours_pass() -> None:
    raw = {"kv_transfer_params": {"a": 1}, "kv_cache_report_mode": 1, "session_id": "x", "kv_budget": 8}
    assert resolve_request(raw, NO_DEFAULTS).kv_budget == 8
    assert not is_ours("kv_transfer_params")
    assert is_ours("kv_anything_new")


# The server's side


def server(**given: Any) -> ServerSettings:
    return ServerSettings.from_additional_config({"calidrop": given})


@pytest.mark.parametrize("additional", [{}, {"other": 1}, {"calidrop": {}}, {"calidrop": None}, None, object()])
def test_nothing_given(additional: Any) -> None:
    assert ServerSettings.from_additional_config(additional) == ServerSettings()


def test_each_field_falls_back_alone() -> None:
    defaults = server(kv_budget=128, kv_theta1=0.2, swap_bytes=1 << 40)
    assert defaults.swap_bytes == 1 << 40
    settings = resolve_request({"kv_theta2": 0.3}, defaults)
    assert (settings.kv_budget, settings.kv_theta1, settings.kv_theta2) == (128, 0.2, 0.3)
    assert settings.kv_window == 32
    assert resolve_request({"kv_budget": 10}, defaults).kv_window == 5
    assert resolve_request({"kv_budget": None}, defaults).kv_budget is None, (
        "null asks for full KV, also against a default"
    )


def test_checks_run_on_the_merged_record_and_blame_what_the_request_gave() -> None:
    with pytest.raises(SettingsError, match="kv_window") as refusal:
        resolve_request({"kv_budget": 32}, server(kv_budget=128, kv_window=64))
    assert refusal.value.field == "kv_budget"
    with pytest.raises(SettingsError, match="kv_theta1") as refusal:
        resolve_request({"kv_theta2": 0.5}, server(kv_theta1=0.6))
    assert refusal.value.field == "kv_theta2"


@pytest.mark.parametrize(
    ("given_", "name"),
    [
        ({"kv_budgt": 1}, "kv_budgt"),
        ({"request_defaults": {}}, "request_defaults"),
        ({"swap_bytes": -1}, "swap_bytes"),
        ({"swap_bytes": True}, "swap_bytes"),
        ({"swap_bytes": "4GiB"}, "swap_bytes"),
        ({"kv_budget": 0}, "kv_budget"),
        ({"kv_theta1": 2.5}, "kv_theta1"),
        ({"kv_budget": 8, "kv_window": 16}, "kv_window"),
    ],
)
def test_bad_server_settings_stop_the_start_by_name(given_: dict[str, Any], name: str) -> None:
    with pytest.raises(ValueError, match=name):
        server(**given_)


@pytest.mark.parametrize("value", [3, "x", [1]])
def test_server_settings_must_be_an_object(value: Any) -> None:
    with pytest.raises(ValueError, match="calidrop"):
        ServerSettings.from_additional_config({"calidrop": value})


def test_server_settings_travel_to_other_processes() -> None:
    defaults = server(kv_budget=64, swap_bytes=0)
    assert pickle.loads(pickle.dumps(defaults)) == defaults
