"""Pages that explain terms and sources name what exists: sections, anchors, files, classes,
settings."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
from omegaconf import DictConfig

from recipes.overrides import check_names

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
    sections = set(
        re.findall(r"^## (\d)\. ", (ROOT / "docs" / "paper.md").read_text(), re.MULTILINE)
    )
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


def test_settings_beside_those_of_other_systems_exist(composed: Callable[..., DictConfig]) -> None:
    """The first column of the tables of docs/coming_from.md, and its example's command line."""
    text = (ROOT / "docs" / "coming_from.md").read_text()
    names: list[str] = []
    for first in re.findall(r"^\| (.*?) \| .* \| .* \| .* \|$", text, re.MULTILINE):
        names.extend(re.findall(r"`([a-z_][\w.]*)`", first))
    assert len(names) >= 60
    check_names([f"{name}=" for name in names])
    example = re.findall(r"^\| hybridflow \| `([^`]+=[^`]+)` \|$", text, re.MULTILINE)
    config = composed("grpo", example[0].split())
    sizes = config.data.batch_size * config.algorithm.samples_per_prompt
    assert (sizes, config.algorithm.num_mini_batches) == (1024, 4)


def test_defaults_that_differ_from_other_systems(composed: Callable[..., DictConfig]) -> None:
    """What the text of docs/coming_from.md says of this project's defaults."""
    ppo, grpo = composed("ppo", []), composed("grpo", [])
    assert ppo.algorithm.kl.coefficient == 0.05
    assert grpo.actor.loss.kl_coefficient == 0.0
    assert (ppo.actor.loss.dual_clip, ppo.critic.loss.clip) == (0.0, 0.2)
    assert ppo.actor.loss.rollout_correction.correction.name == "none"
    optimizer = ppo.actor.train.optimizer
    assert (optimizer.schedule.name, optimizer.beta2, optimizer.weight_decay) == (
        "constant",
        0.95,
        0.0,
    )
    assert ppo.actor.generation.enforce_eager is None
    assert not ppo.actor.train.activation_checkpointing
    assert (ppo.loop.checkpoint_every, ppo.loop.resume) == (0, "auto")


def test_what_the_glossary_names_exists() -> None:
    """Every row's file, and every class, function or constant in it; terms are unique."""
    text = (ROOT / "docs" / "glossary.md").read_text()
    rows = re.findall(
        r"^\| \*\*(.+?)\*\* \| .* \| \[(.+?)\]\(\.\./(.+?)\): (.+) \|$", text, re.MULTILINE
    )
    assert len(rows) >= 50
    assert len({term for term, *_ in rows}) == len(rows)
    for term, file, link, names in rows:
        assert file == link, term
        source = (ROOT / file).read_text()
        for name in re.findall(r"`(\w+)`", names):
            defined = re.search(rf"^(?:class|def) {name}\b|^{name}\b.* = ", source, re.MULTILINE)
            assert defined, f"{term}: {file} has no {name}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_text_is_wrapped(page: Path) -> None:
    """Tables, indented commands and pictures aside, which can't be wrapped."""
    lines = without_code(page).splitlines()
    text = [line for line in lines if not line.startswith(("|", "    ", "!["))]
    assert not [line for line in text if len(line) > 140]
