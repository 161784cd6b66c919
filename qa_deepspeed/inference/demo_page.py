"""The page of `qa-deepspeed demo`: question and context in, the answer in its context and the n-best list out.

Questions, contexts and answers are text of strangers: the template escapes all of it.
"""

from __future__ import annotations

import os
import socket
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined, Template
from markupsafe import escape

from qa_deepspeed.inference.answerer import QuestionAnswerer
from qa_deepspeed.utils.errors import UserError

TITLE = "Question answering"

N_BEST_SIZE = 10
"""Spans that the page lists."""

MOST_CHARACTERS = {"question": 1_000, "context": 100_000}
"""Longest texts that are answered; the context takes a forward pass for each of its windows."""

MOST_WAITING = 32
"""Questions that wait for the one that is answered; further ones are turned away."""

PORTS = range(7860, 7960)
"""Ports that are tried where none is given: those of gradio."""


def require_gradio() -> Any:
    """The gradio package, which sends no usage statistics.

    Raises:
        UserError: it is not installed.
    """
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read at import
    try:
        import gradio
    except ImportError:
        raise UserError("demo needs gradio, which is not installed: pip install 'qa_deepspeed[demo]'") from None
    return gradio


def answer_as_html(answerer: QuestionAnswerer, question: str | None, context: str | None) -> str:
    """The answer marked in the context, the n-best list with probabilities, and the null odds, as HTML.

    Input that cannot be answered gives one line that says why.
    """
    texts = {"question": _valid(question), "context": _valid(context)}
    problem = _problem(texts)
    if problem is None:
        try:
            found = answerer(
                question=texts["question"], context=texts["context"], n_best_size=N_BEST_SIZE, progress=False
            )
        except UserError as error:
            problem = str(error)
    if problem is not None:
        return _template().render(problem=problem)
    start, end = found["start"], found["end"]
    parts = texts["context"][:start], texts["context"][start:end], texts["context"][end:]
    return _template().render(
        problem=None, answer=found["answer"], parts=parts, nbest=found["nbest"], null_odds=found["null_odds"]
    )


def _valid(text: str | None) -> str:
    """The text of a field; halves of surrogate pairs, which no tokenizer takes, become question marks."""
    return (text or "").encode("utf-8", "replace").decode()


def _problem(texts: dict[str, str]) -> str | None:
    """What is wrong with the input, or None."""
    for name, most in MOST_CHARACTERS.items():
        if not texts[name].strip():
            return f"The {name} is empty: type one."
        if len(texts[name]) > most:
            return f"The {name} has {len(texts[name]):,} characters: shorten it to {most:,}."
    return None


@cache
def _template() -> Template:
    loader = PackageLoader("qa_deepspeed.inference", "")
    environment = Environment(loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True)
    return environment.get_template("demo.html.j2")


def demo_page(gradio: Any, answerer: QuestionAnswerer, model: str) -> Any:
    """The page as a `gradio.Blocks`, not served yet.

    Args:
        gradio: the package, from `require_gradio`.
        model: the name that the page shows.
    """
    about = f"<h1>{TITLE}</h1><p class='about'>{escape(model)}: {escape(answerer.describe())}</p>"
    with gradio.Blocks(title=TITLE, analytics_enabled=False) as page:
        gradio.HTML(about)
        question = gradio.Textbox(label="Question", elem_id="question", max_lines=1)
        context = gradio.Textbox(label="Context", elem_id="context", lines=8, max_lines=20)
        button = gradio.Button("Answer", elem_id="answer", variant="primary")
        result = gradio.HTML(elem_id="result")
        gradio.on(
            [button.click, question.submit],
            lambda *texts: answer_as_html(answerer, *texts),
            inputs=[question, context],
            outputs=result,
            api_visibility="private",
        )
    page.queue(max_size=MOST_WAITING)
    return page


def serve(gradio: Any, page: Any, host: str, port: int | None) -> str:
    """Serve the page from threads of this process; returns its address.

    It loads nothing from elsewhere, has no link through gradio's servers, and takes no files.

    Args:
        port: None for the first free one of `PORTS`.
    Raises:
        UserError: the address cannot be listened on.
    """
    port = free_port(host, PORTS if port is None else range(port, port + 1))
    local = "localhost" if host == "0.0.0.0" else host
    for name in ("no_proxy", "NO_PROXY"):  # gradio asks its own server whether it is up
        os.environ[name] = ",".join(filter(None, [os.environ.get(name), local]))
    system = gradio.themes.Default(primary_hue="blue", font=["system-ui", "sans-serif"], font_mono=["monospace"])
    try:
        _, address, _ = page.launch(
            server_name=f"[{host}]" if ":" in host else host,
            server_port=port,
            share=False,
            mcp_server=False,
            ssr_mode=False,
            pwa=False,
            enable_monitoring=False,
            run_history=False,
            footer_links=[],
            max_file_size=1,
            inline=False,
            quiet=True,
            prevent_thread_lock=True,
            theme=system,
            css_paths=Path(__file__).with_name("demo.css"),
        )
    except (OSError, ValueError) as error:
        raise UserError(f"the page cannot be served on {host}, port {port}: {error}") from None
    return str(address)


def free_port(host: str, ports: range) -> int:
    """The first of the ports on which this host can be listened on.

    Raises:
        UserError: none of them can be, or there is no such host.
    """
    try:
        family, *_, address = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)[0]
    except (OSError, UnicodeError) as error:
        raise UserError(f"--host {host}: {getattr(error, 'strerror', None) or 'is no name of a host'}") from None
    for port in ports:
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((address[0], port, *address[2:]))
                return port
            except OSError as error:
                problem = error.strerror
    tried = f"port {ports[0]}" if len(ports) == 1 else f"ports {ports[0]} to {ports[-1]}"
    raise UserError(f"--host {host}, {tried}: {problem}; choose another --port or --host")
