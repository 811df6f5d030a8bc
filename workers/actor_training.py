"""ActorTrainingWorker: the half of the actor that trains: a policy with the policy-gradient update.

It does not touch generation.
"""

from __future__ import annotations

from functools import partial
from itertools import islice

import torch.distributed as dist

from hybridflow.batch import Batch
from hybridflow.columns import Ragged
from hybridflow.context import RankContext
from hybridflow.results import Metrics, prefixed
from workers.columns import ROUTES
from workers.consistency import check_first_step
from workers.losses.config import OldPolicy
from workers.losses.language import with_pretraining
from workers.losses.policy import policy_loss
from workers.mini_batches import mean_over_steps, train_on
from workers.model_worker import sequences_of, with_routes
from workers.not_finite import SKIPPED
from workers.policy import PolicyWorker
from workers.role_config import ActorConfig, RouterReplay
from workers.roles import TrainingActor

PER_TOKEN = ("advantages", "rollout_log_probs", "ref_log_probs", "covariance_selected")


class ActorTrainingWorker(PolicyWorker, TrainingActor):
    config: ActorConfig
    prefix = "actor"

    def __init__(self, config: ActorConfig, context: RankContext) -> None:
        super().__init__(config, context)
        self.num_skipped = 0
        """Updates left out while the critic warms up."""

    def update_actor(self, batch: Batch) -> Metrics:
        config, loss = self.config, self.config.loss
        if self.num_skipped < config.critic_warmup_steps:
            self.num_skipped += 1
            return Metrics({"actor/critic_warmup_steps": float(self.num_skipped)})
        self.to_training()
        sequences = sequences_of(batch, PER_TOKEN)
        loss_fn = policy_loss(loss)
        if "pretrain" in batch:
            sequences = sequences.with_columns(
                per_row={"pretrain": sequences.of_segments(batch.tensor("pretrain"))}
            )
            loss_fn = with_pretraining(loss_fn, loss.pretraining_coefficient)
        if config.router_replay is RouterReplay.R3:
            sequences = with_routes(sequences, self._recorded_routes(batch))
        mini_batches = self.mini_batches(batch, sequences)
        if config.router_replay is RouterReplay.R2:
            self.add_routes(mini_batches)
        stale = self._is_stale(batch)
        # Every rank decides the same, because computing log-probs is collective.
        by_rollout = loss.old_policy is OldPolicy.rollout
        if by_rollout:
            mini_batches.add_columns(old_log_probs=batch.ragged("rollout_log_probs").values)
        elif "log_probs" in batch or config.num_epochs * mini_batches.num_labels > 1 or stale:
            self.add_old_log_probs(batch, mini_batches)
        entropy = config.report_entropy or loss.entropy_coefficient != 0
        steps = mini_batches.steps(
            config.num_epochs, self.update_seed, loss.aggregation, loss.aggregation_constant
        )
        train = partial(
            train_on,
            self.engine,
            mini_batches,
            loss_fn=loss_fn,
            not_finite=self.not_finite,
            entropy=entropy,
            temperature=self.temperature,
        )
        violations = {}
        self.not_finite.begin_update()
        with self.measured_memory() as memory:
            metrics = train(islice(steps, 1))
            comparable = "weight_version" in batch and not (stale or by_rollout)
            if comparable and SKIPPED not in metrics[0]:
                violations = check_first_step(metrics[0], config, reports=self.context.rank == 0)
            metrics += train(steps)
        self.num_updates += 1
        return (
            mean_over_steps(metrics, "actor")
            | {"actor/weight_version": float(self.weight_version)}
            | prefixed("actor", violations)
            | memory
        )

    def current_version(self) -> int:
        return self.weight_version

    def counters(self) -> dict[str, int]:
        return {**super().counters(), "num_skipped": self.num_skipped}

    def load_counters(self, counters: dict[str, int]) -> None:
        """Puts back what counters() returned."""
        super().load_counters(counters)
        self.num_skipped = counters["num_skipped"]

    def _recorded_routes(self, batch: Batch) -> Ragged:
        if ROUTES.name not in batch:
            raise ValueError(
                "actor.router_replay is R3, but the rows that are trained have no routes of the "
                "generation engine (rows of pretraining text never do); use R2 or off"
            )
        return batch.ragged(ROUTES.name)

    def _is_stale(self, batch: Batch) -> bool:
        """Whether any row of any rank was drawn by other weights than the present ones.
        Collective: the same answer on every rank."""
        if "weight_version" not in batch:
            return False
        differs = (batch.tensor("weight_version") != self.weight_version).any()
        stale = differs.float().reshape(1).to(self.context.device)
        dist.all_reduce(stale, op=dist.ReduceOp.MAX)
        return bool(stale)

    @property
    def temperature(self) -> float:
        sampling = self.config.generation.sampling
        return 1.0 if sampling.greedy else sampling.temperature
