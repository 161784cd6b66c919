"""A headless Chromium, one for all tests of the folder; without one they are skipped."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from qa_deepspeed.qa.report.result import EvaluationResult
from tests.browser.driving import Tab
from tests.browser.pages import evaluation, write_comparison_page, write_evaluation_page, write_sweep_page

PROGRAMS = ("chromium", "chromium-browser", "google-chrome")


@pytest.fixture(scope="session")
def driver() -> Iterator[Any]:
    """Selenium's driver of the installed Chromium."""
    webdriver = pytest.importorskip("selenium.webdriver", reason="needs Selenium: pip install '.[test]'")
    program = next(filter(None, map(shutil.which, PROGRAMS)), None)
    service = shutil.which("chromedriver")
    if program is None or service is None:
        pytest.skip("needs Chromium and its driver (Debian, Ubuntu: apt install chromium chromium-driver)")
    options = webdriver.ChromeOptions()
    options.binary_location = program
    for argument in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"performance": "ALL", "browser": "ALL"})
    driver = webdriver.Chrome(options, webdriver.ChromeService(service))
    yield driver
    driver.quit()


@pytest.fixture
def tab(driver: Any) -> Iterator[Tab]:
    """A wide, light window; what a test emulates is reset."""
    tab = Tab(driver)
    tab.emulate(1200, dark=False)
    yield tab


@pytest.fixture(scope="session")
def result() -> EvaluationResult:
    """The evaluation that `report` shows."""
    return evaluation()


@pytest.fixture(scope="session")
def report(tmp_path_factory: pytest.TempPathFactory, result: EvaluationResult) -> Path:
    """report.html."""
    return write_evaluation_page(tmp_path_factory.mktemp("report"), result)


@pytest.fixture(scope="session")
def comparison(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page of two runs."""
    return write_comparison_page(tmp_path_factory.mktemp("comparison"))


@pytest.fixture(scope="session")
def sweep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page of a sweep of four runs."""
    return write_sweep_page(tmp_path_factory.mktemp("sweep"))
