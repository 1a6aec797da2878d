"""The packages: `vllm_calidrop` as it lies, and `server/` under the name `vllm_calidrop_server`.

The page links to the documents in `docs/`, so they are installed as data beside it.
Everything else about the distribution is in pyproject.toml, which cannot search for packages under another name.
"""

from pathlib import Path

from setuptools import find_packages, setup

ROOTS = {"vllm_calidrop": "vllm_calidrop", "vllm_calidrop_server": "server"}

# An image may be built from a context without the documents; the page then has no links to them.
DOCS = {"vllm_calidrop_server.docs": "docs"} if Path("docs").is_dir() else {}

setup(
    packages=[
        name
        for package, folder in ROOTS.items()
        for name in (package, *(f"{package}.{child}" for child in find_packages(folder)))
    ]
    + list(DOCS),
    package_dir=ROOTS | DOCS,
    package_data={"": ["py.typed", "*.cpp", "*.h", "*.json", "static/*"], "vllm_calidrop_server.docs": ["*.md"]},
)
