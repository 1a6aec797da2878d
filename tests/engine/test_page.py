"""The page at /calidrop/ in a real browser, on a server that wants a key; last, Ctrl-C while it streams."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from selenium import webdriver
from selenium.common.exceptions import StaleElementReferenceException
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.remote.webelement import WebElement
from selenium.webdriver.support.ui import Select, WebDriverWait

from tests.engine.cases import ROOT
from tests.engine.conftest import CALIDROP_SERVER, Server, assert_no_fault, serving

pytestmark = pytest.mark.engine

KEY = "a-key"
BEARER = {"Authorization": f"Bearer {KEY}"}
EXAMPLE = (ROOT / "benchmarks/small_model/example_prompt.txt").read_text().strip()
# A beginning that the bundled model goes on with for long.
BEGINNING = EXAMPLE[:1200]
# Chromium as root in a container, and without its own calls to the outside.
FLAGS = (
    "--headless --no-sandbox --disable-gpu --disable-dev-shm-usage --disable-quic --no-first-run "
    "--disable-background-networking --disable-component-update --disable-sync"
).split()


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    log = tmp_path_factory.mktemp("page") / "log"
    options = ("--enforce-eager", "--dtype", "float32", "--api-key", KEY, "--shutdown-timeout", "60")
    with serving(log, *options, program=CALIDROP_SERVER) as running:
        yield running
    assert_no_fault(log)


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[webdriver.Chrome]:
    found = {name: shutil.which(name) for name in ("chromium", "chromedriver")}
    missing = [name for name, path in found.items() if path is None]
    if missing:
        pytest.fail(f"not installed: {', '.join(missing)}. On Debian: apt-get install chromium chromium-driver")
    options = webdriver.ChromeOptions()
    options.binary_location = str(found["chromium"])
    for flag in (*FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('chromium')}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(str(found["chromedriver"])))
    set_width(driver, 1280)
    yield driver
    driver.quit()


@pytest.fixture
def page(browser: webdriver.Chrome, server: Server) -> webdriver.Chrome:
    """The page, live: opened with the key."""
    browser.get(f"{server}/calidrop/")
    browser.execute_script(f"sessionStorage.setItem('calidrop-key', '{KEY}')")
    browser.get(f"{server}/calidrop/")
    until(browser, lambda: status_of(browser) == "live")
    browser.get_log("browser")
    return browser


def set_width(driver: webdriver.Chrome, width: int, height: int = 900) -> None:
    sizes = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 500}
    driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", sizes)


def until(driver: webdriver.Chrome, met: Callable[[], Any], seconds: float = 60) -> None:
    """Waits for it. The live part is drawn anew with every reading: what was found may be gone when it is looked at."""
    WebDriverWait(driver, seconds, 0.05, [StaleElementReferenceException]).until(lambda _: met())


def by_id(driver: webdriver.Chrome, name: str) -> WebElement:
    return driver.find_element(By.ID, name)


def status_of(driver: webdriver.Chrome) -> str:
    return by_id(driver, "status").text


def enter(driver: webdriver.Chrome, name: str, value: object) -> None:
    control = by_id(driver, name)
    control.send_keys(Keys.CONTROL, "a")
    control.send_keys(str(value))


def insert_example(page: webdriver.Chrome) -> None:
    by_id(page, "example").click()
    until(page, lambda: by_id(page, "prompt").get_property("value") == EXAMPLE)


def write(page: webdriver.Chrome, prompt: str, max_tokens: int) -> None:
    page.execute_script("arguments[0].value = arguments[1]", by_id(page, "prompt"), prompt)
    enter(page, "max-tokens", max_tokens)


def states(page: webdriver.Chrome) -> list[str | None]:
    return [by_id(page, column).get_attribute("data-state") for column in ("full", "compressed")]


def answers(page: webdriver.Chrome) -> list[str]:
    return [
        str(page.find_element(By.CSS_SELECTOR, f"#{column} .answer").get_property("textContent"))
        for column in ("full", "compressed")
    ]


def facts(page: webdriver.Chrome, place: str) -> dict[str, str]:
    """The rows of a list of figures, read in one step: between two, it may be drawn anew."""
    read = (
        "return Array.from(document.querySelectorAll(arguments[0]), row => "
        "[row.querySelector('dt').innerText, row.querySelector('dd').innerText])"
    )
    return dict(page.execute_script(read, f"{place} > div"))


def choose_span(page: webdriver.Chrome, name: str) -> bool:
    page.find_element(By.CSS_SELECTOR, f".switch input[value={name}] + span").click()
    return True


def assert_quiet(page: webdriver.Chrome) -> None:
    """Nothing on the console, not even a hint of the browser."""
    assert page.get_log("browser") == []


def test_it_asks_for_the_key_and_then_lives(browser: webdriver.Chrome, server: Server) -> None:
    browser.get(f"{server}/calidrop")
    assert browser.current_url == f"{server}/calidrop/"
    until(browser, lambda: status_of(browser) == "key needed")
    assert "API key" in by_id(browser, "problem").text
    assert browser.switch_to.active_element == by_id(browser, "key")
    by_id(browser, "key").send_keys("wrong", Keys.ENTER)
    until(browser, lambda: by_id(browser, "key-box").get_attribute("open") is not None)
    by_id(browser, "key").clear()
    by_id(browser, "key").send_keys(KEY, Keys.ENTER)
    until(browser, lambda: status_of(browser) == "live")
    assert not by_id(browser, "problem").is_displayed()
    assert "1,152 tokens" in by_id(browser, "model").text
    assert "No sequence is running." in by_id(browser, "engines").text


def test_both_answers_stream_and_say_what_they_cost(page: webdriver.Chrome, server: Server) -> None:
    write(page, BEGINNING, 120)
    enter(page, "budget", 64)
    by_id(page, "ask").click()
    until(page, lambda: states(page) == ["running", "waiting"])
    until(page, lambda: answers(page)[0] != "" and states(page) == ["running", "waiting"])
    first, _ = answers(page)
    until(page, lambda: answers(page)[1] != "" and states(page) == ["done", "running"])
    begun = [first, answers(page)[1]]
    until(page, lambda: states(page) == ["done", "done"])
    ended = answers(page)
    assert all(whole.startswith(part) for whole, part in zip(ended, begun, strict=True))
    # What the same requests get without the page.
    asked = {
        "model": by_id(page, "model").text.split(" · ")[0],
        "prompt": BEGINNING,
        "max_tokens": 120,
        "temperature": 0,
    }
    for text, column, fields in zip(ended, ("full", "compressed"), ({}, {"kv_budget": 64}), strict=True):
        told = httpx.post(f"{server}/v1/completions", json=asked | fields, headers=BEARER, timeout=120).json()
        (report,) = told["calidrop"]
        assert text == told["choices"][0]["text"]
        shown = facts(page, f"#{column} .facts")
        assert shown["tokens kept"] == f"{report['kept']:,} of {report['prompt_tokens']:,}"
        assert shown["answer"] == f"{told['usage']['completion_tokens']} tokens"
        assert {"first token", "time"} <= shown.keys()
        assert_held(shown, report, told["usage"], httpx.get(f"{server}/calidrop/config", headers=BEARER).json())
        if fields:
            decided = report["recomputes"] + report["merges"] + report["plain"]
            assert abs(float(shown["recompute rate"].split()[0]) - 100 * report["recomputes"] / decided) < 2
    said = by_id(page, "progress").text
    assert "the answers" in said and "of the KV" in said and "such requests instead of" in said
    until(page, lambda: choose_span(page, "start"))
    until(page, lambda: len(page.find_elements(By.CSS_SELECTOR, ".bars li")) == 4)
    until(page, lambda: "%" in page.find_element(By.CSS_SELECTOR, ".bars").text)
    assert int(facts(page, ".figures")["compressed"]) >= 1
    assert_quiet(page)


def assert_held(shown: dict[str, str], report: dict[str, Any], usage: dict[str, int], config: dict[str, Any]) -> None:
    """Tokens and blocks by hand: two layers, fp32; a compacted prompt gives up the whole blocks of what it evicts."""
    size, prompt, answer = config["block_size"], report["prompt_tokens"], usage["completion_tokens"]
    full = -(-(prompt + answer) // size)
    own = full - report["evicted"] // size
    assert shown["device KV"].startswith(f"{report['kept'] + answer:,} tokens, ")
    assert shown["device KV"].endswith(f", {own:,} blocks")
    assert shown["of full KV"].startswith(f"{100 * own / full:.0f} % of {prompt + answer:,} tokens, ")
    assert shown["of full KV"].endswith(f", {full:,} blocks")
    assert (shown["host memory"] == "0 B") == (report["evicted"] == 0)
    assert (shown["read again"] == "0 B") == (report["evicted"] == 0)
    assert int(shown["pool holds"].split()[0].replace(",", "")) >= 1


def test_it_opens_with_an_example_that_works(browser: webdriver.Chrome, server: Server) -> None:
    browser.get(f"{server}/calidrop/")
    until(browser, lambda: by_id(browser, "prompt").get_property("value") == EXAMPLE)
    assert by_id(browser, "budget").get_property("value") == "64"
    by_id(browser, "ask").click()
    until(browser, lambda: states(browser) == ["done", "done"])
    assert int(facts(browser, "#compressed .facts")["of full KV"].split()[0]) < 50
    held = [
        int(facts(browser, f"#{column} .facts")["pool holds"].split()[0].replace(",", ""))
        for column in ("full", "compressed")
    ]
    assert held[1] > held[0]


def test_other_models_get_a_long_english_document(page: webdriver.Chrome) -> None:
    script = "return import('./examples.js').then(module => module.example({model: 'other', chat: arguments[0]}))"
    for chat in (True, False):
        given = page.execute_script(script, chat)
        assert given["budget"] == 128 and given["chat"] is chat
        assert len(given["prompt"].split()) > 900
        assert "key of the glass case" in given["prompt"].splitlines()[-1 if chat else -2]


def test_every_figure_is_explained(page: webdriver.Chrome, server: Server) -> None:
    """On hover, and in the help panel with a link to a document that is there."""
    insert_example(page)
    enter(page, "max-tokens", 4)
    by_id(page, "ask").click()
    until(page, lambda: states(page) == ["done", "done"])
    script = (
        "return Array.from(document.querySelectorAll('.facts > div'), d => [d.querySelector('dt').innerText, d.title])"
    )
    hovers = dict(page.execute_script(script))
    assert {"device KV", "of full KV", "host memory", "read again", "pool holds"} <= hovers.keys()
    page.find_element(By.CSS_SELECTOR, "#help summary").send_keys(Keys.ENTER)
    told = facts(page, "#meanings")
    for name, line in hovers.items():
        assert len(line) > 15 and told[name].startswith(line)
    links = {str(a.get_attribute("href")) for a in page.find_elements(By.CSS_SELECTOR, "#help a")}
    for link in links:
        answer = httpx.get(link)
        assert answer.status_code == 200 and answer.text.startswith("# "), link
    assert httpx.get(f"{server}/calidrop/docs/none.md").status_code == 404
    page.find_element(By.CSS_SELECTOR, "#help summary").send_keys(Keys.ENTER)
    assert_quiet(page)


def test_an_emptied_budget_is_not_full_kv(page: webdriver.Chrome) -> None:
    write(page, BEGINNING, 4)
    enter(page, "budget", Keys.DELETE)
    by_id(page, "ask").click()
    assert "Enter a budget" in by_id(page, "progress").text
    assert by_id(page, "budget").get_attribute("aria-invalid") == "true"
    assert page.switch_to.active_element == by_id(page, "budget")
    assert states(page) == [None, None]
    enter(page, "budget", 64)


def test_theta2_follows_theta1(page: webdriver.Chrome) -> None:
    write(page, BEGINNING, 4)
    enter(page, "budget", 64)
    enter(page, "theta1", f"2{Keys.TAB}")
    assert by_id(page, "theta2").get_property("value") == "2"
    by_id(page, "ask").click()
    until(page, lambda: states(page) == ["done", "done"])
    assert facts(page, "#compressed .facts")["recompute rate"] == "100 %"
    assert "the answers are the same" in by_id(page, "progress").text


def test_running_sequences_are_listed_and_can_be_stopped(page: webdriver.Chrome) -> None:
    write(page, BEGINNING, 800)
    by_id(page, "ask").click()
    until(page, lambda: page.find_elements(By.CSS_SELECTOR, "#engines tbody tr"))
    by_id(page, "stop").click()
    until(page, lambda: states(page) == ["stopped", "stopped"])
    until(page, lambda: "No sequence is running." in by_id(page, "engines").text)
    assert by_id(page, "ask").is_enabled()
    assert_quiet(page)


def test_a_refusal_marks_its_field(page: webdriver.Chrome) -> None:
    write(page, BEGINNING, 4)
    enter(page, "theta1", "2.5")
    by_id(page, "ask").click()
    until(page, lambda: states(page) == ["done", "error"])
    error = page.find_element(By.CSS_SELECTOR, "#compressed .error").text
    assert "kv_theta1" in error and "400" in error
    assert by_id(page, "theta1").get_attribute("aria-invalid") == "true"
    assert page.switch_to.active_element == by_id(page, "theta1")
    enter(page, "theta1", "0.7")
    enter(page, "theta2", "0.85")
    by_id(page, "ask").click()
    until(page, lambda: states(page) == ["done", "done"])
    assert by_id(page, "theta1").get_attribute("aria-invalid") is None


def test_chat_with_pages_and_another_policy(page: webdriver.Chrome) -> None:
    insert_example(page)
    Select(by_id(page, "route")).select_by_visible_text("chat")
    Select(by_id(page, "policy")).select_by_visible_text("streaming_llm")
    Select(by_id(page, "recall")).select_by_visible_text("pages")
    by_id(page, "ask").click()
    until(page, lambda: states(page) == ["done", "done"])
    assert all(answers(page))
    assert facts(page, "#compressed .facts")["mode"] == "calidrop"
    assert_quiet(page)


def test_the_keyboard_is_enough(page: webdriver.Chrome) -> None:
    """Tab reaches every control in reading order; arrows move the slider; Ctrl+Enter asks."""
    page.find_element(By.TAG_NAME, "body").send_keys(Keys.TAB)
    reached = []
    for _ in range(40):
        reached.append(str(page.switch_to.active_element.get_attribute("id")))
        page.switch_to.active_element.send_keys(Keys.TAB)
    order = "example prompt budget-slider budget policy recall theta1 theta2 max-tokens route calibration ask".split()
    assert [name for name in reached if name in order][: len(order)] == order
    before = int(str(by_id(page, "budget").get_property("value")))
    by_id(page, "budget-slider").send_keys(Keys.ARROW_RIGHT)
    assert by_id(page, "budget").get_property("value") == str(before + 1)
    insert_example(page)
    by_id(page, "prompt").send_keys(Keys.CONTROL, Keys.ENTER)
    until(page, lambda: states(page) == ["done", "done"])
    assert_quiet(page)


def test_every_control_has_a_name_and_nothing_comes_from_elsewhere(page: webdriver.Chrome, server: Server) -> None:
    controls = page.find_elements(By.CSS_SELECTOR, "main input, main select, main textarea, main button, [role=meter]")
    assert len(controls) > 15
    assert [control.get_attribute("outerHTML") for control in controls if not control.accessible_name] == []
    loaded = page.execute_script("return performance.getEntriesByType('resource').map(entry => entry.name)")
    assert loaded and all(name.startswith(str(server)) for name in loaded)


@pytest.mark.parametrize("width", [320, 390, 768, 1280])
def test_it_fits_the_screen(page: webdriver.Chrome, width: int) -> None:
    set_width(page, width)
    assert page.execute_script("return document.documentElement.scrollWidth") <= width
    for control in page.find_elements(By.CSS_SELECTOR, "#form input, #form select, #form textarea, #form button"):
        box = control.rect
        assert control.is_displayed() and box["x"] >= 0 and box["x"] + box["width"] <= width
    full, compressed = by_id(page, "full").rect, by_id(page, "compressed").rect
    assert (compressed["y"] > full["y"]) == (width < 760)
    set_width(page, 1280)


def test_light_and_dark(page: webdriver.Chrome) -> None:
    colours = []
    for scheme in ("light", "dark"):
        feature = {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
        page.execute_cdp_cmd("Emulation.setEmulatedMedia", feature)
        colours.append(page.execute_script("return getComputedStyle(document.body).backgroundColor"))
    page.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})
    assert colours[0] != colours[1]


def test_ctrl_c_while_it_streams(page: webdriver.Chrome, server: Server) -> None:
    """Within --shutdown-timeout the running answers are finished; then the page says that nobody answers."""
    write(page, BEGINNING, 200)
    by_id(page, "ask").click()
    until(page, lambda: all(answers(page)) and states(page) == ["done", "running"])
    os.kill(server.process.pid, signal.SIGINT)
    until(page, lambda: states(page) == ["done", "done"])
    assert all(facts(page, f"#{column} .facts")["answer"] for column in ("full", "compressed"))
    assert server.process.wait(timeout=60) == 0
    until(page, lambda: status_of(page) == "no answer")
    assert "does not answer" in by_id(page, "problem").text
    by_id(page, "ask").click()
    until(page, lambda: states(page) == ["error", "error"])
    assert "does not answer" in page.find_element(By.CSS_SELECTOR, "#full .error").text


def test_the_example_is_the_models_own() -> None:
    assert (ROOT / "server/static/example.txt").read_text().strip() == EXAMPLE


def test_every_file_of_the_page_is_packaged(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    copy = tmp_path / "source"
    for name in ("pyproject.toml", "setup.py", "LICENSE", "README.md"):
        copy.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, copy / name)
    for name in ("vllm_calidrop", "server", "docs"):
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
    subprocess.run([*command, "--wheel-dir", str(tmp_path), str(copy)], check=True)
    (wheel,) = tmp_path.glob("*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    for path in (ROOT / "server/static").iterdir():
        assert f"vllm_calidrop_server/static/{path.name}" in names
    for path in (ROOT / "docs").glob("*.md"):
        assert f"vllm_calidrop_server/docs/{path.name}" in names
