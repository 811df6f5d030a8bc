"""The algorithms by name: a file each, an entry here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import Any

from controllers.stepping import Algorithm, AlgorithmConfig
from controllers.streams import NoStream, Stream


@dataclass(frozen=True, slots=True)
class Entry:
    """Where an algorithm is and which models it uses."""

    module: str
    algorithm: str
    config: str
    roles: tuple[str, ...]
    streams: tuple[str, ...] = ()
    """What its steps draw besides their prompts (controllers/streams.py): prompts, pretraining."""

    def load(self) -> type[Algorithm]:
        found: type[Algorithm] = vars(import_module(self.module))[self.algorithm]
        return found

    def load_config(self) -> type[AlgorithmConfig]:
        found: type[AlgorithmConfig] = vars(import_module(self.module))[self.config]
        return found


ALGORITHMS: dict[str, Entry] = {
    "ppo": Entry("controllers.ppo", "PPO", "PPOConfig", ("actor", "critic", "reference", "reward")),
    "safe_rlhf": Entry(
        "controllers.safe_rlhf",
        "SafeRLHF",
        "SafeRLHFConfig",
        ("actor", "critic", "cost_critic", "reference", "reward", "cost"),
        streams=("pretraining",),
    ),
    "remax": Entry("controllers.remax", "ReMax", "ReMaxConfig", ("actor", "reference", "reward")),
    "rloo": Entry("controllers.rloo", "RLOO", "RLOOConfig", ("actor", "reference", "reward")),
    "reinforce_plus_plus": Entry(
        "controllers.reinforce_plus_plus", "ReinforcePlusPlus", "ReinforcePlusPlusConfig", ("actor", "reference", "reward")
    ),
    "reinforce_plus_plus_baseline": Entry(
        "controllers.reinforce_plus_plus_baseline",
        "ReinforcePlusPlusBaseline",
        "ReinforcePlusPlusBaselineConfig",
        ("actor", "reference", "reward"),
    ),
    "grpo": Entry("controllers.grpo", "GRPO", "GRPOConfig", ("actor", "reference", "reward")),
    "dr_grpo": Entry("controllers.grpo", "GRPO", "DrGRPOConfig", ("actor", "reference", "reward")),
    "gspo": Entry("controllers.grpo", "GRPO", "GSPOConfig", ("actor", "reference", "reward")),
    "cispo": Entry("controllers.grpo", "GRPO", "CISPOConfig", ("actor", "reference", "reward")),
    "clip_cov": Entry("controllers.grpo_cov", "CovarianceGRPO", "ClipCovConfig", ("actor", "reference", "reward")),
    "kl_cov": Entry("controllers.grpo_cov", "CovarianceGRPO", "KLCovConfig", ("actor", "reference", "reward")),
    "dapo": Entry("controllers.dapo", "DAPO", "DAPOConfig", ("actor", "reward"), streams=("prompts",)),
    "opo": Entry("controllers.opo", "OPO", "OPOConfig", ("actor", "reference", "reward")),
    "pass_at_k": Entry("controllers.pass_at_k", "PassAtK", "PassAtKConfig", ("actor", "reference", "reward")),
}


def algorithm_entry(name: str) -> Entry:
    """An unknown name is a ValueError that lists the known ones."""
    if name not in ALGORITHMS:
        raise ValueError(f"algorithm.name is {name!r}; known: {', '.join(ALGORITHMS)}")
    return ALGORITHMS[name]


def create_algorithm(
    name: str, roles: Mapping[str, Any], config: AlgorithmConfig, streams: Mapping[str, Stream] | None = None
) -> Algorithm:
    """The algorithm over its roles' handles (or their stand-ins) and its streams; tracing needs none."""
    entry = algorithm_entry(name)
    used: dict[str, Any] = {role: roles[role] for role in entry.roles}
    used |= {stream: NoStream() if streams is None else streams[stream] for stream in entry.streams}
    return entry.load()(**used, config=config)
