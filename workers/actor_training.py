"""ActorTrainingWorker: the half of the actor that trains, by the policy gradient too. It knows nothing of
generation."""

from __future__ import annotations

from itertools import islice
from typing import cast

import torch.distributed as dist
from torch import Tensor

from hybridflow.batch import Batch
from hybridflow.context import RankContext
from hybridflow.results import Metrics
from workers.consistency import check_first_step
from workers.losses.language import with_pretraining
from workers.losses.policy import policy_loss
from workers.mini_batches import mean_over_steps, train_on
from workers.model_worker import sequences_of
from workers.policy import PolicyWorker
from workers.role_config import ActorConfig
from workers.roles import TrainingActor

PER_TOKEN = ("advantages", "rollout_log_probs", "ref_log_probs", "covariance_selected")


class ActorTrainingWorker(PolicyWorker, TrainingActor):
    config: ActorConfig
    prefix = "actor"

    def __init__(self, config: ActorConfig, context: RankContext) -> None:
        super().__init__(config, context)
        self.num_skipped = 0
        """Updates left out for the critic's warm-up."""

    def update_actor(self, batch: Batch) -> Metrics:
        config = self.config
        if self.num_skipped < config.critic_warmup_steps:
            self.num_skipped += 1
            return Metrics({"actor/critic_warmup_steps": float(self.num_skipped)})
        sequences = sequences_of(batch, PER_TOKEN)
        loss_fn = policy_loss(config.loss)
        if "pretrain" in batch:
            sequences = sequences.with_columns(per_row={"pretrain": cast(Tensor, batch["pretrain"])})
            loss_fn = with_pretraining(loss_fn, config.loss.pretraining_coefficient)
        mini_batches = self._mini_batches(batch, sequences)
        stale = self._is_stale(batch)
        if (
            "log_probs" in batch or config.num_epochs * mini_batches.num_labels > 1 or stale
        ):  # the same on every rank
            mini_batches.sequences = sequences.with_columns(
                per_token={"old_log_probs": self.old_log_probs(batch, sequences)}
            )
        entropy = config.report_entropy or config.loss.entropy_coefficient != 0
        steps = mini_batches.steps(
            config.num_epochs, self.weight_version, config.loss.aggregation, config.loss.aggregation_constant
        )
        metrics = train_on(
            self.engine, islice(steps, 1), loss_fn, entropy=entropy, temperature=self.temperature
        )
        checked = {"weight_version": float(self.weight_version + 1)}
        if "weight_version" in batch and not stale:
            checked |= check_first_step(metrics[0], config, reports=self.context.rank == 0)
        metrics += train_on(self.engine, steps, loss_fn, entropy=entropy, temperature=self.temperature)
        self.weight_version += 1
        return mean_over_steps(metrics, "actor") | {f"actor/{name}": value for name, value in checked.items()}

    def state(self) -> dict[str, int]:
        return {**super().state(), "num_skipped": self.num_skipped}

    def load_state(self, state: dict[str, int]) -> None:
        super().load_state(state)
        self.num_skipped = state["num_skipped"]

    def _is_stale(self, batch: Batch) -> bool:
        """Whether any row of any rank was drawn by other weights than the present ones; the same answer on
        every rank."""
        if "weight_version" not in batch:
            return False
        stale = (
            (cast(Tensor, batch["weight_version"]) != self.weight_version)
            .any()
            .float()
            .reshape(1)
            .to(self.context.device)
        )
        dist.all_reduce(stale, op=dist.ReduceOp.MAX)
        return bool(stale)

    @property
    def temperature(self) -> float:
        sampling = self.config.generation.sampling
        return 1.0 if sampling.greedy else sampling.temperature
