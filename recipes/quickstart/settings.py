"""The quickstart's settings, as a user would write them behind `python -m recipes.ppo`."""

from __future__ import annotations

COMMON = [
    "reward.function=recipes.quickstart.reward:exact_match",
    "num_devices=2",
    "actor.train.precision=fp32",
    "critic.train.precision=fp32",
    "reference.train.precision=fp32",
    "actor.generation.precision=fp32",
    "actor.generation.max_model_len=64",
    "actor.generation.sampling.max_response_tokens=8",
    "loop.stop_at_reward=0.95",
    "metrics.tensorboard=true",
]

SETTINGS: dict[str, list[str]] = {
    "ppo": [
        *COMMON,
        "data.batch_size=128",
        "algorithm.samples_per_prompt=4",
        "algorithm.num_mini_batches=2",
        "algorithm.kl.coefficient=0.01",
        "actor.train.optimizer.learning_rate=3e-4",
        "critic.train.optimizer.learning_rate=1e-3",
        "loop.num_steps=80",
    ],
    "grpo": [
        *COMMON,
        "data.batch_size=64",
        "algorithm.samples_per_prompt=8",
        "actor.train.optimizer.learning_rate=3e-4",
        "loop.num_steps=80",
    ],
}
"""recipe -> overrides."""
