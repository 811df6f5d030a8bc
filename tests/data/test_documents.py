"""docs/data.md: every example of a row is one, and every setting is a setting."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from omegaconf import DictConfig

from controllers.data import DATASETS, DataConfig
from recipes.overrides import check_names, join_tables
from tests.data.kinds import CHATML, make

PAGE = (Path(__file__).parents[2] / "docs" / "data.md").read_text()
EXAMPLES = re.findall(
    r"^```(jsonl|json|csv) (\w+)([^\n]*)\n(.*?)^```", PAGE, re.DOTALL | re.MULTILINE
)
TEMPLATE = CHATML.replace("m['content']", "(m.content or m.tool_calls[0].function.name)")


@pytest.mark.parametrize("example", EXAMPLES, ids=range(len(EXAMPLES)))
def test_examples_are_rows(example: tuple[str, str, str, str], tmp_path: Path) -> None:
    suffix, kind, settings, text = example
    path, template = tmp_path / f"rows.{suffix}", tmp_path / "own.jinja"
    path.write_text(text)
    template.write_text(TEMPLATE)
    options: dict[str, Any] = {"chat_template": str(template)}
    for setting in settings.split():
        name, _, value = setting.removeprefix("data.").partition("=")
        options[name] = value
    config = DataConfig(train=str(path), **options)
    dataset = DATASETS[kind].load(config, str(path), make("byte_level"))
    rows = {"jsonl": text.count("\n"), "json": text.count('"prompt"'), "csv": text.count("\n") - 1}
    assert len(dataset) == rows[suffix]


def test_there_is_an_example_of_each_kind() -> None:
    assert len(EXAMPLES) >= 9
    assert {kind for _, kind, *_ in EXAMPLES} == {"prompts", "demonstrations", "pairs"}


def test_settings_of_the_page_exist(composed: Callable[..., DictConfig]) -> None:
    names = re.findall(r"`((?:actor|reward|judge|data|loop|model)\.[a-z_.]+)(?:=[^`]*)?`", PAGE)
    assert len(names) > 10
    check_names([f"{name}=" for name in names])
    for recipe, arguments in re.findall(
        r"^ {4}python -m recipes\.(\w+) ((?:.*\\\n)*.*)", PAGE, re.MULTILINE
    ):
        words = re.findall(r"'([^']*)'|([\w.]+=\S+)", arguments.replace("\\\n", " "))
        listed = [quoted or plain for quoted, plain in words]
        check_names(listed)
        composed(recipe, join_tables(listed))
