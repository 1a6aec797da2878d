"""`calidrop-server MODEL ...` is `vllm serve MODEL ...` with the CALIDROP backend and the routes of this package.

Every flag of `vllm serve` passes through. The server's own go into the environment, which vLLM's API processes inherit:
a key among vLLM's flags would be logged. `calidrop-server plan` sizes a workload instead of serving.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from importlib.metadata import entry_points

from .options import ADMIN_KEY, MAX_BODY_BYTES

PLUGIN = "calidrop"
# Running requests may finish for so long after SIGTERM; a pod's usual grace time is 30 s.
SHUTDOWN_TIMEOUT = "25"

_OWN_FLAGS = {"--calidrop-admin-key": ADMIN_KEY, "--calidrop-max-body-bytes": MAX_BODY_BYTES}
_DEFAULTS = (
    (("--attention-backend", "--attention-config", "-ac"), ("--attention-backend", PLUGIN)),
    (("--shutdown-timeout",), ("--shutdown-timeout", SHUTDOWN_TIMEOUT)),
)


def serve_arguments(arguments: Sequence[str]) -> list[str]:
    """The arguments of `vllm` for those of `calidrop-server`; what the user names stays."""
    named = {argument.partition("=")[0].partition(".")[0].replace("_", "-") for argument in arguments}
    added = [word for flags, default in _DEFAULTS if not named & set(flags) for word in default]
    return ["serve", *arguments, *added]


def take_own_flags(arguments: Sequence[str]) -> tuple[list[str], dict[str, str]]:
    """The arguments without the server's own flags, and what those put into the environment."""
    rest: list[str] = []
    environment: dict[str, str] = {}
    words = iter(arguments)
    for word in words:
        flag, equals, value = word.partition("=")
        if flag not in _OWN_FLAGS:
            rest.append(word)
            continue
        given = value if equals else next(words, None)
        if not given:
            raise SystemExit(f"calidrop-server: {flag} needs a value")
        environment[_OWN_FLAGS[flag]] = given
    return rest, environment


def allowed_plugins(current: str | None) -> str:
    """`VLLM_PLUGINS` with this one in it: vLLM loads routes of plugins it is told by name, and then only those named.

    Where nothing was named, every plugin that vLLM would have loaded is, and no other's routes.
    """
    if current is not None:
        names = [name for name in current.split(",") if name]
        return ",".join(names if PLUGIN in names else [*names, PLUGIN])
    routes = {point.name for point in entry_points(group="vllm.endpoint_plugins")}
    found = {
        point.name
        for group in entry_points().groups
        if group.startswith("vllm.")
        for point in entry_points(group=group)
    }
    general = {point.name for point in entry_points(group="vllm.general_plugins")}
    return ",".join(sorted((found - routes) | general | {PLUGIN}))


def main() -> None:
    if sys.argv[1:2] == ["plan"]:
        from .plan_command import main as plan

        sys.exit(plan(sys.argv[2:]))
    arguments, environment = take_own_flags(sys.argv[1:])
    os.environ.update(environment)
    os.environ["VLLM_PLUGINS"] = allowed_plugins(os.environ.get("VLLM_PLUGINS"))

    from vllm.entrypoints.cli.main import main as vllm_main

    sys.argv = ["vllm", *serve_arguments(arguments)]
    vllm_main()
