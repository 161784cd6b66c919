"""launch/examples/notebook.ipynb, executed as it is: by a Jupyter kernel, and its cells in a plain Python process."""

import importlib.util
import json
import os
import sys
from pathlib import Path

import pytest

from tests.distributed.launching import environment, run
from tests.paths import REPOSITORY

pytestmark = pytest.mark.distributed

NOTEBOOK = REPOSITORY / "launch/examples/notebook.ipynb"
CELL_SECONDS = 300
"""Most that a cell may take."""

needs_jupyter = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("nbclient", "nbformat", "ipykernel")),
    reason="no Jupyter kernel: pip install nbclient nbformat ipykernel (extra [test])",
)


def cells() -> list[str]:
    """The code of the notebook's cells."""
    found = json.loads(NOTEBOOK.read_text())["cells"]
    return ["".join(cell["source"]) for cell in found if cell["cell_type"] == "code"]


def scores(folder: Path) -> tuple[int, list[float]]:
    """What the notebook's run left: questions, and F1 of each evaluation."""
    lines = [json.loads(line) for line in (folder / "runs/notebook/run/metrics.jsonl").read_text().splitlines()]
    total: int = json.loads((folder / "runs/notebook/run/metrics.json").read_text())["total"]
    return total, [line["eval/f1"] for line in lines if "eval/f1" in line]


def test_the_cells_run_in_plain_python(tmp_path: Path) -> None:
    done = run([sys.executable, "-c", "\n".join(cells())], tmp_path)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "option 'learning_rate' in the arguments must be a number, not 'high'" in done.stdout
    total, f1 = scores(tmp_path)
    assert total > 50 and len(f1) == 2


@pytest.mark.slow
@needs_jupyter
def test_the_notebook_runs_in_a_kernel(tmp_path: Path) -> None:
    """Cells show what the objects are; the stored notebook has no output."""
    import nbclient
    import nbformat

    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    assert not any(cell.outputs for cell in notebook.cells if cell.cell_type == "code")
    settings = environment(PYTHONPATH=os.pathsep.join([str(REPOSITORY), os.environ.get("PYTHONPATH", "")]))
    client = nbclient.NotebookClient(notebook, timeout=CELL_SECONDS, resources={"metadata": {"path": str(tmp_path)}})
    client.execute(env=settings)
    shown = {
        cell.id: "".join(out.data["text/plain"] for out in cell.outputs if "data" in out)
        for cell in notebook.cells
        if cell.cell_type == "code"
    }
    total, f1 = scores(tmp_path)
    assert shown["make-options"].startswith("RunOptions(") and "max_steps=60" in shown["make-options"]
    assert shown["train"].startswith("RunResult(runs/notebook/run: EM ") and f"questions {total}" in shown["train"]
    assert f"F1 {f1[-1]:.2f}" in shown["evaluate"]
    assert "'answer': " in shown["ask"]
