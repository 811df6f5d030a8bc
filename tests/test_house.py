"""The code stays readable: limits on the figures that benchmarks.house measures."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.house import PACKAGES, Figures, measure, names_to_import
from tests.conftest import LONGEST

ROOT = Path(__file__).parents[1]

EXAMPLE = """
class Example:
    '''Of two kinds.'''

    size: int = 3
    '''What it measures.'''

def total(given, rows):
    import math
    pairs = [math.fsum(cell if cell else 0 for row in part for cell in row) for part in given]
    return sum(pairs) if pairs else 0
"""


@pytest.fixture(scope="module")
def house() -> Figures:
    return measure([ROOT / name for name in PACKAGES])


def listed(figures: Figures, key: str) -> str:
    """The worst places of a count, for the message of a failing test."""
    worst = sorted(figures.places[key], reverse=True)[:10]
    return "\n".join(f"{place.path}:{place.line}: {place.text}" for place in worst)


def test_the_example_is_counted_by_hand(tmp_path: Path) -> None:
    (tmp_path / "example.py").write_text(EXAMPLE + "#" * 105 + "\n\n")
    figures = measure([tmp_path])
    assert figures.lines == 9
    assert figures.count("over_100") == 1
    assert figures.count("over_110") == 0
    assert figures.count("comprehensions") == 2
    assert figures.count("nested") == 1
    assert figures.count("over_two_fors") == 1
    assert figures.count("conditionals") == 2
    assert figures.count("conditionals_inside") == 1
    assert figures.count("of_docstrings") == 1
    assert figures.count("what_docstrings") == 1
    assert figures.statements == 4  # class, def, assignment, return
    assert figures.bindings == 7  # size, given, rows, pairs, part, row, cell
    assert figures.count("dialect") == 1


def test_few_lines_are_long(house: Figures) -> None:
    assert house.percent("over_100") < 1, listed(house, "over_100")
    assert house.percent("over_110") < 0.1, listed(house, "over_110")


def test_comprehensions_are_few_and_flat(house: Figures) -> None:
    assert house.per_thousand("comprehensions") < 20, listed(house, "comprehensions")
    assert house.per_thousand("nested") < 1, listed(house, "nested")
    assert house.count("over_two_fors") == 0, listed(house, "over_two_fors")


def test_conditional_expressions_are_few(house: Figures) -> None:
    assert house.per_thousand("conditionals") < 12, listed(house, "conditionals")
    assert house.count("conditionals_inside") == 0, listed(house, "conditionals_inside")


def test_names_are_standard_terms(house: Figures) -> None:
    assert house.per_thousand("dialect") < 5, listed(house, "dialect")


def test_docstrings_are_sentences(house: Figures) -> None:
    assert house.count("of_docstrings") == 0, listed(house, "of_docstrings")
    assert house.count("what_docstrings") <= 30, listed(house, "what_docstrings")


def test_a_custom_loop_needs_one_import() -> None:
    names = names_to_import(ROOT / "docs/python.md")
    assert names is not None, "docs/python.md shows no custom loop"
    assert names == 1, "the loop of docs/python.md imports more than its session"


def test_the_files_that_run_first_exist() -> None:
    missing = [name for name in LONGEST if not (ROOT / "tests" / name).is_file()]
    assert not missing, "tests/conftest.py orders files that are gone"
