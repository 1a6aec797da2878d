"""The command line, from a configuration to a report, and the server it starts."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import httpx
import pytest

from benchmarks.accuracy import server
from benchmarks.accuracy.__main__ import main
from benchmarks.accuracy.config import Server
from benchmarks.accuracy.stub import Stub

CONFIG = """
name = "command"
kv_heads = 2
bootstrap = 100
[[tasks]]
suite = "small"
names = ["single"]
lengths = [96]
count = 4
[sweep]
policies = ["snapkv"]
"""


def command(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    monkeypatch.setattr(sys, "argv", ["accuracy", *map(str, arguments)])
    return main()


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "command.toml"
    path.write_text(CONFIG)
    return path


def test_run_resume_estimate_report(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    with Stub(lambda body: "wrong") as stub:
        assert command(monkeypatch, config, "--base-url", stub.url, "--out", out, "--limit", 2) == 0
        assert len(stub.bodies) == 6
        assert command(monkeypatch, config, "--base-url", stub.url, "--out", out) == 0
        assert len(stub.bodies) == 12
    assert command(monkeypatch, config, "--out", out, "--dry-run") == 0
    assert "4 prompts x 3 cells = 12 requests; 12 were asked" in capsys.readouterr().out
    (out / "report.md").unlink()
    assert command(monkeypatch, config, "--out", out, "--report-only") == 0
    assert "| FullKV | 0.00 | 0.00 |  |" in (out / "report.md").read_text()
    assert json.loads((out / "summary.json").read_text())["complete_samples"] == 4


def test_packages_that_are_missing_are_named(config: Path, tmp_path: Path) -> None:
    """Where only `make install` was done, requests can be counted, and a run ends with one sentence."""
    code = f"""
import sys

class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("matplotlib", "rapidfuzz", "rouge_score"):
            raise ModuleNotFoundError(name)

sys.meta_path.insert(0, Missing())
import importlib.util
found = importlib.util.find_spec
hidden = ("matplotlib", "rapidfuzz", "rouge_score")
importlib.util.find_spec = lambda name, *rest: None if name in hidden else found(name, *rest)
from benchmarks.accuracy.__main__ import main
for arguments in (["--dry-run"], ["--base-url", "http://127.0.0.1:9/v1"]):
    sys.argv = ["accuracy", {str(config)!r}, "--out", {str(tmp_path / "out")!r}, *arguments]
    print(main())
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "4 prompts x 3 cells = 12 requests" in done.stdout and done.returncode == 1, done.stderr
    assert "this command needs matplotlib, rapidfuzz, rouge-score: `make install-dev`" in done.stderr
    assert "Traceback" not in done.stderr


def test_failures_are_the_exit_status(config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with Stub(lambda body: "x", fail=lambda body, earlier: 400 if "kv_budget" in body else None) as stub:
        assert command(monkeypatch, config, "--base-url", stub.url, "--out", tmp_path / "out") == 1


def test_two_models_do_not_share_a_folder(config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"
    with Stub(lambda body: "x") as stub:
        command(monkeypatch, config, "--base-url", stub.url, "--out", out)
    with Stub(lambda body: "x") as other, pytest.raises(SystemExit, match="use --out"):
        command(monkeypatch, config, "--base-url", other.url, "--out", out)


def test_no_server_at_all_is_an_error(config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SystemExit):
        command(monkeypatch, config, "--out", tmp_path / "out")


FAKE = """#!{python}
import http.server, sys
port = int(sys.argv[sys.argv.index("--port") + 1])
if "--fail" in sys.argv:
    sys.exit("no such model")
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
http.server.HTTPServer(("127.0.0.1", port), Handler).serve_forever()
"""


@pytest.fixture
def fake_vllm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "vllm"
    path.write_text(FAKE.format(python=sys.executable))
    path.chmod(0o755)
    monkeypatch.setattr(server, "_program", lambda: str(path))


def test_the_server_is_started_and_stopped(fake_vllm: None, tmp_path: Path) -> None:
    with server.serving(Server(model="m"), tmp_path / "log") as url:
        assert httpx.get(url.replace("/v1", "/health")).status_code == 200
    with pytest.raises(httpx.ConnectError):
        httpx.get(url.replace("/v1", "/health"))


def test_a_server_that_does_not_start_is_said(fake_vllm: None, tmp_path: Path) -> None:
    with (
        pytest.raises(SystemExit, match="ended with status 1"),
        server.serving(Server(model="m", args=["--fail"]), tmp_path / "log"),
    ):
        pass
    assert "no such model" in (tmp_path / "log").read_text()
