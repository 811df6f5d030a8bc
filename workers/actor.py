"""ActorWorker: the hybrid engine. One set of weights, trained in one layout and sampled in another.

An iteration is the paper's five steps (PAPER.md section 3): weights into the generation layout (only when they changed),
generate, return the results, back to the training layout, train.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import cast

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from transformers import AutoTokenizer

from hybridflow.batch import Batch
from hybridflow.columns import Ragged
from hybridflow.context import RankContext
from hybridflow.layout import Layout
from hybridflow.resharding.grouping import Grouping, vanilla, zero_redundancy
from hybridflow.results import Metrics
from workers.config import Precision
from workers.engines.base import Head
from workers.generation import generation_engine_class
from workers.generation.config import GenerationConfig, SamplingConfig
from workers.generation.sampling import load_model_config
from workers.generation.sink import WeightSink, weight_sink
from workers.losses.policy import policy_loss
from workers.model_worker import MiniBatches, ModelWorker, mean_over_steps, sequences_of, train_on, training_layout
from workers.role_config import ActorConfig
from workers.roles import Actor
from workers.sequences import Sequences
from workers.weight_sync import SyncReport, WeightSync

PER_TOKEN = ("advantages", "rollout_log_probs", "ref_log_probs")


def generation_grouping(config: GenerationConfig, training: Layout) -> Grouping:
    """Which rank takes which generation coordinate: the paper's zero-redundancy grouping where its sizes divide the training
    sizes, consecutive ranks elsewhere (sharded data parallelism, tg that does not divide t)."""
    parallel = config.pp * config.tp
    if parallel < 1 or training.size % parallel:
        raise ValueError(
            f"actor.generation: pp={config.pp} x tp={config.tp} does not divide the pool's {training.size} devices; "
            f"choose sizes whose product is one of {[n for n in range(1, training.size + 1) if training.size % n == 0]}"
        )
    if training.axis_size("tp") % config.tp == 0 and training.axis_size("pp") % config.pp == 0:
        return zero_redundancy(training, tp=config.tp, pp=config.pp)
    return vanilla(training.size, tp=config.tp, pp=config.pp)


class ActorWorker(ModelWorker, Actor):
    config: ActorConfig

    def __init__(self, config: ActorConfig, context: RankContext) -> None:
        super().__init__(config, context)
        self.build(config.model, config.train, Head.lm, context)
        grouping = generation_grouping(config.generation, self.layout)
        engine = generation_engine_class(config.generation.engine)
        self.generator = engine(model=config.model, config=config.generation, context=context, load_weights=False, layout=grouping.layout)
        self.sync = WeightSync(
            self.engine,
            self.generator,
            self._make_sink(),
            probe_tolerance=self._probe_tolerance(),
            vocab_size=load_model_config(config.model).vocab_size,
        )
        self.weight_version = 0
        self.last_sync: SyncReport | None = None

    @classmethod
    def layouts(cls, config: ActorConfig, world_size: int) -> dict[str, Layout]:
        training = training_layout(config.train, world_size, "actor")
        return {"train": training, "generation": generation_grouping(config.generation, training).layout}

    def generate_sequences(self, prompts: Batch, sampling: SamplingConfig | None = None) -> Batch:
        self._to_generation()
        prompt_ids = prompts.ragged("prompt_ids")
        seeds = sample_seeds(self.config.seed, prompts)
        limits = prompts.tensor("max_response_tokens").numpy() if "max_response_tokens" in prompts else None
        made = self.generator.generate(
            [prompt.numpy() for prompt in prompt_ids.unbind()], seeds, sampling or self.config.generation.sampling, limits
        )
        lengths = torch.from_numpy(made.lengths)
        return Batch.of(
            response_ids=Ragged(torch.from_numpy(made.response_ids), lengths),
            rollout_log_probs=Ragged(torch.from_numpy(made.log_probs), lengths),
            finish_reason=made.finish_reasons,
            num_tokens=prompt_ids.lengths + lengths,
            weight_version=torch.full((len(prompts),), self.weight_version),
        )

    def compute_log_prob(self, batch: Batch) -> Batch:
        self._to_training()
        outputs = self.engine.forward(sequences_of(batch), temperature=self._temperature)
        return self.scored(batch, outputs.log_probs if outputs else None, "log_probs")

    def update_actor(self, batch: Batch) -> Metrics:
        self._to_training()
        config = self.config
        labels = cast(Tensor, batch["mini_batch"]) if "mini_batch" in batch else None
        sequences = sequences_of(batch, PER_TOKEN)
        mini_batches = MiniBatches(sequences, labels, self.layout, self.context.device)
        if "log_probs" in batch or config.num_epochs * mini_batches.num_labels > 1 or self._is_stale(batch):  # the same on every rank
            mini_batches.sequences = sequences.with_columns(per_token={"old_log_probs": self._old_log_probs(batch, sequences)})
        entropy = config.report_entropy or config.loss.entropy_coefficient != 0
        steps = mini_batches.steps(config.num_epochs, self.weight_version, config.loss.aggregation, config.loss.aggregation_constant)
        metrics = train_on(self.engine, steps, policy_loss(config.loss), entropy=entropy, temperature=self._temperature)
        self.weight_version += 1
        return mean_over_steps(metrics, "actor") | self._sync_metrics()

    def save_checkpoint(self, directory: str) -> None:
        super().save_checkpoint(directory)
        if self.context.rank == 0:
            (Path(directory) / "actor.json").write_text(json.dumps({"weight_version": self.weight_version}))

    def save_pretrained(self, directory: str) -> None:
        super().save_pretrained(directory)
        if self.context.rank == 0:
            model = self.config.model
            AutoTokenizer.from_pretrained(model.tokenizer or model.path, trust_remote_code=model.trust_remote_code).save_pretrained(
                directory
            )

    def load_checkpoint(self, directory: str) -> None:
        super().load_checkpoint(directory)
        self.weight_version = json.loads((Path(directory) / "actor.json").read_text())["weight_version"]
        self.generator.weight_version = -1

    def close(self) -> None:
        self.generator.close()

    def _to_generation(self) -> None:
        """Steps 1 and 2: the generation engine awake and on the latest weights."""
        if self.config.generation.release_during_training:
            self.engine.offload()
            self.generator.wake()
            self.sync.sink.restore()
        if self.generator.weight_version != self.weight_version:
            self.last_sync = self.sync.run(self.weight_version)

    def _to_training(self) -> None:
        """Step 4: the trainer has the memory."""
        if self.config.generation.release_during_training:
            self.generator.sleep()
            self.sync.sink.release()
            self.engine.onload()

    def _make_sink(self) -> WeightSink:
        config = self.config.generation
        parameters = self.engine.local_parameters()
        return weight_sink(config.engine, self.generator, parameters, torch_dtype(config.precision), self.context.device)

    def _old_log_probs(self, batch: Batch, sequences: Sequences) -> Tensor:
        """The log-probs before this update: given, or computed now, while the weights are still those that generated.

        Ratios are taken between numbers of one engine: the generation engine's own round differently.
        """
        if "log_probs" in batch:
            return batch.ragged("log_probs").values
        outputs = self.engine.forward(sequences, temperature=self._temperature)
        if outputs is None or outputs.log_probs is None:
            return torch.zeros(sequences.num_scored_tokens)
        return outputs.log_probs.cpu()

    def _is_stale(self, batch: Batch) -> bool:
        """Whether any row of any rank was drawn by other weights than the present ones; the same answer on every rank."""
        if "weight_version" not in batch:
            return False
        stale = (cast(Tensor, batch["weight_version"]) != self.weight_version).any().float().reshape(1).to(self.context.device)
        dist.all_reduce(stale, op=dist.ReduceOp.MAX)
        return bool(stale)

    @property
    def _temperature(self) -> float:
        sampling = self.config.generation.sampling
        return 1.0 if sampling.greedy else sampling.temperature

    def _probe_tolerance(self) -> float:
        if self.config.probe_tolerance >= 0:
            return self.config.probe_tolerance
        exact = self.config.train.precision is Precision.fp32 and self.config.generation.precision is Precision.fp32
        return 1e-3 if exact else 0.1

    def _sync_metrics(self) -> dict[str, float]:
        metrics = {"actor/weight_version": float(self.weight_version)}
        if self.last_sync is not None:
            metrics |= {f"sync/{name}": float(value) for name, value in asdict(self.last_sync).items()}
        return metrics


def torch_dtype(precision: Precision) -> torch.dtype:
    return torch.bfloat16 if precision is Precision.bf16 else torch.float32


def sample_seeds(seed: int, prompts: Batch) -> np.ndarray:
    """int64 [rows]: one seed for each (run, prompt's use, number of the sample), whatever rank or layout draws it."""
    uid = cast(Tensor, prompts["uid"]).numpy().astype(np.uint64)
    sample = cast(Tensor, prompts["sample"]).numpy().astype(np.uint64) if "sample" in prompts else np.zeros(len(uid), np.uint64)
    mixed = (
        (uid * np.uint64(0x9E3779B97F4A7C15)) ^ (sample * np.uint64(0xD1B54A32D192ED03)) ^ np.uint64((seed * 0x2545F4914F6CDD1D) % 2**64)
    )
    return (mixed >> np.uint64(1)).astype(np.int64)
