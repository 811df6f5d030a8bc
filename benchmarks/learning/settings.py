"""Settings of benchmarks.learning: algorithm -> what its recipe needs beside COMMON. An algorithm
joins with a line here.

Every step trains on 256 responses: prompts x samples. Learning rates and the like were chosen with
a few short runs, not searched.
"""

from __future__ import annotations

from recipes.quickstart.settings import COMMON as QUICKSTART
from recipes.rlhf.teachers import JUDGE_SETTINGS as JUDGE

COMMON = [
    *(setting for setting in QUICKSTART if not setting.startswith("metrics.")),
    "metrics.console=false",
    "loop.num_steps=24",
    "data.batch_size=32",
    "algorithm.samples_per_prompt=8",
]
"""The quickstart's, for GRPO's split of the budget."""

CRITIC = [
    "critic.train.precision=fp32",
    "critic.train.optimizer.learning_rate=3e-4",
    "critic.loss.clip=0.5",
]

SETTINGS: dict[str, list[str]] = {
    "ppo": [
        *CRITIC,
        "data.batch_size=64",
        "algorithm.samples_per_prompt=4",
        "algorithm.kl.coefficient=0.01",
    ],
    "safe_rlhf": [
        *CRITIC,
        *(setting.replace("critic", "cost_critic", 1) for setting in CRITIC),
        "cost.function=benchmarks.learning.cost:wrong_digits",
        "data.batch_size=64",
        "algorithm.samples_per_prompt=4",
        "algorithm.kl.coefficient=0.01",
    ],
    "remax": [
        "data.batch_size=256",
        "algorithm.samples_per_prompt=1",
        "algorithm.kl.coefficient=0.01",
    ],
    "rloo": ["algorithm.kl.coefficient=0.01"],
    "reinforce_plus_plus": [
        "data.batch_size=256",
        "algorithm.samples_per_prompt=1",
        "algorithm.kl.coefficient=0.01",
    ],
    "reinforce_plus_plus_baseline": ["actor.loss.kl_coefficient=0.01"],
    "grpo": ["actor.loss.kl_coefficient=0.01"],
    "dr_grpo": [],
    "gspo": ["actor.loss.clip_low=0.03", "actor.loss.clip_high=0.04"],
    "cispo": [],
    "clip_cov": ["algorithm.fraction=0.01"],
    "kl_cov": ["algorithm.fraction=0.01"],
    "dapo": ["algorithm.overlong_buffer_tokens=1"],
    "opo": ["algorithm.num_mini_batches=1"],
    "pass_at_k": ["algorithm.k=4"],
    "distillation": [
        "teacher.model.path={teacher}",
        "teacher.train.precision=fp32",
        "actor.train.optimizer.learning_rate=1e-4",
    ],
    "rejection_sampling": ["algorithm.min_reward=1", "actor.train.optimizer.learning_rate=3e-4"],
    "online_dpo": [*JUDGE, "judge.model.path={judge}"],
    "generative_reward": [*JUDGE, "judge.model.path={judge}", "actor.loss.kl_coefficient=0.01"],
}
