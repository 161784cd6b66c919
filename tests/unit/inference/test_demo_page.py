"""What the page of `demo` shows: the marked answer, n-best and null odds; wrong input and text of strangers."""

from __future__ import annotations

import copy
import html
import re
import socket
import sys
from typing import Any

import pytest
import torch

from qa_deepspeed import QuestionAnswerer
from qa_deepspeed.cli.main import main
from qa_deepspeed.inference.demo_page import MOST_CHARACTERS, N_BEST_SIZE, answer_as_html, free_port
from qa_deepspeed.utils.errors import UserError
from tests.unit.inference.test_answerer import CONTEXT, QUESTION, answerer

HOSTILE = "<img src=x onerror=alert(1)> {{ 7 * 7 }} ${7 * 7} &amp; </div><script>alert(2)</script>"


def texts(shown: str, tag: str) -> list[str]:
    """The texts of the elements of a tag."""
    return [
        html.unescape(re.sub("<[^>]*>", "", one)) for one in re.findall(rf"<{tag}\b[^>]*>(.*?)</{tag}>", shown, re.S)
    ]


def problem_of(question: str | None, context: str | None) -> str:
    """The one line of what is wrong with the input."""
    shown = answer_as_html(answerer("bert"), question, context)
    (line,) = texts(shown, "p")
    assert 'role="alert"' in shown and "<mark" not in shown and "<table" not in shown
    return line


def test_the_answer_is_marked_in_its_context() -> None:
    expected = answerer("bert")(QUESTION, CONTEXT, n_best_size=N_BEST_SIZE)
    shown = answer_as_html(answerer("bert"), QUESTION, CONTEXT)
    assert texts(shown, "mark") == [expected["answer"]] != [""]
    (context,) = texts(shown, "div")
    assert context == CONTEXT
    before = shown.split('<div class="context">')[1].split("<mark>")[0]
    assert len(html.unescape(before)) == expected["start"]


def test_n_best_and_null_odds_are_those_of_the_answerer() -> None:
    expected = answerer("bert")(QUESTION, CONTEXT, n_best_size=N_BEST_SIZE)
    shown = answer_as_html(answerer("bert"), QUESTION, CONTEXT)
    cells = texts(shown, "td")
    rows = [(entry["text"] or "no answer", f"{100 * entry['probability']:.1f}%") for entry in expected["nbest"]]
    assert list(zip(cells[::2], cells[1::2], strict=True)) == rows
    assert len(rows) > N_BEST_SIZE and ("no answer" in cells)
    assert texts(shown, "strong")[-1] == f"{expected['null_odds']:+.3f}"


def test_no_answer_is_said_in_words(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the model may answer nothing, and its threshold says so."""
    qa = answerer("bert")
    monkeypatch.setattr(qa, "threshold", -1e6)
    shown = answer_as_html(qa, QUESTION, CONTEXT)
    assert "<mark" not in shown and texts(shown, "strong")[0] == "No answer"
    assert texts(shown, "div") == [CONTEXT]


@pytest.mark.parametrize("empty", [None, "", " \n\t"])
def test_an_empty_field_is_one_line(empty: str | None) -> None:
    assert problem_of(empty, CONTEXT) == "The question is empty: type one."
    assert problem_of(QUESTION, empty) == "The context is empty: type one."


@pytest.mark.parametrize("name", MOST_CHARACTERS)
def test_a_text_that_is_too_long_is_one_line(name: str) -> None:
    given = {"question": QUESTION, "context": CONTEXT, name: "a " * MOST_CHARACTERS[name]}
    most = MOST_CHARACTERS[name]
    assert problem_of(**given) == f"The {name} has {2 * most:,} characters: shorten it to {most:,}."


def test_what_the_answerer_refuses_is_one_line() -> None:
    model = copy.deepcopy(answerer("bert").model)
    torch.nn.init.constant_(model.qa_outputs.bias, float("nan"))
    shown = answer_as_html(QuestionAnswerer(model, answerer("bert").tokenizer, device="cpu"), QUESTION, CONTEXT)
    assert "the model&#39;s logits are infinite or NaN" in shown and "<table" not in shown


@pytest.mark.parametrize("odd", ["\u200b", "\x00", "\ud83d", "\u202e", "🙂", "a\ud83d b", "\ufeff", "́"])
def test_odd_characters_are_answered_or_refused_in_one_line(odd: str) -> None:
    for given in ((odd, CONTEXT), (QUESTION, odd), (odd, odd)):
        shown = answer_as_html(answerer("bert"), *given)
        shown.encode("utf-8")
        assert ("problem" in shown) != ("null-odds" in shown)


def test_markup_in_the_texts_stays_text() -> None:
    for context in (HOSTILE, f"{CONTEXT} {HOSTILE}", f"{HOSTILE} {CONTEXT}"):
        shown = answer_as_html(answerer("bert"), HOSTILE, context)
        assert "<img" not in shown and "<script" not in shown and "49" not in shown
        assert texts(shown, "div") == [context]


def run_demo(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The one line of a `demo` that cannot start."""
    with pytest.raises(SystemExit) as ended:
        main(["demo", *arguments])
    error = capsys.readouterr().err
    assert ended.value.code == 2 and error.count("\n") == 1
    return error


def test_without_gradio_the_extra_is_named(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gradio", None)
    monkeypatch.setenv("GRADIO_ANALYTICS_ENABLED", "True")
    assert "demo needs gradio, which is not installed: pip install 'qa_deepspeed[demo]'" in run_demo(capsys, "model")


@pytest.mark.parametrize("port", ["0", "65536", "-1"])
def test_a_port_that_cannot_be_is_one_line(port: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert f"--port {port}: pass a number from 1 to 65535" in run_demo(capsys, "model", f"--port={port}")


def test_a_port_that_is_taken_is_passed_over_or_refused() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port: int = taken.getsockname()[1]
        assert port < free_port("127.0.0.1", range(port, port + 50)) < port + 50
        with pytest.raises(UserError, match=f"--host 127.0.0.1, port {port}: Address already in use; choose another"):
            free_port("127.0.0.1", range(port, port + 1))


@pytest.mark.parametrize("host", ["no.such.host.invalid", "x" * 300, "192.0.2.1"])
def test_a_host_that_is_not_here_is_one_line(host: str) -> None:
    with pytest.raises(UserError, match=f"--host {host}") as caught:
        free_port(host, range(7860, 7861))
    assert "\n" not in str(caught.value)


def test_the_usage_statistics_of_gradio_are_off_before_it_is_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    import builtins
    import os

    from qa_deepspeed.inference.demo_page import require_gradio

    monkeypatch.setenv("GRADIO_ANALYTICS_ENABLED", "True")
    original = builtins.__import__
    seen: list[str] = []

    def watch(name: str, *others: Any) -> Any:
        if name == "gradio":
            seen.append(os.environ["GRADIO_ANALYTICS_ENABLED"])
            raise ImportError
        return original(name, *others)

    monkeypatch.setattr(builtins, "__import__", watch)
    with pytest.raises(UserError, match="demo needs gradio"):
        require_gradio()
    assert seen == ["False"]
