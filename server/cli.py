"""`calidrop-server MODEL ...` is `vllm serve MODEL ... --attention-backend calidrop`; `plan` sizes it instead."""

import sys
from collections.abc import Sequence

BACKEND_FLAG = "--attention-backend"


def serve_arguments(arguments: Sequence[str]) -> list[str]:
    """The arguments of `vllm` for those of `calidrop-server`; a backend that the user names stays."""
    named = any(argument.partition("=")[0].replace("_", "-") == BACKEND_FLAG for argument in arguments)
    return ["serve", *arguments, *([] if named else [BACKEND_FLAG, "calidrop"])]


def main() -> None:
    if sys.argv[1:2] == ["plan"]:
        from .plan_command import main as plan

        sys.exit(plan(sys.argv[2:]))
    from vllm.entrypoints.cli.main import main as vllm_main

    sys.argv = ["vllm", *serve_arguments(sys.argv[1:])]
    vllm_main()
