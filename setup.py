"""The packages: `vllm_calidrop` as it lies, and `server/` under the name `vllm_calidrop_server`.

Everything else about the distribution is in pyproject.toml, which cannot search for packages under another name.
"""

from setuptools import find_packages, setup

ROOTS = {"vllm_calidrop": "vllm_calidrop", "vllm_calidrop_server": "server"}

setup(
    packages=[
        name
        for package, folder in ROOTS.items()
        for name in (package, *(f"{package}.{child}" for child in find_packages(folder)))
    ],
    package_dir=ROOTS,
    package_data={"": ["py.typed", "*.cpp", "*.h", "*.json", "static/*"]},
)
