"""A tiny model and data, and settings that a run would accept."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from omegaconf import DictConfig

from recipes.config import RunConfig, register
from recipes.main import to_settings
from tests.tiny import make_data, make_model

register()


@pytest.fixture(scope="session")
def required(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """What every run must name. The model has 4 heads, 4 key-value heads, 2 layers."""
    directory = tmp_path_factory.mktemp("recipes")
    model, data = make_model(directory / "model"), make_data(directory / "prompts.jsonl")
    return [
        f"model.path={model}",
        f"data.train={data}",
        "reward.function=tests.recipes.rewards:plain",
        "cost.function=tests.recipes.rewards:plain",
        "actor.generation.sampling.max_response_tokens=8",
        f"output_dir={directory}/run",
    ]


@pytest.fixture(scope="session")
def settings(composed: Callable[..., DictConfig], required: list[str]) -> Callable[..., RunConfig]:
    """settings("ppo", "seed=1"): the settings of a run, with what every run needs."""
    model = next(argument for argument in required if argument.startswith("model.path"))
    of_role = {role: f"{role}.{model}" for role in ("judge", "teacher")}
    further = {
        "evaluate": ["data.validation=held-out.jsonl"],
        "distillation": [of_role["teacher"]],
        "online_dpo": [of_role["judge"]],
        "generative_reward": [of_role["judge"]],
    }
    return lambda recipe, *arguments: to_settings(
        composed(recipe, [*required, *further.get(recipe, ()), *arguments])
    )


@pytest.fixture
def nothing_starts() -> Iterator[None]:
    """Whatever goes wrong in the test, it is before Ray, a process group, or a run's directory."""
    import ray
    import torch.distributed as dist

    before = ray.is_initialized(), dist.is_initialized()
    yield
    assert (ray.is_initialized(), dist.is_initialized()) == before


def yaml_files() -> list[str]:
    return sorted(path.stem for path in (Path(__file__).parents[2] / "recipes").glob("*.yaml"))
