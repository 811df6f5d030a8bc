"""The quickstart's settings, as a user would write them behind `python -m recipes.ppo`."""

from __future__ import annotations

from recipes.quickstart.task import MAX_RESPONSE_TOKENS

COMMON = [
    "reward.function=recipes.quickstart.reward:exact_match",
    "num_devices=2",
    "actor.train.precision=fp32",
    "reference.train.precision=fp32",
    "actor.generation.precision=fp32",
    "actor.generation.max_model_len=64",
    f"actor.generation.sampling.max_response_tokens={MAX_RESPONSE_TOKENS}",
    "actor.train.optimizer.learning_rate=5e-5",
    "algorithm.num_mini_batches=2",
    "loop.num_steps=40",
    "loop.validate_every=4",
    "metrics.tensorboard=true",
]

SETTINGS: dict[str, list[str]] = {
    "ppo": [
        *COMMON,
        "data.batch_size=64",
        "algorithm.samples_per_prompt=4",
        "algorithm.kl.coefficient=0.01",
        "critic.train.precision=fp32",
        "critic.train.optimizer.learning_rate=3e-4",
        "critic.loss.clip=0.5",
    ],
    "grpo": [
        *COMMON,
        "data.batch_size=32",
        "algorithm.samples_per_prompt=8",
        "actor.loss.kl_coefficient=0.01",
    ],
}
"""recipe -> overrides."""
