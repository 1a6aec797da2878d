"""Defaults that change while the server runs."""

from __future__ import annotations

from typing import Any

import pytest

from vllm_calidrop.settings.defaults import VersionedSettings
from vllm_calidrop.settings.request import RequestSettings, SettingsError
from vllm_calidrop.settings.server import ServerSettings

START = VersionedSettings(
    1, ServerSettings.from_additional_config({"calidrop": {"kv_budget": 64, "kv_theta1": 0.6, "swap_bytes": 10}})
)


def test_named_defaults_change_and_the_others_stay() -> None:
    changed = START.changed({"kv_budget": 128, "kv_policy": "h2o"})
    assert changed.version == 2
    assert changed.settings.request_defaults == {"kv_budget": 128, "kv_policy": "h2o", "kv_theta1": 0.6}
    assert changed.settings.swap_bytes == 10
    assert START.settings.request_defaults == {"kv_budget": 64, "kv_theta1": 0.6}
    assert set(changed.resolved()) == set(RequestSettings.model_fields)
    assert changed.resolved()["kv_budget"] == 128


def test_null_takes_a_default_back() -> None:
    changed = START.changed({"kv_theta1": None, "kv_budget": None})
    assert changed.settings.request_defaults == {}
    assert changed.resolved() == RequestSettings().to_record()


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"kv_budget": 0}, "kv_budget"),
        ({"kv_budget": True}, "kv_budget"),
        ({"kv_theta2": 0.5}, "kv_theta2"),
        ({"kv_window": 65}, "kv_window"),
        ({"kv_budget": 32, "kv_codecs": 1}, "kv_codecs"),
        ({"swap_bytes": 1}, "swap_bytes"),
        ({"request_defaults": {}}, "request_defaults"),
        ({"kv_theta1": float("nan")}, "kv_theta1"),
        ({"kv_budget": [1]}, "kv_budget"),
    ],
)
def test_a_change_that_cannot_be_used_names_its_field(changes: dict[str, Any], field: str) -> None:
    with pytest.raises(SettingsError) as refusal:
        START.changed(changes)
    assert refusal.value.field == field


def test_another_process_follows() -> None:
    changed = START.changed({"kv_budget": 128})
    sent = changed.as_dict()
    copy = VersionedSettings(1, ServerSettings()).at(sent["version"], sent["given"])
    assert copy.version == 2
    assert copy.resolved() == changed.resolved()
