"""docs/images.md: the commands to try the page with are run as they stand there, each in a process of its
own."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "images.md").read_text()


@pytest.mark.slow
def test_the_commands_to_try(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    section = PAGE.partition("to try this page with")[2].partition("\n## ")[0]
    commands = re.findall(r"^    python (.*)$", section.replace("\\\n", " "), re.MULTILINE)
    assert len(commands) == 2
    for command in commands:
        arguments = [sys.executable, *shlex.split(command)]
        subprocess.run(arguments, cwd=tmp_path, check=True, timeout=300)
    lines = (tmp_path / "outputs" / "shapes" / "metrics.jsonl").read_text().splitlines()
    metrics = [json.loads(line) for line in lines]
    gaps = [row["actor/log_prob_gap_max"] for row in metrics if row.get("split") == "train"]
    assert len(gaps) == 3
    assert max(gaps) < 1e-5
