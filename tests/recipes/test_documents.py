"""README and docs/ say what is so: the page of PPO, links, commands, settings and defaults."""

from __future__ import annotations

import ast
import inspect
import re
import shlex
from collections.abc import Callable
from pathlib import Path
from textwrap import dedent

import pytest
from omegaconf import DictConfig, OmegaConf

from controllers import ALGORITHMS
from controllers.ppo import PPO
from recipes.overrides import check_names

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
RECIPES = (ROOT / "docs" / "recipes.md").read_text()
ALGORITHMS_PAGE = (ROOT / "docs" / "algorithms.md").read_text()
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def code_blocks(text: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", text, re.DOTALL)


def commands(text: str) -> list[list[str]]:
    """The `python -m recipes.ppo ...` and grpo lines of a page's code blocks, as words."""
    joined = text.replace("\\\n", " ")
    return [
        shlex.split(line, comments=True)[3:]
        for line in re.findall(r"^ {4}(python -m recipes\.(?:ppo|grpo) .*)$", joined, re.MULTILINE)
    ]


def test_the_readme_shows_ppo_as_it_is() -> None:
    assert code_blocks(README)[0] == dedent(inspect.getsource(PPO.step))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for link in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
        assert link.startswith("http") or (page.parent / link).exists(), f"{page.name}: {link}"


def test_every_page_is_linked_from_the_readme() -> None:
    missing = [page.name for page in PAGES[1:] if f"docs/{page.name}" not in README]
    assert not missing, missing


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_modules_and_targets_that_are_run_exist(page: Path) -> None:
    text = page.read_text()
    for module in re.findall(r"python -m ([\w.]+)", text):
        path = ROOT / Path(*module.split("."))
        assert any(
            found.exists()
            for found in (path.with_suffix(".py"), path / "__main__.py", path.with_suffix(".yaml"))
        ), f"{page.name}: {module}"
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert set(re.findall(r"(?:^ {4}|`)make (\w+)", text, re.MULTILINE)) <= set(targets), page.name


def test_files_that_the_walk_names_exist() -> None:
    text = (ROOT / "docs" / "architecture.md").read_text()
    for name in re.findall(
        r"\b(?:recipes|controllers|workers|cluster|hybridflow)/[\w/]+\.py", text
    ):
        assert (ROOT / name).exists(), name


@pytest.mark.parametrize("page", [README, RECIPES], ids=["README.md", "recipes.md"])
def test_commands_use_settings_that_exist(page: str, composed: Callable[..., DictConfig]) -> None:
    found = [words for words in commands(page) if "--cfg" not in words]
    assert found
    for words in found:
        check_names(words)
        composed("ppo", words)


@pytest.mark.parametrize(
    "page", [README, RECIPES, ALGORITHMS_PAGE], ids=["README.md", "recipes.md", "algorithms.md"]
)
def test_settings_that_a_page_names_exist(page: str) -> None:
    names = re.findall(
        r"`((?:actor|critic|reference|reward|cost|data|loop|algorithm|metrics)\.[a-z_.]+)(?:=|`)",
        page,
    )
    assert names
    check_names([f"{name}=" for name in names])


def test_the_readmes_defaults_are_the_defaults(composed: Callable[..., DictConfig]) -> None:
    rows = re.findall(r"^\| `([\w.]+)` \| `([^`]+)` \|", README, re.MULTILINE)
    assert len(rows) > 10
    config = composed("ppo", [])
    for name, default in rows:
        value = OmegaConf.select(config, name)
        shown = "null" if value is None else str(value)
        assert shown == default, name
    assert composed("grpo", []).algorithm.samples_per_prompt == 8


def test_an_algorithms_name_stands_in_its_file_and_its_entry_alone() -> None:
    """What recipes.md says of one that belongs to the project; one of another package is built
    from the page in tests/extending."""
    mentions = set()
    for package in ("recipes", "controllers", "workers", "hybridflow"):
        for path in (ROOT / package).rglob("*.py"):
            if re.search(r"\bopo\b", path.read_text()):
                mentions.add(path.name)
    assert mentions == {"opo.py", "__init__.py", "advantages.py"}


def test_the_table_of_algorithms_is_the_code() -> None:
    """Entries, models and files; each file is a page."""
    rows = re.findall(
        r"^\| `(\w+)` \| .*? \| ([\w, ]+) \| .*? \| \[(.*?)\]\(\.\./(.*?)\) \|$",
        ALGORITHMS_PAGE,
        re.MULTILINE,
    )
    expected = {}
    for name, entry in ALGORITHMS.items():
        file = f"{entry.module.replace('.', '/')}.py"
        expected[name] = (", ".join(role.replace("_", " ") for role in entry.roles), file, file)
        assert len((ROOT / file).read_text().splitlines()) <= 140, file
    assert {name: tuple(row) for name, *row in rows} == expected


@pytest.mark.parametrize("name", ALGORITHMS)
def test_every_step_is_on_the_page_of_algorithms(name: str) -> None:
    step = dedent(inspect.getsource(ALGORITHMS[name].load().step))
    blocks = re.findall(r"```python\n(def step.*?)```", ALGORITHMS_PAGE, re.DOTALL)
    # Compared as syntax: on the page, where the method stands at the left edge, lines break later.
    functions = [function for block in blocks for function in ast.parse(block).body]
    assert ast.dump(ast.parse(step).body[0]) in map(ast.dump, functions)
    assert (ROOT / "recipes" / f"{name}.yaml").is_file()


def test_the_reward_of_the_page_on_recipes_works() -> None:
    module: dict[str, object] = {"re": re}
    exec(next(block for block in code_blocks(RECIPES) if "def last_number" in block), module)
    reward = module["last_number"]
    columns = {
        "prompt": "How much?",
        "finish_reason": "stop",
        "answer": "They have\n#### 1,042",
        "id": 3,
    }
    assert reward(response="so 2 x 521 = 1042.", **columns) == 1.0  # type: ignore[operator]
    assert reward(response="42", **columns) == 0.0  # type: ignore[operator]
    assert reward(response="none", **columns) == 0.0  # type: ignore[operator]
