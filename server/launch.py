"""The server's process: `python -m vllm_calidrop_server.launch` runs `vllm serve` under the supervisor.

It adds what only vLLM knows (the platform's block size) and turns what vLLM refuses into one line.
"""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Sequence

from .command_line import CommandLine, shutdown_seconds
from .supervisor import ENDING_SECONDS, end_with_parent

# vLLM's CPU attention wants multiples of 32 tokens.
CPU_BLOCK_SIZE = 32
USAGE_STATUS = 2


def with_block_size(arguments: Sequence[str], on_cpu: bool) -> list[str]:
    """The arguments, with a block size where the user named none and vLLM's own would waste what eviction frees."""
    if not on_cpu or CommandLine(arguments).has("--block-size"):
        return list(arguments)
    print(
        f"calidrop-server: block size {CPU_BLOCK_SIZE} (--block-size says otherwise): eviction frees whole blocks, so "
        "smaller ones free more, and vLLM's CPU attention wants a multiple of 32; vLLM itself would take 128",
        file=sys.stderr,
        flush=True,
    )
    return [*arguments, "--block-size", str(CPU_BLOCK_SIZE)]


def one_line(error: BaseException) -> str:
    """What an error says, without the frame that pydantic puts around it."""
    reasons = getattr(error, "errors", None)
    if callable(reasons) and (found := reasons()):
        message = str(found[0].get("msg", error)).removeprefix("Value error, ").removeprefix("Assertion failed, ")
    else:
        message = str(error)
    return " ".join(message.split())


def main() -> None:
    end_with_parent(shutdown_seconds(CommandLine(sys.argv[1:])) + ENDING_SECONDS)
    from vllm.entrypoints.cli.main import main as vllm_main
    from vllm.platforms import current_platform

    sys.argv = ["vllm", "serve", *with_block_size(sys.argv[1:], current_platform.is_cpu())]
    try:
        vllm_main()
    except (ValueError, OSError) as error:
        if os.environ.get("VLLM_LOGGING_LEVEL", "").upper() == "DEBUG":
            traceback.print_exc()
        print(f"calidrop-server: {one_line(error)}", file=sys.stderr, flush=True)
        sys.exit(USAGE_STATUS)


if __name__ == "__main__":
    main()
