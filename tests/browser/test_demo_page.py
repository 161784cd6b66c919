"""`qa-deepspeed demo` in headless Chromium: a question is answered on the page, and nothing leaves this computer."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from qa_deepspeed import QuestionAnswerer
from qa_deepspeed.inference.demo_page import N_BEST_SIZE, PORTS, free_port
from tests.browser.driving import Tab, serious_findings
from tests.unit.inference.test_answerer import CONTEXT, QUESTION, answerer
from tests.unit.inference.test_demo_page import HOSTILE

pytest.importorskip("gradio", reason="gradio (the extra [demo]) is not installed")
pytestmark = pytest.mark.browser

STARTS = " answers questions at "


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small BERT with random weights, and a threshold at which it answers."""
    folder = tmp_path_factory.mktemp("demo") / "my<b>model"
    answerer("bert").model.save_pretrained(folder)
    answerer("bert").tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def address(model: Path, driver: object) -> Iterator[str]:
    """Where the command serves the page; at the end Ctrl-C stops it, with status 0 and without a traceback."""
    port = free_port("127.0.0.1", range(PORTS[0] + 1000, PORTS[-1] + 1000))
    command = [sys.executable, "-m", "qa_deepspeed", "demo", str(model), "--port", str(port), "--device", "cpu"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        assert process.stdout is not None
        lines = []
        for line in process.stdout:
            lines.append(line)
            if STARTS in line:
                break
        assert lines and STARTS in lines[-1], "".join(lines)
        served = lines[-1].split(STARTS)[1].split(" ")[0]
        assert served == f"http://127.0.0.1:{port}/"
        yield served
        process.send_signal(signal.SIGINT)
        try:
            rest, _ = process.communicate(timeout=60)
        finally:
            process.kill()
        assert process.returncode == 0 and "Traceback" not in rest, rest


def ask(tab: Tab, address: str, question: str, context: str) -> None:
    """Open the page, ask, and wait for what it shows."""
    tab.open(address)
    tab.wait_for("#question textarea, #question input")
    tab.fill("#question textarea, #question input", question)
    tab.fill("#context textarea", context)
    tab.click("#answer")
    tab.wait_for("#result p")


def test_a_question_is_answered(tab: Tab, address: str, model: Path) -> None:
    expected = QuestionAnswerer.from_pretrained(str(model), device="cpu")(QUESTION, CONTEXT, n_best_size=N_BEST_SIZE)
    ask(tab, address, QUESTION, CONTEXT)
    assert tab.content("#result mark") == expected["answer"]
    assert tab.content("#result .context") == CONTEXT
    assert len(tab.all("#result tbody tr")) == len(expected["nbest"])
    assert tab.texts("#result tbody tr:first-child td")[1] == f"{100 * expected['nbest'][0]['probability']:.1f}%"
    assert tab.texts("#null-odds") == [f"{expected['null_odds']:+.3f}"]
    assert str(model) in tab.content(".about")


def test_the_enter_key_asks_too(tab: Tab, address: str) -> None:
    from selenium.webdriver.common.keys import Keys

    tab.open(address)
    tab.wait_for("#question textarea, #question input")
    tab.fill("#context textarea", CONTEXT)
    tab.fill("#question textarea, #question input", QUESTION)
    tab.all("#question textarea, #question input")[0].send_keys(Keys.ENTER)
    tab.wait_for("#result mark")


def test_no_request_leaves_this_computer_and_nothing_is_wrong(tab: Tab, address: str) -> None:
    ask(tab, address, QUESTION, CONTEXT)
    requests = [url for url in tab.requests() if not url.startswith(("data:", "blob:"))]
    assert len(requests) > 3 and [url for url in requests if not url.startswith(address)] == []
    assert tab.complaints() == []


def test_wrong_input_is_a_line_in_the_page(tab: Tab, address: str) -> None:
    ask(tab, address, " ", CONTEXT)
    assert tab.texts("#result [role=alert]") == ["The question is empty: type one."]
    assert not tab.all("#result mark")


def test_markup_in_the_texts_stays_text(tab: Tab, address: str) -> None:
    context = f"{HOSTILE} {CONTEXT}"
    ask(tab, address, HOSTILE, context)
    assert tab.content("#result .context") == context
    assert not tab.all("#result img") and not tab.all("#result script") and not tab.all(".about b")
    assert tab.complaints() == []


@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("width", [400, 1200])
def test_axe_has_no_serious_finding(tab: Tab, address: str, dark: bool, width: int) -> None:
    tab.emulate(width, dark)
    ask(tab, address, QUESTION, CONTEXT)
    assert serious_findings(tab) == []
    assert tab.run("return document.documentElement.scrollWidth") <= width
