"""The quickstart's settings, as a user would write them behind `python -m recipes.ppo`."""

from __future__ import annotations

from cluster.gpus import gpus
from recipes.config import Device, default_device
from recipes.quickstart.task import MAX_RESPONSE_TOKENS

MOST_DEVICES = 2


def devices() -> str:
    """The setting num_devices: both processes of a machine of two cores; on GPUs (the default where
    vLLM is installed for them) as many as there are, at most two."""
    count = MOST_DEVICES
    if default_device() is Device.cuda:
        count = max(1, min(count, len(gpus())))
    return f"num_devices={count}"


COMMON = [
    "reward.function=recipes.quickstart.reward:exact_match",
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
