"""Pages that explain terms and sources name what exists: sections, anchors, files, classes, settings."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = ("hybridflow", "workers", "cluster", "controllers", "recipes", "benchmarks", "tests")
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def sources() -> list[Path]:
    """Every Python file of the project."""
    paths: list[Path] = []
    for package in PACKAGES:
        paths.extend(sorted((ROOT / package).rglob("*.py")))
    return paths


def without_code(page: Path) -> str:
    """The page's text without its code blocks, whose lines may start with # too."""
    return re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)


def anchors(page: Path) -> set[str]:
    """The anchors that GitHub gives to a page's headings."""
    headings = re.findall(r"^#+ (.*)$", without_code(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_sections_of_the_paper_that_the_code_cites_exist() -> None:
    sections = set(re.findall(r"^## (\d)\. ", (ROOT / "docs" / "paper.md").read_text(), re.MULTILINE))
    cited: list[str] = []
    for path in sources():
        cited.extend(re.findall(r"docs/paper\.md\s+section\s+(\d)", path.read_text()))
    assert len(cited) >= 15
    assert set(cited) <= sections


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_anchors_of_links_exist(page: Path) -> None:
    for file, anchor in re.findall(r"\]\(([\w/.-]*)#([\w-]+)\)", page.read_text()):
        target = page.parent / file if file else page
        assert anchor in anchors(target), f"{page.name}: {file}#{anchor}"
