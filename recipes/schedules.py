"""with_schedules(): learning-rate schedules end with the run where their total_steps is left at its
default."""

from __future__ import annotations

from dataclasses import replace
from typing import TypeVar

from hybridflow.wording import counted
from recipes.config import RunConfig
from workers.config import LearningRateSchedule
from workers.role_config import ActorConfig, CriticConfig, PolicyConfig, PreferenceConfig

Trained = TypeVar("Trained", ActorConfig, CriticConfig, PolicyConfig, PreferenceConfig)


def with_schedules(config: RunConfig, num_steps: int) -> RunConfig:
    """The settings with ROLE.train.optimizer.total_steps filled in for a run of `num_steps`
    steps."""
    mini_batches = config.algorithm.num_mini_batches
    actor, critic, cost_critic = config.actor, config.critic, config.cost_critic
    if actor.critic_warmup_steps >= num_steps:
        raise ValueError(
            f"actor.critic_warmup_steps is {actor.critic_warmup_steps} in a run of "
            f"{counted(num_steps, 'steps')}, which would never train the actor; lower it, or raise "
            "loop.num_steps"
        )
    actor_updates = num_steps - actor.critic_warmup_steps
    return replace(
        config,
        actor=with_total_steps(actor, actor_updates * actor.num_epochs * mini_batches),
        critic=with_total_steps(critic, num_steps * critic.num_epochs * mini_batches),
        cost_critic=with_total_steps(
            cost_critic, num_steps * cost_critic.num_epochs * mini_batches
        ),
        policy=with_total_steps(
            config.policy, num_steps * config.policy.passes_per_batch * mini_batches
        ),
        reward_model=with_total_steps(config.reward_model, num_steps * mini_batches),
    )


def with_total_steps(role: Trained, total_steps: int) -> Trained:
    """The role's settings with that end of its schedule, unless they name one or the rate is
    constant."""
    optimizer = role.train.optimizer
    if optimizer.schedule is LearningRateSchedule.constant or optimizer.total_steps:
        return role
    train = replace(role.train, optimizer=replace(optimizer, total_steps=total_steps))
    return replace(role, train=train)
