"""The example of docs/recipes.md, "Adding an engine or a loss", is taken by the settings that it
names (issue 10, tried by a stranger, H)."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from hybridflow.mapping.question.space import SearchSpace
from recipes.checks import check_train
from recipes.engine_facts import limited_space, zero_stage_of
from recipes.generation_checks import check_generation
from recipes.trial import try_policy_loss
from workers.config import TrainConfig
from workers.generation.config import GenerationConfig
from workers.losses.config import PolicyLossConfig

PAGE = Path(__file__).parents[2] / "docs" / "recipes.md"


def test_the_module_of_the_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    section = PAGE.read_text().partition("## Adding an engine or a loss")[2].partition("\n## ")[0]
    (code,) = re.findall(r"```python\n(.*?)```", section, re.DOTALL)
    (tmp_path / "mine_of_the_page.py").write_text(code)
    monkeypatch.syspath_prepend(str(tmp_path))
    try_policy_loss(PolicyLossConfig(name="mine_of_the_page:one_sided"))
    train = TrainConfig(engine="mine_of_the_page:TimedEngine")
    check_train("actor.train", train)
    assert limited_space(train.engine, SearchSpace()).max_pipeline == 1
    assert zero_stage_of(train) == zero_stage_of(TrainConfig(engine="fsdp"))
    check_generation(
        "actor",
        GenerationConfig(engine="mine_of_the_page:CountingEngine", prefix_caching=False),
    )
    with pytest.raises(ValueError, match=r"^actor\.generation\.prefix_caching is true"):
        check_generation(
            "actor", GenerationConfig(engine="mine_of_the_page:CountingEngine", prefix_caching=True)
        )
