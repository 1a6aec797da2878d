"""What the operator allows: requests and defaults outside of it are refused by the name of the field."""

from __future__ import annotations

from typing import Any

import pytest

from vllm_calidrop.settings.defaults import VersionedSettings
from vllm_calidrop.settings.request import LimitError, SettingsError
from vllm_calidrop.settings.server import ServerSettings, resolve_request

LIMITS = {
    "min_budget": 16,
    "max_budget": 512,
    "min_theta": 0.5,
    "max_theta": 0.9,
    "on_full": ["full", "wait"],
    "kv_budget": 64,
}


def server(**given: Any) -> ServerSettings:
    return ServerSettings.from_additional_config({"calidrop": given})


@pytest.mark.parametrize(
    "asked",
    [
        {},
        {"kv_budget": None},
        {"kv_budget": 16},
        {"kv_budget": 512, "kv_policy": "full"},
        {"kv_theta1": 0.5, "kv_theta2": 0.9},
        {"kv_on_full": "wait"},
    ],
)
def test_inside(asked: dict[str, Any]) -> None:
    resolve_request(asked, server(**LIMITS))


@pytest.mark.parametrize(
    ("asked", "field", "said"),
    [
        ({"kv_budget": 15, "kv_window": 4}, "kv_budget", "16"),
        ({"kv_budget": 513}, "kv_budget", "512"),
        ({"kv_theta1": 0.4}, "kv_theta1", "0.5"),
        ({"kv_theta1": -2, "kv_theta2": -2}, "kv_theta1", "0.5"),
        ({"kv_theta2": 0.95}, "kv_theta2", "0.9"),
        ({"kv_on_full": "reject"}, "kv_on_full", "full, wait"),
    ],
)
def test_outside(asked: dict[str, Any], field: str, said: str) -> None:
    with pytest.raises(LimitError) as refusal:
        resolve_request(asked, server(**LIMITS))
    assert refusal.value.field == field
    assert said in str(refusal.value)
    with pytest.raises(LimitError) as refusal:
        VersionedSettings(1, server(**LIMITS)).changed(asked)
    assert refusal.value.field == field


def test_without_limits_nothing_is_refused() -> None:
    resolve_request({"kv_budget": 1, "kv_theta1": -2, "kv_theta2": 2, "kv_on_full": "reject"}, server())


@pytest.mark.parametrize(("asked", "field"), [({"kv_budget": None}, "kv_budget"), ({"kv_policy": "full"}, "kv_policy")])
def test_full_kv_may_be_forbidden(asked: dict[str, Any], field: str) -> None:
    strict = server(allow_full=False, kv_budget=64)
    assert resolve_request({}, strict).kv_budget == 64
    with pytest.raises(LimitError) as refusal:
        resolve_request(asked, strict)
    assert refusal.value.field == field


@pytest.mark.parametrize(
    ("given", "field"),
    [
        ({"allow_full": False}, "kv_budget"),
        ({"min_theta": 0.75}, "kv_theta1"),
        ({"max_theta": 0.8}, "kv_theta2"),
        ({"max_budget": 32, "kv_budget": 64}, "kv_budget"),
        ({"on_full": ["evict"]}, "kv_on_full"),
        ({"on_full": ["queue"]}, "on_full"),
        ({"min_budget": 0}, "min_budget"),
        ({"min_theta": float("nan")}, "min_theta"),
        ({"max_theta": 3}, "max_theta"),
        ({"allow_full": 1}, "allow_full"),
    ],
)
def test_a_server_that_refuses_its_own_defaults_does_not_start(given: dict[str, Any], field: str) -> None:
    with pytest.raises(SettingsError) as refusal:
        server(**given)
    assert refusal.value.field == field


def test_limits_are_shown() -> None:
    assert server(**LIMITS).limits() == {
        **{k: v for k, v in LIMITS.items() if k != "kv_budget"},
        "allow_full": True,
        "recall_rest": "v2",
    }
    assert server().limits() == {
        "min_budget": None,
        "max_budget": None,
        "min_theta": None,
        "max_theta": None,
        "on_full": ["full", "evict", "wait", "reject"],
        "allow_full": True,
        "recall_rest": "v2",
    }
