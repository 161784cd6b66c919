"""The report of an evaluation as one HTML file that needs no other file, and in Markdown for TensorBoard."""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from html import escape
from importlib import resources
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from qa_deepspeed.qa.metrics.by_file import flat_metrics
from qa_deepspeed.qa.report.advice import advice
from qa_deepspeed.qa.report.charts import page_figures, svg
from qa_deepspeed.qa.report.errors import CLASSES, RIGHT
from qa_deepspeed.qa.report.questions import QuestionTable
from qa_deepspeed.qa.report.words import METRICS, SLICES, interval

LOGITS_FILE, REPORT_FILE, PAGE_FILE = "logits.npz", "report.json", "report.html"
PACKAGE = "qa_deepspeed.qa.report"
TEMPLATE, STYLE, SCRIPT = "report.html.j2", "report.css", "report.js"

NO_ANSWER = "*no answer*"


def now() -> str:
    """Date and time of day, as pages show it."""
    return datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %Z")


def page(report: Mapping[str, Any], questions: QuestionTable, title: str, about: Mapping[str, str]) -> str:
    """The HTML document of a report. Every text of the data is escaped.

    Args:
        report: the content of report.json. questions: those that the page lists. about: model, date and so on, by name.
    """
    return render(
        TEMPLATE,
        questions,
        [""],
        title=title,
        about=about,
        cards=score_cards(report),
        advice=advice(report),
        errors=_error_rows(report["errors"]),
        slices=_slice_tables(report["slices"]),
        charts=[(caption, Markup(svg(name, figure))) for name, caption, figure in page_figures(report)],
        metrics=[(METRICS.get(row[0], row[0]), *row) for row in score_rows(report)],
    )


def render(template: str, questions: QuestionTable, systems: Sequence[str], **values: Any) -> str:
    """A page with a table of questions.

    Args:
        systems: names of those whose answers are shown. values: what the template shows beside the table.
    """
    environment = Environment(loader=PackageLoader(PACKAGE, ""), autoescape=True, undefined=StrictUndefined)
    files = resources.files(PACKAGE)
    style, script = (files.joinpath(name).read_text(encoding="utf-8") for name in (STYLE, SCRIPT))
    return environment.get_template(template).render(
        style=Markup(style),
        script=Markup(script),
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        data=Markup(questions.data(systems, SLICES)),  # safe: questions.script_json
        shown=len(questions),
        total=questions.total,
        **values,
    )


def score_cards(report: Mapping[str, Any]) -> list[dict[str, str]]:
    """The scores at the top of the page: name, value, what is known of its error, and a hint what it is."""
    metrics, intervals = report["metrics"], report["intervals"]
    answerable = report["slices"].get("answerable", {})

    def card(name: str, value: float, ends: list[float] | None, hint: str) -> dict[str, str]:
        known = f"95% interval {interval(ends)}" if ends else "too few paragraphs for an interval"
        return {"name": name, "value": f"{value:.1f}", "interval": known, "hint": hint}

    macro = f"; mean of the files {metrics['macro_f1']:.1f}" if "macro_f1" in metrics else ""
    hint = f"words in common with the closest gold answer, 0 to 100{macro}"
    cards = [
        card("F1", metrics["f1"], intervals.get("f1"), hint),
        card("Exact match", metrics["exact"], intervals.get("exact"), "percent of answers equal to a gold answer"),
    ]
    if "HasAns_f1" in metrics:
        ends = answerable.get("yes", {}).get("intervals", {}).get("f1")
        hint = f"F1 of {metrics['HasAns_total']:,}; exact match {metrics['HasAns_exact']:.1f}"
        cards.append(card("Answerable questions", metrics["HasAns_f1"], ends, hint))
    if "NoAns_f1" in metrics:
        ends = answerable.get("no", {}).get("intervals", {}).get("f1")
        hint = f"percent of {metrics['NoAns_total']:,} that were left empty, as they should be"
        cards.append(card("Unanswerable questions", metrics["NoAns_f1"], ends, hint))
    return cards


def _error_rows(errors: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Classes of errors that occur, the one that costs most first."""
    rows = [
        {"key": key, "name": name, "meaning": meaning, **errors[key]}
        for key, (name, meaning) in CLASSES.items()
        if key != RIGHT and errors[key]["questions"]
    ]
    return sorted(rows, key=lambda row: -row["lost_f1"])


def _slice_tables(slices: Mapping[str, Mapping[str, Any]]) -> list[tuple[str, str, Mapping[str, Any]]]:
    """Key, name and cells of the slices that have several values."""
    return [(key, SLICES[key], cells) for key, cells in slices.items() if len(cells) > 1]


def score_rows(report: Mapping[str, Any]) -> list[list[str]]:
    """Name, value and interval of every metric."""
    rows = []
    for name, value in flat_metrics(report["metrics"]).items():
        ends = report["intervals"].get(name)
        shown = f"{value:.3f}" if isinstance(value, float) else str(value)
        rows.append([name, shown, f"{ends[0]:.2f} to {ends[1]:.2f}" if ends else ""])
    return rows


def markdown_parts(report: Mapping[str, Any]) -> dict[str, str]:
    """Scores and mistakes in Markdown, by name."""
    mistakes = (
        (
            f"{mistake['probability']:.3f}",
            mistake["question"],
            {
                "answer": plain(mistake["prediction"]),
                "gold": " / ".join(plain(gold) for gold in mistake["gold"]) or plain(""),
            },
        )
        for mistake in report["mistakes"]
    )
    named = [[METRICS.get(name, plain(name).replace("|", "\\|")), *others] for name, *others in score_rows(report)]
    rows = [["metric", "value", "95% interval"], ["---"] * 3, *named]
    scores = "\n".join(f"| {' | '.join(row)} |" for row in rows)
    return {"scores": scores, "mistakes": question_list(mistakes)}


def question_list(questions: Iterable[tuple[str, str, Mapping[str, str]]]) -> str:
    """A Markdown list: for each (mark, question, facts) the mark and the question, below them the facts by name."""
    lines = []
    for mark, question, facts in questions:
        lines.append(f"- **{mark}** {plain(question)}")
        lines += [f"    - {name}: {fact}" for name, fact in facts.items()]
    return "\n".join(lines)


def plain(text: str) -> str:
    """The text on one line, with all Markdown and HTML markup in it escaped; "" becomes `NO_ANSWER`."""
    valid = text.encode("utf-8", "replace").decode()  # replaces halves of surrogate pairs
    escaped = re.sub(r"([\\`*_\[\]])", r"\\\1", " ".join(valid.split()))
    return escape(escaped, quote=False) or NO_ANSWER
