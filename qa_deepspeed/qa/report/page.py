"""The report of an evaluation as one HTML file that needs no other file, and in Markdown for TensorBoard."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from html import escape
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from qa_deepspeed.qa.report.charts import figures, svg

LOGITS_FILE, REPORT_FILE, PAGE_FILE = "logits.npz", "report.json", "report.html"
TEMPLATE = "report.html.j2"

NO_ANSWER = "*no answer*"
MISTAKE_COLUMNS = ("probability", "question", "gold", "prediction", "f1", "context", "example_id")


def page(report: Mapping[str, Any], title: str) -> str:
    """The HTML document of a report (`Analysis.report` with `metrics`). Every text of the data is escaped."""
    environment = Environment(
        loader=PackageLoader("qa_deepspeed.qa.report", ""), autoescape=True, undefined=StrictUndefined
    )
    return environment.get_template(TEMPLATE).render(
        title=title,
        scores=score_rows(report),
        charts=[svg(name, figure) for name, figure in figures(report).items()],
        mistake_columns=MISTAKE_COLUMNS,
        mistakes=[[_cell(mistake[name]) for name in MISTAKE_COLUMNS] for mistake in report["mistakes"]],
    )


def score_rows(report: Mapping[str, Any]) -> list[list[str]]:
    """Name, value and interval of every metric."""
    rows = []
    for name, value in report["metrics"].items():
        interval = report["intervals"].get(name)
        rows.append([name, _cell(value), f"{interval[0]:.2f} to {interval[1]:.2f}" if interval else ""])
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
    rows = [["metric", "value", "95% interval"], ["---"] * 3, *score_rows(report)]
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


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.3f}"
    return (" | ".join(value) if isinstance(value, list) else str(value)) or "(no answer)"
