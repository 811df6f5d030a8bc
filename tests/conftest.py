"""Fixtures that several folders share."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from hypothesis import settings
from omegaconf import DictConfig

settings.register_profile("the same examples each time", derandomize=True)
settings.register_profile("new examples each time", print_blob=True)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "the same examples each time"))
"""A commit is judged by the same examples wherever its tests run; make test-slow draws new ones."""

LONGEST = (
    "e2e/test_recipes.py",
    "e2e/test_layouts_agree.py",
    "recovery/test_killed_run.py",
    "api/test_session_on_ray.py",
    "asynchrony/test_two_pools.py",
    "experts/test_recipe.py",
    "cluster/test_several_nodes.py",
    "cluster/test_job.py",
    "extending/test_algorithms_and_rewards.py",
    "runtime/test_hosts.py",
    "generation/test_vllm.py",
    "asynchrony/test_one_process.py",
    "resharding/test_vllm_weights.py",
    "agents/test_runs.py",
    "engines/test_context_parallel.py",
    "engines/test_deepspeed.py",
    "lora/test_training.py",
    "engines/test_threed.py",
    "agents/test_on_ray.py",
    "api/test_documents.py",
    "experts/test_ranks.py",
    "controllers/test_saving.py",
    "rehearsal/test_hollow_gpu.py",
    "extending/test_engines_and_losses.py",
    "mapping/test_answers.py",
    "test_packaging.py",
    "recipes/test_trusted_tokenizers.py",
    "lora/test_actor.py",
    "engines/test_fsdp.py",
    "engines/test_tensor_parallel.py",
    "recipes/test_invariance.py",
)
"""Files that take a third of a minute or more: they come first, so that no process is left alone
with one at the end."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    def place(item: pytest.Item) -> int:
        for number, name in enumerate(LONGEST):
            if item.path.match(name):
                return number
        return len(LONGEST)

    items.sort(key=place)


def pytest_make_parametrize_id(val: Any, argname: str) -> str | None:
    """Names bytes by their parameter: every worker must collect the same names, and compressed
    bytes hold the time at which they were made."""
    return argname if isinstance(val, bytes) else None


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Tiny models in this process are faster without threads."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def selected(request: pytest.FixtureRequest) -> Callable[[str], list[Any]]:
    """selected("case"): the values of a parameter in the tests of this module that run.

    Several engines run a whole matrix in one set of processes; with this they leave out the cases
    that no selected test reads (-m, -k).
    """

    def values(name: str) -> list[Any]:
        result: list[Any] = []
        for item in request.session.items:
            spec = vars(item).get("callspec")
            if item.path != request.path or spec is None or name not in spec.params:
                continue
            if spec.params[name] not in result:
                result.append(spec.params[name])
        return result

    return values


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[None]:
    """One embedded Ray for the whole session: starting it takes seconds. Slots are bookkeeping: no
    process is started for them."""
    from cluster.connect import ClusterConfig, connect

    with connect(ClusterConfig(address="local", worker_logs=False), cpu_slots=16):
        yield


@pytest.fixture(scope="session")
def composed() -> Iterator[Callable[..., DictConfig]]:
    """composed("ppo", ["seed=1"]): what Hydra makes of a recipe and a command line."""
    from hydra import compose, initialize_config_module

    from recipes.config import register
    from recipes.main import join_tables

    register()
    with initialize_config_module(version_base="1.3", config_module="recipes"):
        yield lambda recipe, arguments: compose(
            config_name=recipe, overrides=join_tables(arguments)
        )
