"""What a reader does with a page, in a few words."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

SETTLED = "return new Promise(done => setTimeout(() => requestAnimationFrame(() => done(true))))"
"""Events that the page handles later, such as the reset of a form, are done."""

FILL = """
const [field, text] = arguments;
Object.getOwnPropertyDescriptor(Object.getPrototypeOf(field), 'value').set.call(field, text);
field.dispatchEvent(new Event('input', {bubbles: true}));
"""
"""Set a field's value as typing does: scripts get the event."""


class Tab:
    """The browser's tab with a page of ours."""

    def __init__(self, driver: Any) -> None:
        self.driver = driver

    def open(self, page: Path | str) -> None:
        """Load a file or an address; earlier log entries are dropped."""
        for log in ("performance", "browser"):
            self.driver.get_log(log)
        self.driver.get(page.as_uri() if isinstance(page, Path) else page)

    def wait_for(self, selector: str, seconds: float = 60) -> None:
        """Wait until an element of a selector is shown; TimeoutException where none comes."""
        from selenium.webdriver.support.wait import WebDriverWait

        WebDriverWait(self.driver, seconds).until(lambda _: any(one.is_displayed() for one in self.all(selector)))

    def emulate(self, width: int, dark: bool) -> None:
        """A screen of this many pixels, and a preference for dark or light."""
        screen = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 600}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", screen)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [scheme]})

    def run(self, script: str, *arguments: Any) -> Any:
        """The value that a script returns."""
        return self.driver.execute_script(script, *arguments)

    def all(self, selector: str) -> list[Any]:
        """The elements of a CSS selector."""
        found: list[Any] = self.driver.find_elements("css selector", selector)
        return found

    def texts(self, selector: str) -> list[str]:
        """The visible texts of a CSS selector's elements."""
        return [element.text for element in self.all(selector)]

    def content(self, selector: str) -> str:
        """The text in a selector's elements, blanks as they are."""
        content: str = self.run(
            "return [...document.querySelectorAll(arguments[0])].map(e => e.textContent).join('')", selector
        )
        return content

    def click(self, selector: str) -> None:
        """Click the first element of a selector."""
        (element, *_) = self.all(selector)
        self.run("arguments[0].scrollIntoView({block: 'center'})", element)
        element.click()
        self.run(SETTLED)

    def type(self, selector: str, text: str) -> None:
        """Replace what stands in a field."""
        (field,) = self.all(selector)
        field.clear()
        field.send_keys(text)

    def fill(self, selector: str, text: str) -> None:
        """Replace what stands in a field at once; characters beyond the BMP, which `type` refuses, are taken too."""
        (field,) = self.all(selector)
        self.run(FILL, field, text)

    def choose(self, selector: str, label: str) -> None:
        """Choose the option of a list whose text begins with `label`."""
        from selenium.webdriver.support.select import Select

        chooser = Select(self.all(selector)[0])
        chooser.select_by_visible_text(next(one.text for one in chooser.options if one.text.strip().startswith(label)))

    def column(self, number: int) -> list[str]:
        """The texts of a column of the table of questions, on the page of the table that is shown."""
        return self.texts(f"#table tbody tr > :nth-child({number})")

    def requests(self) -> list[str]:
        """The addresses that the page has asked for since it was opened."""
        messages = [json.loads(entry["message"])["message"] for entry in self.driver.get_log("performance")]
        return [one["params"]["request"]["url"] for one in messages if one["method"] == "Network.requestWillBeSent"]

    def complaints(self) -> list[str]:
        """Errors and warnings of the browser's console."""
        return [entry["message"] for entry in self.driver.get_log("browser")]


def serious_findings(tab: Tab) -> list[tuple[str, list[str]]]:
    """The rules of axe-core that the open page breaks seriously, each with the first elements that do.

    Without axe-core the test is skipped.
    """
    axe = pytest.importorskip("axe_core_python", reason="needs axe-core: pip install '.[test]'")
    tab.run((Path(axe.__file__).parent / "axe.min.js").read_text("utf-8"))
    found = tab.run("return axe.run()")
    assert len(found["passes"]) > 20
    return [
        (one["id"], [node["html"][:120] for node in one["nodes"][:3]])
        for one in found["violations"]
        if one["impact"] in ("serious", "critical")
    ]
