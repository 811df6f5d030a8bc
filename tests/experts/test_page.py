"""docs/experts.md: the mixture to try is made, and its run would start."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from recipes.preparation import dry_run_report, prepare
from recipes.python_settings import make_settings

PAGE = (Path(__file__).parents[2] / "docs" / "experts.md").read_text()


def test_the_mixture_to_try(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    section = PAGE.partition("## A mixture to try")[2].partition("\n## ")[0]
    (code,) = re.findall(r"```python\n(.*?)```", section, re.DOTALL)
    exec(compile(code, "docs/experts.md", "exec"), {})
    (command,) = re.findall(r"^    python -m (.*)$", section.replace("\\\n", " "), re.MULTILINE)
    recipe, *arguments = shlex.split(command)
    report = dry_run_report(prepare(make_settings(recipe.removeprefix("recipes."), arguments)))
    assert "ep2" in report.replace("ep=2", "ep2")
