"""The list of fixes that are taken back (benchmarks/rehearsal/reverts.py) follows the code and its tests;
taking them back takes twenty minutes."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest

from benchmarks.rehearsal.__main__ import CASES
from benchmarks.rehearsal.memory_cases import LAYERS
from benchmarks.rehearsal.reverts import REVERTS, Revert

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("revert", REVERTS, ids=lambda revert: revert.finding)
def test_the_fix_and_its_test_are_there(revert: Revert) -> None:
    """pytest calls a selection without tests neither a failure nor a success."""
    assert (ROOT / revert.file).read_text().count(revert.fix) == 1
    file, _, function = next(
        word for word in shlex.split(revert.test) if word.startswith("tests/")
    ).partition("::")
    text = (ROOT / file).read_text()
    name, _, case = function.partition("[")
    assert f"def {name}" in text
    cases = [" ".join(words) for words in CASES]
    cases += [f"{name}, {layers} layers" for name, layers in LAYERS.items()]
    assert not case or case.removesuffix("]") in cases
