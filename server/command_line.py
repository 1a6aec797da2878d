"""The words of a `calidrop-server` command line, read without vLLM.

vLLM's own parser is exact, but importing it takes many seconds. What is read here is enough to refuse the usual
mistakes at once; whatever is unclear is left to vLLM.
"""

from __future__ import annotations

from collections.abc import Sequence

DEFAULT_PORT = 8000
# Running requests may finish for so long after SIGTERM, in seconds: the whole stop takes at most 15 s.
SHUTDOWN_TIMEOUT = 8


class CommandLine:
    """The flags and the model among `arguments`, which are those of `vllm serve`."""

    def __init__(self, arguments: Sequence[str]) -> None:
        self.arguments = list(arguments)

    @property
    def flags(self) -> list[str]:
        """The names of the flags, as in `--max-model-len`: without their values, and without `.field` behind a dot."""
        words = [word.partition("=")[0].partition(".")[0] for word in self.arguments if word.startswith("-")]
        return [word.replace("_", "-") for word in words]

    def has(self, *flags: str) -> bool:
        return not set(flags).isdisjoint(self.flags)

    def value(self, flag: str) -> str | None:
        """What was given last for `flag`, after a space or an equals sign."""
        found = None
        for word, following in zip(self.arguments, [*self.arguments[1:], ""]):
            name, equals, value = word.partition("=")
            if word.startswith("-") and name.replace("_", "-") == flag:
                found = value if equals else following
        return found

    @property
    def model(self) -> str | None:
        """The model, if it is clear: the first word, or what follows `--model`."""
        if self.arguments and not self.arguments[0].startswith("-"):
            return self.arguments[0]
        return self.value("--model")

    @property
    def may_name_a_model(self) -> bool:
        """False where no word can be a model: all are flags, or each follows the flag that it belongs to.

        A word after a flag without a value of its own may be one, and a file given with `--config` may name one.
        """
        if self.model or self.has("--config"):
            return True
        words = [word for word in self.arguments if not word.startswith("-")]
        valued = [self.value(flag) for flag in ("--port", "--host", "--uds", "--dtype", "--max-model-len")]
        return any(word not in valued for word in words)

    @property
    def host(self) -> str:
        """Where the server listens; empty for every address."""
        return self.value("--host") or ""

    @property
    def port(self) -> int | None:
        """None where what was given is not a number: vLLM says so."""
        given = self.value("--port")
        if given is None:
            return DEFAULT_PORT
        return int(given) if given.isdecimal() else None

    @property
    def listens(self) -> bool:
        """Whether this process is to serve HTTP on a port."""
        return not self.has("--headless", "--uds", "--grpc") and self.port is not None

    @property
    def url(self) -> str:
        """The address for a browser on this machine."""
        host = {"": "127.0.0.1", "0.0.0.0": "127.0.0.1", "::": "::1"}.get(self.host, self.host)
        scheme = "https" if self.has("--ssl-certfile") else "http"
        return f"{scheme}://{f'[{host}]' if ':' in host else host}:{self.port}"


def shutdown_seconds(line: CommandLine) -> float:
    """How long running requests may take after SIGTERM; what is no number is left for vLLM to tell."""
    given = line.value("--shutdown-timeout")
    return float(given) if given and given.isdecimal() else float(SHUTDOWN_TIMEOUT)
