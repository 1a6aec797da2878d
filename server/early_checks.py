"""Mistakes that can be told before vLLM is imported: each is one line that says what to do.

Every check returns nothing or raises UsageError. A check that cannot be sure says nothing: vLLM will.
"""

from __future__ import annotations

import errno
import json
import os
import re
import socket
import urllib.error
import urllib.request
from pathlib import Path

import psutil

from vllm_calidrop.settings.request import RequestSettings, SettingsError
from vllm_calidrop.settings.server import ServerSettings

from .command_line import CommandLine

HUB_TIMEOUT_SECONDS = 5.0
GIB = 2**30
# A name on the hub of Hugging Face, `owner/name` or `name`, with what vLLM allows behind it for a GGUF file.
_HUB_NAME = re.compile(r"([\w.-]+/)?[\w.-]+(:[\w.-]+)?")


class UsageError(Exception):
    """The command line, or what it finds on this machine, cannot be served; the message says what to do."""


def check(line: CommandLine) -> None:
    """Raise UsageError for the first mistake found."""
    _refuse_settings_as_flags(line)
    _need_good_settings(line)
    _need_a_model(line)
    if line.model:
        _need_its_files(line.model)
    if line.listens and line.port:
        _need_a_free_port(line.host, line.port)


def _refuse_settings_as_flags(line: CommandLine) -> None:
    """Settings of requests and of this server are no flags: vLLM would only say that it does not know them."""
    names = {*RequestSettings.model_fields, *ServerSettings.model_fields}
    for flag in line.flags:
        name = flag.removeprefix("--").replace("-", "_")
        if name not in names:
            continue
        value = line.value(flag)
        shown = value if value and not value.startswith("-") else "..."
        example = f'--additional-config \'{{"calidrop": {{"{name}": {shown}}}}}\''
        also = "; a request sets its own as a field of its JSON body" if name in RequestSettings.model_fields else ""
        raise UsageError(f"{flag} is not a flag: the server's default is given with {example}{also}")


def _need_good_settings(line: CommandLine) -> None:
    """The server's settings by themselves, and a host pool that can be told not to fit before anything is loaded."""
    given = line.value("--additional-config")
    if given is None:
        return
    try:
        settings = ServerSettings.from_additional_config(json.loads(given))
    except json.JSONDecodeError as error:
        raise UsageError(f"--additional-config is not JSON ({error})") from None
    except SettingsError as error:
        raise UsageError(f"--additional-config: {error}") from None
    free = psutil.virtual_memory().available
    if settings.swap_bytes is not None and settings.swap_bytes > free:
        raise UsageError(
            f"swap_bytes ({settings.swap_bytes / GIB:.2f} GiB) is more than the free memory of this machine "
            f"({free / GIB:.2f} GiB): lower it in --additional-config"
        )


def _need_a_model(line: CommandLine) -> None:
    if not line.may_name_a_model:
        raise UsageError(
            "name a model: calidrop-server MODEL [flags of vllm serve], MODEL a folder or a name on the hub"
        )


def _need_its_files(model: str) -> None:
    """MODEL is a folder or file here, or a name that the hub or its cache knows. Other kinds of names are vLLM's."""
    path = Path(model).expanduser()
    if path.is_dir():
        if not any((path / name).is_file() for name in ("config.json", "params.json")) and not any(path.glob("*.gguf")):
            raise UsageError(f"{model} is a folder without a config.json: name the folder that holds the model's files")
        return
    if path.exists() or "://" in model or os.environ.get("VLLM_USE_MODELSCOPE"):
        return
    if model.startswith((".", "/", "~")) or not _HUB_NAME.fullmatch(model):
        raise UsageError(f"{model} does not exist: MODEL is a model's folder, or its name on the hub (owner/name)")
    name = model.partition(":")[0]
    if not _is_cached(name):
        _need_the_hub(name)


def _is_cached(name: str) -> bool:
    from huggingface_hub import try_to_load_from_cache

    return any(isinstance(try_to_load_from_cache(name, file), str) for file in ("config.json", "params.json"))


def _need_the_hub(name: str) -> None:
    """The hub must answer and know the name."""
    missing = f"there is no folder {name} here, and no model of that name in the Hugging Face cache"
    if any(
        os.environ.get(flag, "").upper() in ("1", "ON", "YES", "TRUE")
        for flag in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")
    ):
        raise UsageError(f"{missing}; HF_HUB_OFFLINE is set, so it cannot be fetched: name a folder, or unset it")
    address = f"{os.environ.get('HF_ENDPOINT', 'https://huggingface.co').rstrip('/')}/api/models/{name}"
    token = os.environ.get("HF_TOKEN")
    request = urllib.request.Request(address, headers={"Authorization": f"Bearer {token}"} if token else {})
    try:
        urllib.request.urlopen(request, timeout=HUB_TIMEOUT_SECONDS).close()
    except urllib.error.HTTPError as error:
        if error.code in (401, 403, 404):
            raise UsageError(
                f"{missing}; the hub does not know it or does not show it to you (HTTP {error.code}): "
                "check the name, and set HF_TOKEN for a model that needs permission"
            ) from None
    except OSError as error:
        reason = getattr(error, "reason", error)
        raise UsageError(
            f"{missing}; the hub cannot be reached ({reason}): name a folder, or mend the network"
        ) from None


def _need_a_free_port(host: str, port: int) -> None:
    """The port is bound and given back; vLLM binds it again. Errors other than these are left for vLLM to tell."""
    where = f"port {port}" + (f" of {host}" if host else "")
    try:
        _bind(host, port, reuse=True)
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise UsageError(f"{where} is in use: stop what listens there, or choose another with --port") from None
        if error.errno == errno.EACCES:
            raise UsageError(f"{where} needs permission: choose one above 1023 with --port") from None
        if error.errno == errno.EADDRNOTAVAIL:
            raise UsageError(f"{host} is no address of this machine: choose another with --host") from None
        return
    # A server that still loads has bound its port and does not listen yet. Only a bind without SO_REUSEADDR sees that,
    # and it fails for connections of an ended server too: those are listed, a port that is bound only is not.
    try:
        _bind(host, port, reuse=False)
    except OSError as error:
        listed = any(one.laddr and one.laddr.port == port for one in psutil.net_connections("tcp"))
        if error.errno == errno.EADDRINUSE and not listed:
            raise UsageError(f"{where} is in use by a server that is starting: choose another with --port") from None


def _bind(host: str, port: int, reuse: bool) -> None:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, int(reuse))
        probe.bind((host, port))
