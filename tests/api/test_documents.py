"""docs/python.md and docs/quickstart.ipynb run as they stand, on a tiny model in this process."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbclient import NotebookClient

from tests.tiny import make_data, make_model

DOCS = Path(__file__).parents[2] / "docs"


def test_the_page_on_python_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, *blocks = re.findall(r"```python\n(.*?)```", (DOCS / "python.md").read_text(), re.DOTALL)
    assert len(blocks) == 3 and set(re.findall(r"^[A-Z]+", first, re.MULTILINE)) == {
        "MODEL",
        "TRAIN",
        "SETTINGS",
    }
    model = make_model(tmp_path / "model", layers=1)
    data = make_data(tmp_path / "train.jsonl", rows=8)
    settings = {
        "runtime": "local",
        "model.path": model,
        "data.train": data,
        "data.batch_size": 2,
        "algorithm.samples_per_prompt": 2,
        "actor.generation.engine": "hf",
        "actor.generation.sampling.max_response_tokens": 5,
        "output_dir": "outputs/mine",
        "loop.resume": "never",
    }
    names: dict[str, Any] = {"MODEL": str(model), "TRAIN": str(data), "SETTINGS": settings}
    monkeypatch.chdir(tmp_path)
    for block in blocks:
        exec(compile(block, "docs/python.md", "exec"), names)
    assert names["outcome"].num_steps == 2
    for name in ("model", "by_hand"):
        assert (tmp_path / "outputs" / "mine" / name / "model.safetensors").is_file()
    lines = blocks[2].splitlines()
    assert len([line for line in lines if line.strip()]) < 50


def test_the_notebook_runs_and_learns() -> None:
    notebook = nbformat.read(DOCS / "quickstart.ipynb", as_version=4)
    assert not any(cell.get("outputs") for cell in notebook.cells), "stored without outputs"
    before = os.environ.get("PYTHONPATH", "")
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(DOCS.parent), before]))
    try:
        NotebookClient(notebook, timeout=800, kernel_name="python3").execute()
    finally:
        os.environ["PYTHONPATH"] = before
    printed = "".join(
        output["text"]
        for cell in notebook.cells
        for output in cell.get("outputs", [])
        if "text" in output
    )
    first, last = map(float, re.search(r"([\d.]+) -> ([\d.]+)", printed).groups())  # type: ignore[union-attr]
    assert last > first + 0.3, printed
    figures = [
        output
        for cell in notebook.cells
        for output in cell.get("outputs", [])
        if "image/png" in output.get("data", {})
    ]
    assert len(figures) == 1
