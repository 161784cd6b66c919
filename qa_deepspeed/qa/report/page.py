"""The report of an evaluation as one HTML file that needs nothing beside it, and in Markdown for TensorBoard."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any

from qa_deepspeed.qa.report.charts import figures

LOGITS_FILE, REPORT_FILE, PAGE_FILE = "logits.npz", "report.json", "report.html"


NO_ANSWER = "*no answer*"


def plain(text: str) -> str:
    """The text on one line, with nothing in it that Markdown or HTML would take for its own; "" is no answer."""
    whole = text.encode("utf-8", "replace").decode()  # halves of surrogate pairs are lost
    marked = re.sub(r"([\\`*_\[\]])", r"\\\1", " ".join(whole.split()))
    return escape(marked, quote=False) or NO_ANSWER


def question_list(questions: Iterable[tuple[str, str, Mapping[str, str]]]) -> str:
    """For each (mark, question, facts) an item: the mark and the question, below them the facts by name."""
    lines = []
    for mark, question, facts in questions:
        lines.append(f"- **{mark}** {plain(question)}")
        lines += [f"    - {name}: {fact}" for name, fact in facts.items()]
    return "\n".join(lines)


STYLE = """
body { font: 15px sans-serif; margin: 2em auto; max-width: 1120px; color: #222 }
table { border-collapse: collapse; margin: 1em 0 }
td, th { border: 1px solid #ccc; padding: 3px 8px; text-align: left; vertical-align: top }
td.number { text-align: right }
figure { display: inline-block; width: 49%; min-width: 420px; margin: 1em 0; vertical-align: top }
figure svg { width: 100%; height: auto }
"""

MISTAKE_COLUMNS = ("probability", "question", "gold", "prediction", "f1", "context", "example_id")


def page(report: Mapping[str, Any], title: str) -> str:
    """The HTML document of a report (`Analysis.report` with `metrics`). Every text of the data is escaped."""
    drawn = "".join(
        f"<figure>{figure.svg()}<figcaption>{escape(figure.title)}</figcaption></figure>\n"
        for figure in figures(report).values()
    )
    mistakes = [[_cell(mistake[name]) for name in MISTAKE_COLUMNS] for mistake in report["mistakes"]]
    return f"""<!DOCTYPE html>
<html lang="en">
<head><meta charset="utf-8"><title>{escape(title)}</title><style>{STYLE}</style></head>
<body>
<h1>{escape(title)}</h1>
<h2>Scores</h2>
{_html_table(("", "value", "95% interval"), score_rows(report))}
<h2>Figures</h2>
{drawn}
<h2>The {len(mistakes)} most confident mistakes</h2>
{_html_table(MISTAKE_COLUMNS, mistakes)}
</body>
</html>
"""


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


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.3f}"
    return (" | ".join(value) if isinstance(value, list) else str(value)) or "(no answer)"


def _html_table(names: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    head = "".join(f"<th>{escape(name)}</th>" for name in names)
    body = "\n".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f"<table>\n<tr>{head}</tr>\n{body}\n</table>"
