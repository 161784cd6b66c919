"""report.html in headless Chromium: filters, sorting, opening a row, themes, narrow screens, accessibility."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from qa_deepspeed.qa.report.page import page
from qa_deepspeed.qa.report.result import EvaluationResult
from tests.browser.driving import Tab, serious_findings
from tests.unit.qa.report.reports import HOSTILE, hostile_result

pytestmark = pytest.mark.browser

QUESTION, ANSWER, OUTCOME, CONFIDENCE, F1, FILE = 1, 3, 4, 5, 6, 7


@pytest.fixture(scope="module")
def rows(result: EvaluationResult) -> list[dict[str, Any]]:
    """What the page's data say of each question, in words."""
    data = json.loads(result.questions.data([""], {}))
    found = []
    for _, question, context, _, outcome, answers, slices, file, _ in data["rows"]:
        span, confidence, f1, _ = answers[0]
        shown = data["contexts"][context]
        text = span if isinstance(span, str) else shown[span[0] : span[0] + span[1]]
        words = [data["words"][one] for one in slices]
        row = {"question": question, "answer": text, "outcome": data["outcomes"][outcome][0], "file": file}
        found.append(row | {"confidence": confidence, "f1": f1, "slices": words, "name": data["words"][file][1:]})
    return found


def count_shown(tab: Tab) -> int:
    """The number of questions that the filters leave, as the page says it."""
    (status,) = tab.texts("#status")
    return int(status.split(" of ")[-1].split(" ")[0].replace(",", ""))


def test_no_request_leaves_the_page_and_nothing_is_wrong(tab: Tab, report: Path) -> None:
    tab.open(report)
    tab.click(".open")
    assert tab.requests() == [report.as_uri()]
    assert tab.complaints() == []


def test_each_filter_leaves_what_it_says(tab: Tab, report: Path, rows: list[dict[str, Any]]) -> None:
    tab.open(report)
    assert count_shown(tab) == len(rows) == 200
    for outcome, name in (("boundary", "Boundary"), ("missed", "Missed"), ("right", "Right")):
        tab.choose("#outcome", name)
        assert count_shown(tab) == sum(row["outcome"] == outcome for row in rows) > 0
        assert set(tab.column(OUTCOME)) == {name}
    tab.click("#filters button[type=reset]")
    tab.choose("#slice", "how many")
    assert count_shown(tab) == sum("question_word=how many" in row["slices"] for row in rows) == 40
    tab.choose("#file", "wiki.json")
    assert count_shown(tab) == 20 and set(tab.column(FILE)) == {"wiki.json"}
    tab.type("#least", "50")
    tab.type("#most", "80.5")
    both = [row for row in rows if row["name"] == "wiki.json" and "question_word=how many" in row["slices"]]
    assert count_shown(tab) == sum(0.5 <= row["confidence"] <= 0.805 for row in both) > 0
    tab.click("#filters button[type=reset]")
    tab.type("#search", "NUMBER 17?")
    assert tab.column(QUESTION) == ["When is number 17?"]
    tab.type("#search", "nowhere to be found")
    assert tab.texts("#status") == ["Questions 0 (200 without filters)"] and tab.column(QUESTION) == []


@pytest.mark.parametrize(("column", "key"), [(CONFIDENCE, "confidence"), (F1, "f1"), (QUESTION, "question")])
def test_columns_sort_in_both_directions(
    tab: Tab, report: Path, rows: list[dict[str, Any]], column: int, key: str
) -> None:
    tab.open(report)
    tab.choose("#outcome", "Boundary")
    values = [row[key] for row in rows if row["outcome"] == "boundary"]
    assert 3 < len(values) <= 50
    directions = []
    for _ in range(2):
        tab.click(f"#table thead th:nth-child({column}) button")
        directions.append(tab.all(f"#table thead th:nth-child({column})")[0].get_attribute("aria-sort"))
        down = directions[-1] == "descending"
        shown = tab.column(column)
        if key == "question":
            numbers = [(words.split(" is ")[0], int(words.split(" ")[-1][:-1])) for words in values]
            in_order = [f"{word} is number {number}?" for word, number in sorted(numbers, reverse=down)]
            assert shown == in_order
        else:
            assert [float(text.rstrip("%")) for text in shown] == pytest.approx(
                sorted((100 * value for value in values), reverse=down), abs=0.51
            )
    assert sorted(directions) == ["ascending", "descending"]
    assert len(tab.all("#table thead [aria-sort]")) == 1


def test_the_surest_mistakes_come_first(tab: Tab, report: Path, rows: list[dict[str, Any]]) -> None:
    tab.open(report)
    first = sorted(rows, key=lambda row: (row["f1"], -row["confidence"]))[:50]
    assert tab.column(QUESTION) == [row["question"] for row in first]


def test_a_row_opens_to_its_context_with_spans_and_candidates(tab: Tab, report: Path) -> None:
    """In contexts with and without letters of two UTF-16 units: places count characters."""
    tab.open(report)
    tab.choose("#outcome", "Boundary")
    units = set()
    for number in range(1, 9):
        row = f"#table tbody tr:nth-child({number})"
        assert tab.all(f"{row} .open")[0].get_attribute("aria-expanded") == "false"
        tab.click(f"{row} .open")
        button = tab.all(f"{row} .open")[0]
        assert button.get_attribute("aria-expanded") == "true"
        detail = f"#{button.get_attribute('aria-controls')}"
        units.add(tab.content(f"{detail} .context").startswith("😀"))
        assert tab.content(f"{detail} .context mark.gold") == "Ann Lee"
        assert tab.content(f"{detail} .context mark.first") == tab.column(ANSWER)[number - 1]
        probabilities = [float(text.rstrip("%")) for text in tab.texts(f"{detail} table td:first-child")]
        assert len(probabilities) == 3 and f"{probabilities[0]:.1f}%" == tab.column(CONFIDENCE)[number - 1]
        tab.click(f"{row} .open")
        assert tab.all(f"{row} .open")[0].get_attribute("aria-expanded") == "false" and not tab.all(".detail")
    assert units == {True, False}


def test_the_keyboard_opens_sorts_and_turns_pages(tab: Tab, report: Path) -> None:
    from selenium.webdriver.common.keys import Keys

    tab.open(report)
    tab.all("#search")[0].send_keys(Keys.TAB)
    reached = set()
    for _ in range(30):
        focused = tab.driver.switch_to.active_element
        reached.add(focused.get_attribute("id") or focused.get_attribute("class") or focused.tag_name)
        if focused.get_attribute("class") == "open":
            focused.send_keys(Keys.ENTER)
            break
        focused.send_keys(Keys.TAB)
    assert len(tab.all(".detail")) == 1
    assert {"outcome", "slice", "file", "least", "most", "button", "open"} <= reached
    tab.all("#next")[0].send_keys(Keys.ENTER)
    assert tab.texts("#page") == ["Page 2 of 4"] and tab.texts("#status") == ["Questions 51 to 100 of 200"]
    assert tab.driver.switch_to.active_element.get_attribute("id") == "questions"
    tab.click("#previous")
    assert tab.texts("#page") == ["Page 1 of 4"] and not tab.all("#previous")[0].is_enabled()


def test_the_classes_of_errors_lead_to_their_questions(tab: Tab, report: Path, result: EvaluationResult) -> None:
    tab.open(report)
    (button, *_) = tab.all("[data-outcome]")
    outcome = button.get_attribute("data-outcome")
    tab.type("#search", "this is cleared")
    tab.click("[data-outcome]")
    assert count_shown(tab) == result.report["errors"][outcome]["questions"]
    assert tab.all("#outcome")[0].get_property("value") == outcome


def luminance(colour: str) -> float:
    """Of a colour as rgb(r, g, b), 0 to 255, roughly."""
    return sum(float(part) for part in colour.split("(")[1].split(")")[0].split(",")[:3]) / 3


def test_dark_and_light_follow_the_system(tab: Tab, report: Path) -> None:
    tab.open(report)
    seen = {}
    for dark in (False, True):
        tab.emulate(1200, dark)
        style = "const style = getComputedStyle(document.body); return [style.backgroundColor, style.color]"
        seen[dark] = [luminance(colour) for colour in tab.run(style)]
        drawn = "return getComputedStyle(document.querySelector('figure svg text')).fill"
        assert abs(luminance(tab.run(drawn)) - seen[dark][0]) > 120, "text in charts stands out"
    assert seen[False][0] > 240 > 60 > seen[False][1] and seen[True][0] < 30 < 200 < seen[True][1]


@pytest.mark.parametrize("name", ["report", "comparison", "sweep"])
@pytest.mark.parametrize("width", [320, 400, 1200])
def test_nothing_is_cut_off(tab: Tab, name: str, width: int, request: pytest.FixtureRequest) -> None:
    tab.emulate(width, dark=False)
    tab.open(request.getfixturevalue(name))
    for summary in tab.all("summary"):
        summary.click()
    tab.click(".open")
    too_wide = """return [...document.querySelectorAll('body *')].filter(e => !e.closest('.unseen, .skip, svg *') &&
        e.getBoundingClientRect().right > arguments[0] + 1).map(e => e.outerHTML.slice(0, 80))"""
    assert tab.run(too_wide, width) == []
    assert tab.run("return document.documentElement.scrollWidth") <= width
    columns = tab.run("return [...document.querySelectorAll('#table thead th')].map(e => e.offsetWidth)")
    assert columns[0] >= 0.25 * width and all(column == 0 or column >= 28 for column in columns)
    charts = "return [...document.querySelectorAll('figure svg')].map(e => e.getBoundingClientRect().width)"
    assert all(250 < chart <= width for chart in tab.run(charts))


@pytest.mark.parametrize("name", ["report", "comparison", "sweep"])
@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("width", [400, 1200])
def test_axe_has_no_serious_finding(
    tab: Tab, name: str, dark: bool, width: int, request: pytest.FixtureRequest
) -> None:
    tab.emulate(width, dark)
    tab.open(request.getfixturevalue(name))
    for summary in tab.all("summary"):
        summary.click()
    tab.click(".open")
    assert serious_findings(tab) == []


def test_markup_in_the_data_stays_text(tab: Tab, tmp_path: Path) -> None:
    result = hostile_result()
    document = page(result.report, result.questions, f"Evaluation of {HOSTILE}", {"Model": HOSTILE, "Command": HOSTILE})
    path = tmp_path / "report.html"
    path.write_text(document, "utf-8", errors="xmlcharrefreplace")
    tab.open(path)
    tab.type("#search", "q7<")
    tab.click(".open")
    assert len(tab.all("script")) == 2 and tab.complaints() == []
    assert tab.content(".detail .context") == f"right or {HOSTILE} 1"
    assert tab.content(".detail code") == f"q7{HOSTILE}" and tab.content("h1") == f"Evaluation of {HOSTILE}"


def test_two_runs_show_what_is_won_and_lost(tab: Tab, comparison: Path) -> None:
    tab.open(comparison)
    assert tab.requests() == [comparison.as_uri()] and tab.complaints() == []
    changes = tab.column(6)
    assert changes[:12].count("+100") == 8 and changes[:12].count("-100") == 4 and set(changes[12:]) == {"0"}
    tab.choose("#outcome", "Lost by large")
    assert tab.texts("#status") == ["Questions 1 to 4 of 4 (40 without filters)"]
    tab.click(".open")
    assert tab.content(".detail mark.gold.first") == "Ann Lee"
    terms = tab.texts(".detail dt")
    assert terms[:3] == ["Gold", "small", "large"] and tab.texts(".detail dd")[2].startswith("no answer (F1 0")


def test_a_sweep_shows_where_its_runs_disagree(tab: Tab, sweep: Path) -> None:
    """Twelve questions are right in all runs, four in none."""
    tab.open(sweep)
    assert tab.requests() == [sweep.as_uri()] and tab.complaints() == []
    link = "return [...document.querySelectorAll('main a')].map(e => e.getAttribute('href'))"
    assert tab.run(link)[0] == "learning_rate-1e-05_seed-1/report.html"
    counts = (
        "return [...document.querySelectorAll('[aria-labelledby=agreement-title] td.number')].map(e => e.innerText)"
    )
    assert tab.run(counts) == ["24", "4", "12"]
