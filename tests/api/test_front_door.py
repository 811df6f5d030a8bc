"""hybridflow/__init__.py: every public name is there, at run time and for type checkers;
finding types."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

import hybridflow
from hybridflow import (
    Metrics,
    Protocol,
    RankContext,
    Results,
    RewardConfig,
    Worker,
    each,
    remote,
    spawn,
    start,
)
from hybridflow.local_pool import LocalPool
from hybridflow.protocols import ONE_TO_ALL
from recipes.config import RunConfig
from recipes.placing import place
from workers.config import ModelConfig

ROOT = Path(__file__).parents[2]


def test_three_lists_say_the_same() -> None:
    tree = ast.parse((ROOT / "hybridflow" / "__init__.py").read_text())
    imported = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in LAYERS:
            imported |= {alias.name: node.module for alias in node.names}
    assert imported == hybridflow._MODULE_OF
    assert sorted(imported) == sorted(hybridflow.__all__)
    for name in hybridflow.__all__:
        found = hybridflow.__getattr__(name)
        assert vars(sys.modules[hybridflow._MODULE_OF[name]])[name] is found
    with pytest.raises(AttributeError, match="module 'hybridflow' has no 'open_sesion'; it has"):
        hybridflow.open_sesion  # type: ignore[attr-defined]  # noqa: B018


LAYERS = ("recipes", "controllers", "workers", "cluster", "hybridflow")

TYPES = """
from hybridflow import (
    ActorConfig, ActorWorker, CriticWorker, LocalPool, PoolSpec, each, open_session, spawn, start,
)

pool = LocalPool(PoolSpec())
actor = spawn(ActorWorker, pool, ActorConfig())
reveal_type(actor)
reveal_type(actor.update_actor)
reveal_type(each(actor.save_pretrained, "out"))
reveal_type(each(actor.peak_memory_bytes))
reveal_type(start(actor.save_checkpoint, "at"))
spawn(CriticWorker, pool, ActorConfig())
each(actor.save_pretrained, 3)
actor.save_pretraind("out")
session = open_session("grpo", {"seed": 1}, reward=lambda *, response, **columns: 1.0)
reveal_type(session.actor)
reveal_type(session.critic.compute_values)
reveal_type(session.step())
session.crtic
"""
EXPECTED = {
    7: '"workers.actor.ActorWorker"',
    8: '"def (batch: hybridflow.batch.Batch) -> hybridflow.results.Metrics"',
    9: '"list[None]"',
    10: '"list[int]"',
    11: '"hybridflow.results.Results[None]"',
    12: 'Argument 1 to "spawn" has incompatible type "type[CriticWorker]"; expected "Callable[[ActorConfig',
    13: 'incompatible type "int"; expected "str"',
    14: '"ActorWorker" has no attribute "save_pretraind"',
    16: '"workers.roles.Actor"',
    17: '"def (batch: hybridflow.batch.Batch) -> hybridflow.batch.Batch"',
    18: '"dict[str, float]"',
    19: '"Session" has no attribute "crtic"',
}


def test_types(tmp_path: Path) -> None:
    """Lines of TYPES -> what mypy says of them, and nothing of any other line."""
    program = tmp_path / "program.py"
    program.write_text(TYPES.lstrip())
    command = [sys.executable, "-m", "mypy", str(program)]
    told = subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stdout
    said: dict[int, str] = {}
    for line in told.splitlines():
        place = re.match(r".*program\.py:(\d+): (.*)", line)
        if place is not None:
            said[int(place[1])] = said.get(int(place[1]), "") + place[2]
    assert said.keys() == EXPECTED.keys(), told
    for number, text in EXPECTED.items():
        assert text in said[number], (number, said[number])


class Counter(Worker):
    @remote(ONE_TO_ALL)
    def rank(self) -> int:
        return self.context.rank

    @remote(ONE_TO_ALL)
    def nothing(self) -> None:
        pass

    @remote(replace(ONE_TO_ALL, name="MINE", collect=lambda layout, results: list(results)))
    def listed(self) -> int:
        return 3

    @remote(
        Protocol(
            name="FIRST",
            distribute=ONE_TO_ALL.distribute,
            collect=lambda layout, results: results[0],
        )
    )
    def first(self) -> int:
        return 4


def test_who_answers_decides_how_a_call_is_made() -> None:
    """Not which function collects: a protocol's own list is a list too."""
    with LocalPool() as pool:
        counter = spawn(Counter, pool, None)
        assert each(counter.rank) == [0] and each(counter.listed) == [3]
        assert counter.first() == 4
        assert counter.nothing() is None  # type: ignore[func-returns-value]
        assert each(counter.nothing) == [None]
        assert isinstance(start(counter.rank), Results)
        for call in (counter.rank, counter.listed):
            with pytest.raises(TypeError, match=r"answered by every rank; call each\(counter\."):
                call()
        with pytest.raises(TypeError, match="has one answer"):
            each(counter.first)
        plain = Counter(None, RankContext(rank=5))
        assert each(plain.rank) == [5], "an object of this process is the only rank"


def test_metrics_join_from_both_sides_in_order() -> None:
    late = Metrics(sources=[lambda: {"loss": 2.0, "tokens": 5.0}])
    joined = {"loss": 1.0, "extra": 3.0} | late
    assert isinstance(joined, Metrics)
    assert dict(joined) == {"loss": 2.0, "extra": 3.0, "tokens": 5.0}
    assert dict(late | {"loss": 9.0}) == {"loss": 9.0, "tokens": 5.0}
    assert dict(Metrics({"loss": 1.0}) | late | {"tokens": 0.0}) == {"loss": 2.0, "tokens": 0.0}


def test_settings_made_in_python_refer_to_no_others() -> None:
    config = RunConfig(model=ModelConfig(path="/models/mine"), seed=7)
    assert (config.actor.model.path, config.critic.model.path) == ("/models/mine", "/models/mine")
    assert (config.actor.seed, config.critic.seed, config.reference.temperature) == (7, 7, 1.0)
    assert "${" not in repr(config)
    assert "${" not in repr(RunConfig())


def test_placing_looks_at_no_directory(tmp_path: Path) -> None:
    """Whether output_dir can be made is not its question."""
    (tmp_path / "file").write_text("")
    config = RunConfig(
        model=ModelConfig(path="m"),
        output_dir=str(tmp_path / "file"),
        algorithm=hybridflow_algorithm("grpo"),
        reward=RewardConfig(function="tests.recipes.rewards:plain"),
    )
    assert place(config).pool_of == {"actor": "main", "reward": "main"}


def hybridflow_algorithm(name: str):  # type: ignore[no-untyped-def]
    from controllers import algorithm_entry

    return algorithm_entry(name).load_config()()
