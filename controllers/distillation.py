"""On-policy distillation (Agarwal et al. 2024, GKD with lambda = 1; Gu et al. 2024, MiniLLM):
the student answers, and at every token of its own answer the teacher says how likely it would
have been. No reward; validation may use one."""

from __future__ import annotations

from dataclasses import dataclass

from controllers.algorithm_base import (
    AlgorithmConfig,
    Stateless,
    assign_mini_batches,
    batch_metrics,
)
from hybridflow.batch import Batch
from hybridflow.results import Metrics
from workers.roles import Actor, Reference


@dataclass(kw_only=True)
class DistillationConfig(AlgorithmConfig):
    name: str = "distillation"
    samples_per_prompt: int = 4


class Distillation(Stateless):
    """Reverse KL per token, each position by itself (workers/losses/language.py); the teacher
    shares the student's vocabulary."""

    def __init__(self, *, actor: Actor, teacher: Reference, config: DistillationConfig) -> None:
        self.actor, self.teacher, self.config = actor, teacher, config

    def step(self, prompts: Batch) -> Metrics:
        batch = prompts | self.actor.generate_sequences(prompts)
        batch |= self.teacher.compute_ref_log_prob(batch).rename(ref_log_probs="teacher_log_probs")
        batch |= assign_mini_batches(batch, self.config)
        return batch_metrics(batch) | self.actor.update_distilled(batch)
