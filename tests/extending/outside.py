"""The sources of a package outside the repository with a training engine, a generation engine and
policy losses, which it declares as entry points."""

from __future__ import annotations

from pathlib import Path

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
        cut = self._share_rows(self._cut_alike(sequences, None, alike=False))
        return gather_outputs(cut, [self._run(part, entropy, temperature) for part in cut], sequences)

    def train_step(self, sequences, loss_fn, *, entropy=False, temperature=1.0):
        metrics = {}
        for part in self._share_rows(self._cut_alike(sequences, None, alike=False)):
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


def write_package(directory: Path) -> Path:
    """`directory`, with the package and its metadata as pip leaves them."""
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
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return directory
