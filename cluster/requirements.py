"""Prints what pyproject.toml asks for, one requirement a line: `python cluster/requirements.py
vllm-cpu deepspeed dev`.

So that an environment (a venv, an image) gets the dependencies without a copy of the packages
themselves. Standard library only: it runs before anything is installed.
"""

from __future__ import annotations

import sys
import tomllib
from pathlib import Path


def requirements(pyproject: Path, extras: list[str]) -> list[str]:
    """The project's dependencies, then those of `extras`."""
    project = tomllib.loads(pyproject.read_text())["project"]
    optional: dict[str, list[str]] = project["optional-dependencies"]
    unknown = [extra for extra in extras if extra not in optional]
    if unknown:
        raise ValueError(f"extras: unknown {unknown}; known: {', '.join(optional)}")
    lines: list[str] = list(project["dependencies"])
    for extra in extras:
        lines += optional[extra]
    return lines


if __name__ == "__main__":
    print(*requirements(Path(__file__).parents[1] / "pyproject.toml", sys.argv[1:]), sep="\n")
