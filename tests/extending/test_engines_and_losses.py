"""A training engine, a generation engine and a policy loss from a package outside the
repository, which declares them as entry points: nothing of ours is edited."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from hybridflow.registry import Registry
from recipes.python_settings import make_settings
from recipes.run import run
from tests.tiny import make_data, make_model
from workers.engines import ENGINES, engine_class
from workers.engines.base import Outputs
from workers.generation import generation_engine_class
from workers.losses.config import PolicyLossConfig
from workers.losses.policy import policy_loss
from workers.losses.surrogates import surrogate
from workers.sequences import Sequences

ROOT = Path(__file__).parents[2]

ENGINE = '''
"""Every rank holds the whole model: data parallelism as in PyTorch's first tutorial."""

from dataclasses import replace

import torch
import torch.distributed as dist

from hybridflow.resharding.shards import Box, LocalParameter, LocalShard
from workers.engines.base import TrainingEngine
from workers.engines.model.scored import ScoredModel
from workers.engines.shared.flat_views import named
from workers.engines.shared.metrics import add_micro_batch, metrics_of_some
from workers.engines.shared.micro_batches import gather_outputs, run_micro_batch
from workers.engines.shared.sharded_engine import ShardedEngine


class WholeEngine(ShardedEngine):
    @classmethod
    def check(cls, model, config, head, world_size):
        if config.tp * config.pp != 1:
            raise ValueError(f"train.tp is {config.tp}, but engine whole has data ranks only; set tp=1 pp=1")

    @classmethod
    def limit(cls, space):
        return replace(space, max_pipeline=1, max_tensor=1, zero_stages=(0,))

    @classmethod
    def zero_stage(cls, config):
        return 0

    @classmethod
    def shards_data(cls, config):
        return False

    def _build(self, source, *, trains):
        source.materialize(source.model, self.device)
        self.scored = ScoredModel(source.model, self.head)
        self.parameters = dict(source.model.named_parameters())
        self.adam = torch.optim.AdamW(
            self.parameters.values(),
            lr=self.config.optimizer.learning_rate,
            betas=(self.config.optimizer.beta1, self.config.optimizer.beta2),
            eps=self.config.optimizer.epsilon,
            weight_decay=0.0,
        )

    def _run(self, micro_batch, entropy, temperature):
        return run_micro_batch(self.scored, micro_batch, entropy=entropy, temperature=temperature)

    @torch.no_grad()
    def forward(self, sequences, *, entropy=False, temperature=1.0, routes=False):
        cut = self._cut_alike(sequences, None, alike=False)
        return gather_outputs(cut, [self._run(part, entropy, temperature) for part in cut], sequences)

    def train_step(self, sequences, loss_fn, *, entropy=False, temperature=1.0):
        metrics = {}
        for part in self._cut_alike(sequences, None, alike=False):
            loss, parts = loss_fn(self._run(part, entropy, temperature), part.sequences)
            loss.backward()
            metrics = add_micro_batch(metrics, loss, parts)
        for parameter in self.parameters.values():
            dist.all_reduce(parameter.grad)
        norm = torch.nn.utils.clip_grad_norm_(
            self.parameters.values(), self.config.optimizer.clip_grad_norm, error_if_nonfinite=True
        )
        self.adam.step()
        self._drop_gradients()
        rate = self.config.optimizer.learning_rate
        return {**metrics_of_some(metrics), "grad_norm": float(norm), "learning_rate": rate}

    def local_parameters(self):
        result = []
        for name, parameter in self.parameters.items():
            box = Box((0,) * parameter.ndim, tuple(parameter.shape))
            shards = (LocalShard(box, parameter.detach()),)
            result.append(LocalParameter(name, box.shape, parameter.dtype, shards))
        return result

    @property
    def num_steps(self):
        return 0  # AdamW's moments are left out of snapshots

    def state(self, *, moments, copies):
        parameters = named("model", self.local_parameters())
        if copies or self.context.rank == 0:
            return parameters
        return [replace(parameter, shards=()) for parameter in parameters]

    def restored(self, num_steps):
        pass

    def _master_parameters(self):
        return self.local_parameters()

    def _drop_gradients(self):
        self.adam.zero_grad()

    def _move_state(self, device):
        pass


class Unfinished(TrainingEngine):
    """A TrainingEngine that lacks nearly everything."""


class FromALibrary(WholeEngine):
    library = "a_library_that_nobody_has"
'''

GENERATION = """
from workers.generation.hf import HfEngine


class LoudEngine(HfEngine):
    @classmethod
    def check(cls, config):
        super().check(config)
        if config.prefix_caching:
            raise ValueError("generation.prefix_caching is true, but engine loud has none; set it to false")

    def generate(self, prompts, seeds, sampling, limits=None):
        print(f"LOUD {len(prompts)} prompts", flush=True)
        return super().generate(prompts, seeds, sampling, limits)
"""

LOSSES = '''
from workers.losses.surrogates import reads


@reads("clip_low")
def one_sided(tokens, config):
    """The policy gradient times the ratio, which is bounded from below alone."""
    ratio = tokens.log_ratio.exp()
    bound = 1 - config.clip_low
    return -ratio.clamp(min=bound) * tokens.advantages, {"below_fraction": ratio < bound}


@reads(columns=("mood",))
def moody(tokens, config):
    return -tokens.advantages * tokens.columns["mood"], {}


def unmarked(tokens, config):
    return -tokens.advantages, {}
'''

ENTRY_POINTS = """
[hybridflow.training_engines]
whole = outside.engine:WholeEngine

[hybridflow.generation_engines]
loud = outside.generation:LoudEngine

[hybridflow.policy_losses]
one_sided = outside.losses:one_sided
"""


REFUSALS = {
    "actor.train.tp=2": "actor: train.tp is 2, but engine whole has data ranks only",
    "actor.generation.prefix_caching=true": "prefix_caching is true, but engine loud has none",
    "actor.train.engine=outside.engine:FromALibrary": "but a_library_that_nobody_has is not installed",
    "actor.loss.name=outside.losses:moody": "reads mood, and grpo does not write it; use one of ppo_clip",
    "actor.loss.name=outside.losses:unmarked": "is no policy loss",
}


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory as pip leaves it: a package and its metadata."""
    directory = tmp_path_factory.mktemp("site")
    files = {
        "outside/__init__.py": "",
        "outside/engine.py": ENGINE,
        "outside/generation.py": GENERATION,
        "outside/losses.py": LOSSES,
        "outside-1.0.dist-info/METADATA": "Metadata-Version: 2.1\nName: outside\nVersion: 1.0\n",
        "outside-1.0.dist-info/entry_points.txt": ENTRY_POINTS,
    }
    for name, text in files.items():
        path = directory / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
    return directory


@pytest.fixture
def importable(package: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(package))


@pytest.fixture(scope="module")
def common(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    directory = tmp_path_factory.mktemp("tiny")
    model, data = make_model(directory / "model"), make_data(directory / "prompts.jsonl")
    return [
        f"model.path={model}",
        f"data.train={data}",
        "data.batch_size=4",
        "reward.function=tests.runtime.rewards:count",
        "actor.train.precision=fp32",
        "actor.train.optimizer.learning_rate=1e-3",
        "actor.generation.precision=fp32",
        "actor.generation.prefix_caching=false",
        "actor.generation.sampling.max_response_tokens=8",
        "algorithm.samples_per_prompt=2",
        "algorithm.num_mini_batches=2",
        "loop.num_steps=2",
    ]


def grpo(package: Path, arguments: list[str]) -> subprocess.CompletedProcess[str]:
    """python -m recipes.grpo with the package installed."""
    path = os.pathsep.join(filter(None, (str(package), os.environ.get("PYTHONPATH"))))
    return subprocess.run(
        [sys.executable, "-m", "recipes.grpo", *arguments],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": path},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=800,
    )


def metrics(output: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]


def test_a_run_takes_all_three_by_their_entry_points(
    package: Path, common: list[str], tmp_path: Path
) -> None:
    """The engine computes what fsdp computes, step for step; the loss reads its setting."""
    own = ["actor.train.engine=whole", "actor.generation.engine=loud"]
    loss = ["actor.loss.name=one_sided", "actor.loss.clip_low=0.01"]
    ours = ["actor.train.engine=fsdp", "actor.generation.engine=hf"]
    runs = {"own": own, "ours": ours}
    printed = {}
    for name, engines in runs.items():
        arguments = [*common, *engines, *loss, "runtime=local", f"output_dir={tmp_path / name}"]
        finished = grpo(package, arguments)
        assert finished.returncode == 0, finished.stdout[-4000:]
        printed[name] = finished.stdout
    assert "LOUD 8 prompts" in printed["own"] and "LOUD" not in printed["ours"]
    for step, (left, right) in enumerate(
        zip(metrics(tmp_path / "own"), metrics(tmp_path / "ours"), strict=True)
    ):
        for name in ("actor/loss", "actor/grad_norm", "actor/below_fraction", "reward/mean"):
            assert left[name] == pytest.approx(right[name], rel=1e-4, abs=1e-6), (step, name)


def test_it_works_in_rays_workers_by_module_and_name(
    package: Path, common: list[str], tmp_path: Path
) -> None:
    arguments = [
        "num_devices=2",
        "actor.train.engine=outside.engine:WholeEngine",
        "actor.generation.engine=outside.generation:LoudEngine",
        "actor.loss.name=outside.losses:one_sided",
        f"output_dir={tmp_path}",
    ]
    finished = grpo(package, [*common, *arguments])
    assert finished.returncode == 0, finished.stdout[-4000:]
    assert len(metrics(tmp_path)) == 2


@pytest.mark.usefixtures("importable")
def test_a_dry_run_predicts_and_checks(
    common: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The mapper asks the engine for its layouts, and every refusal is the engine's own."""
    outside = [
        "actor.train.engine=whole",
        "actor.generation.engine=loud",
        "num_devices=2",
        "dry_run=true",
    ]

    def dry_run(*arguments: str) -> str:
        run(make_settings("grpo", [*common, *outside, *arguments, f"output_dir={tmp_path}"]))
        return capsys.readouterr().out

    assert "update_actor" in dry_run()
    assert "update_actor" in dry_run("placement=auto")
    for argument, message in REFUSALS.items():
        with pytest.raises(ValueError, match=message):
            dry_run(argument)


@pytest.mark.usefixtures("importable")
def test_names_that_stand_for_nothing_say_what_there_is() -> None:
    for name, message in {
        "megatron": "engine is 'megatron'; known: fsdp, threed, deepspeed, whole, or package.module:Name",
        "outside.engine:Missing": "outside.engine has no 'Missing'",
        "outside.nowhere:Engine": "module 'outside.nowhere' can't be imported",
        "outside/engine.py:WholeEngine": "names a file; name the module: outside.engine:WholeEngine",
        "outside.generation:LoudEngine": "no subclass of workers.engines.base.TrainingEngine",
        "outside.engine:Unfinished": "a class without __init__, check, forward, limit",
    }.items():
        with pytest.raises(ValueError, match=message):
            engine_class(name)
    with pytest.raises(ValueError, match="known: vllm, hf, loud"):
        generation_engine_class("sglang")
    with pytest.raises(ValueError, match="policy_gradient, one_sided, or package"):
        surrogate("hinge")
    with pytest.raises(ValueError, match="which is no policy loss; mark the function with @reads"):
        surrogate("outside.losses:unmarked")


@pytest.mark.usefixtures("importable")
def test_a_name_of_two_packages_is_an_error() -> None:
    clashing = Registry(
        group=ENGINES.group, builtin={"whole": "workers.engines.fsdp.engine:FsdpEngine"}
    )
    with pytest.raises(
        ValueError, match=r"whole is outside.engine:WholeEngine and workers.engines.fsdp"
    ):
        list(clashing)


@pytest.mark.usefixtures("importable")
def test_the_loss_by_hand() -> None:
    """Ratios 2 and 1/2 with the bound 0.8 and advantages 1 and 3: -(2 * 1 + 0.8 * 3) / 2."""
    old = torch.tensor([-1.0, -1.0])
    sequences = Sequences(
        token_ids=torch.zeros(3, dtype=torch.int64),
        lengths=torch.tensor([3]),
        scored_lengths=torch.tensor([2]),
        per_token={
            "advantages": torch.tensor([1.0, 3.0]),
            "old_log_probs": old,
            "weights": torch.tensor([0.5, 0.5]),
        },
    )
    log_probs = old + torch.tensor([2.0, 0.5]).log()
    config = PolicyLossConfig(name="outside.losses:one_sided", clip_low=0.2)
    loss, measured = policy_loss(config)(Outputs(log_probs=log_probs), sequences)
    assert float(loss) == pytest.approx(-(2.0 + 0.8 * 3.0) / 2)
    assert float(measured["below_fraction"]) == pytest.approx(0.5)
