"""`calidrop-server MODEL ...` is `vllm serve MODEL ...` with the CALIDROP backend and the routes of this package.

Every flag of `vllm serve` passes through. The server's own go into the environment, which vLLM's API processes inherit:
a key among vLLM's flags would be logged. This process refuses what cannot work (early_checks.py), and then watches over
the server, which runs in a process of its own (launch.py, supervisor.py). `calidrop-server plan` sizes a workload
instead.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Sequence
from importlib.metadata import entry_points

from .command_line import SHUTDOWN_TIMEOUT, CommandLine, shutdown_seconds
from .early_checks import UsageError, check
from .options import ADMIN_KEY, MAX_BODY_BYTES

PLUGIN = "calidrop"

USAGE = """\
usage: calidrop-server MODEL [flags]
       calidrop-server plan MODEL_FOLDER --context N --concurrency N [...]   (plan --help)

Serves MODEL, a folder or a name on the Hugging Face hub, with an OpenAI-compatible API and a page at /calidrop/.
All flags of `vllm serve` are taken (`calidrop-server --help=all` lists them), and these:
  --calidrop-admin-key KEY        key of POST /calidrop/defaults (better: CALIDROP_ADMIN_KEY in the environment)
  --calidrop-max-body-bytes N     larger bodies are a 413
Defaults of requests: --additional-config '{"calidrop": {"kv_budget": 512}}' (docs/settings.md)."""

_OWN_FLAGS = {"--calidrop-admin-key": ADMIN_KEY, "--calidrop-max-body-bytes": MAX_BODY_BYTES}
_BACKEND_FLAGS = ("--attention-backend", "--attention-config", "-ac")


def serve_arguments(arguments: Sequence[str]) -> list[str]:
    """The arguments of `vllm serve` for those of `calidrop-server`; what the user names stays."""
    line, added = CommandLine(arguments), []
    if not line.has(*_BACKEND_FLAGS):
        added += ["--attention-backend", PLUGIN]
    if not line.has("--shutdown-timeout"):
        added += ["--shutdown-timeout", str(SHUTDOWN_TIMEOUT)]
    return [*arguments, *added]


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
            raise UsageError(f"{flag} needs a value")
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


def serve(arguments: Sequence[str]) -> int:
    """Refuse or run the server that `arguments` ask for; its exit status. UsageError where it is refused."""
    from .supervisor import Supervisor

    rest, environment = take_own_flags(arguments)
    line = CommandLine(serve_arguments(rest))
    only_help = line.has("-h", "--help", "-v", "--version")
    if not only_help:
        check(CommandLine(rest))
    os.environ.update(environment)
    os.environ["VLLM_PLUGINS"] = allowed_plugins(os.environ.get("VLLM_PLUGINS"))
    host, port = line.url.partition("://")[2].rsplit(":", 1)
    return Supervisor(
        [sys.executable, "-m", "vllm_calidrop_server.launch", *line.arguments],
        shutdown_timeout=shutdown_seconds(line),
        address=(host.strip("[]"), int(port)) if line.listens and not only_help else None,
        on_ready=lambda: _say_where(line.url),
    ).run()


def _say_where(url: str) -> None:
    time.sleep(0.5)  # the server's own last lines come first
    print(f"calidrop-server: ready. Page: {url}/calidrop/  API: {url}/v1", file=sys.stderr, flush=True)


def main() -> None:
    arguments = sys.argv[1:]
    if arguments[:1] == ["plan"]:
        from .plan_command import main as plan

        sys.exit(plan(arguments[1:]))
    if arguments in (["-h"], ["--help"]):
        print(USAGE)
        return
    try:
        status = serve(arguments)
    except UsageError as error:
        print(f"calidrop-server: {error}", file=sys.stderr)
        status = 2
    sys.exit(status)
