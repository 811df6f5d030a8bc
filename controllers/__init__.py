"""The algorithms by name: a file each, an entry here. Other packages declare theirs as entry
points of the group hybridflow.algorithms, scripts and notebooks by register_algorithm()."""

from __future__ import annotations

import logging
from collections import ChainMap
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from controllers.algorithm_base import Algorithm, AlgorithmConfig
from controllers.streams import NoStream, Stream
from hybridflow.checkpoint import Best
from hybridflow.registry import Registry, load_object
from hybridflow.wording import kind_of

LOGGER = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class AlgorithmEntry:
    """Where an algorithm is, which models it uses, and what its rows are."""

    module: str
    algorithm: str
    config: str
    roles: tuple[str, ...]
    streams: tuple[str, ...] = ()
    """Rows that its steps draw besides their prompts (controllers/streams.py): prompts, pretraining."""
    rows: str = "prompts"
    """The rows that its steps begin with: a name in controllers.data.DATASETS. Rows that are no prompts
    are held out for its own evaluate()."""
    objective: str = "reward/mean"
    """The number of validation that the best checkpoint is chosen by."""
    best: Best = Best.max

    @property
    def answers_prompts(self) -> bool:
        """Whether its model answers prompts, so that validation can score responses."""
        return self.rows == "prompts"

    def load(self) -> type[Algorithm]:
        algorithm: type[Algorithm] = load_object(
            f"{self.module}:{self.algorithm}", "AlgorithmEntry.algorithm"
        )
        return algorithm

    def load_config(self) -> type[AlgorithmConfig]:
        config: type[AlgorithmConfig] = load_object(
            f"{self.module}:{self.config}", "AlgorithmEntry.config"
        )
        return config


ALGORITHMS: dict[str, AlgorithmEntry] = {
    "ppo": AlgorithmEntry(
        "controllers.ppo", "PPO", "PPOConfig", ("actor", "critic", "reference", "reward")
    ),
    "safe_rlhf": AlgorithmEntry(
        "controllers.safe_rlhf",
        "SafeRLHF",
        "SafeRLHFConfig",
        ("actor", "critic", "cost_critic", "reference", "reward", "cost"),
        streams=("pretraining",),
    ),
    "remax": AlgorithmEntry(
        "controllers.remax", "ReMax", "ReMaxConfig", ("actor", "reference", "reward")
    ),
    "rloo": AlgorithmEntry(
        "controllers.rloo", "RLOO", "RLOOConfig", ("actor", "reference", "reward")
    ),
    "reinforce_plus_plus": AlgorithmEntry(
        "controllers.reinforce_plus_plus",
        "ReinforcePlusPlus",
        "ReinforcePlusPlusConfig",
        ("actor", "reference", "reward"),
    ),
    "reinforce_plus_plus_baseline": AlgorithmEntry(
        "controllers.reinforce_plus_plus_baseline",
        "ReinforcePlusPlusBaseline",
        "ReinforcePlusPlusBaselineConfig",
        ("actor", "reference", "reward"),
    ),
    "grpo": AlgorithmEntry(
        "controllers.grpo", "GRPO", "GRPOConfig", ("actor", "reference", "reward")
    ),
    "dr_grpo": AlgorithmEntry(
        "controllers.grpo", "GRPO", "DrGRPOConfig", ("actor", "reference", "reward")
    ),
    "gspo": AlgorithmEntry(
        "controllers.grpo", "GRPO", "GSPOConfig", ("actor", "reference", "reward")
    ),
    "cispo": AlgorithmEntry(
        "controllers.grpo", "GRPO", "CISPOConfig", ("actor", "reference", "reward")
    ),
    "clip_cov": AlgorithmEntry(
        "controllers.grpo_cov", "CovarianceGRPO", "ClipCovConfig", ("actor", "reference", "reward")
    ),
    "kl_cov": AlgorithmEntry(
        "controllers.grpo_cov", "CovarianceGRPO", "KLCovConfig", ("actor", "reference", "reward")
    ),
    "dapo": AlgorithmEntry(
        "controllers.dapo", "DAPO", "DAPOConfig", ("actor", "reward"), streams=("prompts",)
    ),
    "opo": AlgorithmEntry("controllers.opo", "OPO", "OPOConfig", ("actor", "reference", "reward")),
    "pass_at_k": AlgorithmEntry(
        "controllers.pass_at_k", "PassAtK", "PassAtKConfig", ("actor", "reference", "reward")
    ),
    "distillation": AlgorithmEntry(
        "controllers.distillation", "Distillation", "DistillationConfig", ("actor", "teacher")
    ),
    "rejection_sampling": AlgorithmEntry(
        "controllers.rejection_sampling",
        "RejectionSampling",
        "RejectionSamplingConfig",
        ("actor", "reward"),
    ),
    "online_dpo": AlgorithmEntry(
        "controllers.online_dpo", "OnlineDPO", "OnlineDPOConfig", ("actor", "reference", "judge")
    ),
    "generative_reward": AlgorithmEntry(
        "controllers.generative_reward",
        "GenerativeReward",
        "GenerativeRewardConfig",
        ("actor", "reference", "judge"),
    ),
}


STAGES: dict[str, AlgorithmEntry] = {
    "sft": AlgorithmEntry(
        "controllers.sft",
        "SFT",
        "SFTConfig",
        ("policy",),
        rows="demonstrations",
        objective="loss",
        best=Best.min,
    ),
    "reward_model": AlgorithmEntry(
        "controllers.reward_model",
        "RewardModel",
        "RewardModelConfig",
        ("reward_model",),
        rows="pairs",
        objective="accuracy",
    ),
    "cost_model": AlgorithmEntry(
        "controllers.cost_model",
        "CostModel",
        "CostModelConfig",
        ("reward_model",),
        rows="safety_pairs",
        objective="accuracy",
    ),
    "dpo": AlgorithmEntry(
        "controllers.dpo",
        "DPO",
        "DPOConfig",
        ("policy", "reference"),
        rows="pairs",
        objective="accuracy",
    ),
}
"""Training on existing rows, before reinforcement learning or in place of it."""

QUESTIONS: dict[str, AlgorithmEntry] = {
    "evaluate": AlgorithmEntry(
        "controllers.evaluation", "Evaluate", "EvaluateConfig", ("generator", "reward")
    ),
    "generate": AlgorithmEntry(
        "controllers.evaluation", "Generate", "GenerateConfig", ("generator",)
    ),
}
"""Algorithms that ask a model without training it (recipes.evaluate, recipes.generate)."""

ENTRIES = ChainMap(QUESTIONS, STAGES, ALGORITHMS)
"""The built-in ones; iterates in the order of this file."""

EXTENSIONS = Registry(group="hybridflow.algorithms", builtin={})
"""Algorithms of other packages, each an AlgorithmEntry:

    [project.entry-points."hybridflow.algorithms"]
    mine = "my_package:MINE"
"""
REGISTERED: dict[str, AlgorithmEntry] = {}
"""Algorithms of this process: register_algorithm()."""


def register_algorithm(name: str, entry: AlgorithmEntry) -> None:
    """Adds an algorithm from a script or notebook, where no package is installed that declares
    it. The algorithm runs in this process alone, so no other one has to know it. A ValueError for
    what is no AlgorithmEntry, whose config can't be made, or whose name another one has; a cell
    that is run again may register its algorithm again."""
    if not isinstance(entry, AlgorithmEntry):
        raise ValueError(
            f"algorithm {name!r} is {kind_of(entry)} ({str(entry)[:60]!r}); register an "
            "AlgorithmEntry"
        )
    if name in ENTRIES:
        raise ValueError(f"algorithm {name!r} is built in; register yours under another name")
    other = EXTENSIONS.locations().get(name)
    if other is not None:
        raise ValueError(
            f"algorithm {name!r} is {other} of an installed package; register yours under another "
            "name"
        )
    known = REGISTERED.get(name)
    if known is not None and (known.module, known.algorithm) != (entry.module, entry.algorithm):
        raise ValueError(
            f"algorithm {name!r} is registered as {known.module}:{known.algorithm}; register yours "
            "under another name"
        )
    entry.load_config()
    REGISTERED[name] = entry


def algorithm_names() -> list[str]:
    """Every name that algorithm_entry() knows, the built-in ones first."""
    declared = EXTENSIONS.locations()
    clashes = [name for name in declared if name in ENTRIES]
    if clashes:
        raise ValueError(
            f"entry point group {EXTENSIONS.group}: {clashes[0]} ({declared[clashes[0]]}) is the name "
            "of a built-in algorithm; rename it in that package"
        )
    return list(dict.fromkeys([*ENTRIES, *REGISTERED, *declared]))


def algorithm_entry(name: str) -> AlgorithmEntry:
    """An unknown name is a ValueError that lists the known ones."""
    if name in ENTRIES:
        return ENTRIES[name]
    if name in REGISTERED:
        return REGISTERED[name]
    if name not in algorithm_names():
        raise ValueError(f"algorithm.name is {name!r}; known: {', '.join(algorithm_names())}")
    entry = EXTENSIONS.load(name, "algorithm.name")
    if not isinstance(entry, AlgorithmEntry):
        raise ValueError(
            f"algorithm.name is {name!r}, and {EXTENSIONS.locations()[name]} is no "
            f"{AlgorithmEntry.__module__}.{AlgorithmEntry.__name__}"
        )
    return entry


def usable_algorithms() -> dict[str, AlgorithmEntry]:
    """Every algorithm by name. One of another package that can't be imported is left out with a
    warning: it must not stop the runs that do not use it."""
    entries = {}
    for name in algorithm_names():
        try:
            entry = algorithm_entry(name)
            entry.load_config()
        except ValueError as error:
            LOGGER.warning("algorithm %s is left out: %s", name, error)
        else:
            entries[name] = entry
    return entries


def create_algorithm(
    name: str,
    roles: Mapping[str, Any],
    config: AlgorithmConfig,
    streams: Mapping[str, Stream] | None = None,
) -> Algorithm:
    """The algorithm over its roles' handles (or their stand-ins) and its streams; tracing needs
    none."""
    entry = algorithm_entry(name)
    used: dict[str, Any] = {role: roles[role] for role in entry.roles}
    if streams is None:
        used |= dict.fromkeys(entry.streams, NoStream())
    else:
        used |= {stream: streams[stream] for stream in entry.streams}
    return entry.load()(**used, config=config)
