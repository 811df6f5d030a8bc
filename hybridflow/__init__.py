"""HybridFlow: RLHF on Ray. Everything that a program of one's own needs comes from here
(docs/python.md).

    from hybridflow import open_session

    with open_session("grpo", ["model.path=...", "data.train=..."], reward=my_function) as session:
        for _ in range(100):
            print(session.step())
        session.save("out")

Names are imported when they are first used: `import hybridflow` loads neither torch nor Ray. This
module is the one exception to the rule that imports only point down: it is the front door of all
five packages, and nothing inside them imports from it.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from cluster.connect import ClusterConfig, connect
    from controllers import create_algorithm
    from controllers.algorithm_base import (
        Algorithm,
        AlgorithmConfig,
        Stateless,
        assign_mini_batches,
        batch_metrics,
    )
    from controllers.data import DataConfig, PromptDataset, RowLoader, load_tokenizer
    from controllers.loop import Loop, Outcome
    from controllers.loop_config import LoopConfig
    from hybridflow.batch import Batch
    from hybridflow.checkpoint import CheckpointStore
    from hybridflow.columns import Ragged, declare
    from hybridflow.context import RankContext
    from hybridflow.dataflow import CallKind
    from hybridflow.errors import WorkerDied, WorkerError, WorkerStuck
    from hybridflow.group import each, spawn, start
    from hybridflow.layout import Layout
    from hybridflow.local_pool import LocalPool
    from hybridflow.metrics import MetricsConfig, Tracker
    from hybridflow.pool import PoolSpec, ResourcePool
    from hybridflow.protocols import (
        ALL_TO_ALL,
        DP,
        ONE_TO_ALL,
        THREE_D,
        THREE_D_ALL_MICRO_DP,
        THREE_D_PP_ONLY,
        Arguments,
        Distribution,
        Protocol,
        Split,
    )
    from hybridflow.ray_pool import RayPool
    from hybridflow.results import Metrics, Results
    from hybridflow.tracing import on_controller
    from hybridflow.worker import Worker, remote
    from recipes.python_api import dry_run, evaluate, generate, graph, open_session, run
    from recipes.session import Session, current_session
    from workers.actor import ActorWorker
    from workers.config import ModelConfig, OptimizerConfig, Precision, TrainConfig
    from workers.critic import CriticWorker
    from workers.generation.config import GenerationConfig, SamplingConfig
    from workers.losses.config import PolicyLossConfig, ValueLossConfig
    from workers.reference import ReferenceWorker
    from workers.reward import FunctionRewardWorker, ModelRewardWorker
    from workers.role_config import ActorConfig, CriticConfig, ReferenceConfig, RewardConfig
    from workers.roles import (
        Actor,
        Cost,
        Critic,
        Generator,
        Policy,
        PreferenceModel,
        Reference,
        Reward,
    )

__all__ = [
    "ALL_TO_ALL",
    "DP",
    "ONE_TO_ALL",
    "THREE_D",
    "THREE_D_ALL_MICRO_DP",
    "THREE_D_PP_ONLY",
    "Actor",
    "ActorConfig",
    "ActorWorker",
    "Algorithm",
    "AlgorithmConfig",
    "Arguments",
    "Batch",
    "CallKind",
    "CheckpointStore",
    "ClusterConfig",
    "Cost",
    "Critic",
    "CriticConfig",
    "CriticWorker",
    "DataConfig",
    "Distribution",
    "FunctionRewardWorker",
    "GenerationConfig",
    "Generator",
    "Layout",
    "LocalPool",
    "Loop",
    "LoopConfig",
    "Metrics",
    "MetricsConfig",
    "ModelConfig",
    "ModelRewardWorker",
    "OptimizerConfig",
    "Outcome",
    "Policy",
    "PolicyLossConfig",
    "PoolSpec",
    "Precision",
    "PreferenceModel",
    "PromptDataset",
    "Protocol",
    "Ragged",
    "RankContext",
    "RayPool",
    "Reference",
    "ReferenceConfig",
    "ReferenceWorker",
    "ResourcePool",
    "Results",
    "Reward",
    "RewardConfig",
    "RowLoader",
    "SamplingConfig",
    "Session",
    "Split",
    "Stateless",
    "Tracker",
    "TrainConfig",
    "ValueLossConfig",
    "Worker",
    "WorkerDied",
    "WorkerError",
    "WorkerStuck",
    "assign_mini_batches",
    "batch_metrics",
    "connect",
    "create_algorithm",
    "current_session",
    "declare",
    "dry_run",
    "each",
    "evaluate",
    "generate",
    "graph",
    "load_tokenizer",
    "on_controller",
    "open_session",
    "remote",
    "run",
    "spawn",
    "start",
]

_NAMES_OF = {
    "cluster.connect": (
        "ClusterConfig",
        "connect",
    ),
    "controllers": ("create_algorithm",),
    "controllers.algorithm_base": (
        "Algorithm",
        "AlgorithmConfig",
        "Stateless",
        "assign_mini_batches",
        "batch_metrics",
    ),
    "controllers.data": (
        "DataConfig",
        "PromptDataset",
        "RowLoader",
        "load_tokenizer",
    ),
    "controllers.loop": (
        "Loop",
        "Outcome",
    ),
    "controllers.loop_config": ("LoopConfig",),
    "hybridflow.batch": ("Batch",),
    "hybridflow.checkpoint": ("CheckpointStore",),
    "hybridflow.columns": (
        "Ragged",
        "declare",
    ),
    "hybridflow.context": ("RankContext",),
    "hybridflow.dataflow": ("CallKind",),
    "hybridflow.errors": (
        "WorkerDied",
        "WorkerError",
        "WorkerStuck",
    ),
    "hybridflow.group": (
        "each",
        "spawn",
        "start",
    ),
    "hybridflow.layout": ("Layout",),
    "hybridflow.metrics": (
        "MetricsConfig",
        "Tracker",
    ),
    "hybridflow.local_pool": ("LocalPool",),
    "hybridflow.pool": (
        "PoolSpec",
        "ResourcePool",
    ),
    "hybridflow.protocols": (
        "ALL_TO_ALL",
        "DP",
        "ONE_TO_ALL",
        "THREE_D",
        "THREE_D_ALL_MICRO_DP",
        "THREE_D_PP_ONLY",
        "Arguments",
        "Distribution",
        "Protocol",
        "Split",
    ),
    "hybridflow.ray_pool": ("RayPool",),
    "hybridflow.results": (
        "Metrics",
        "Results",
    ),
    "hybridflow.tracing": ("on_controller",),
    "hybridflow.worker": (
        "Worker",
        "remote",
    ),
    "recipes.python_api": (
        "dry_run",
        "evaluate",
        "generate",
        "graph",
        "open_session",
        "run",
    ),
    "recipes.session": (
        "Session",
        "current_session",
    ),
    "workers.actor": ("ActorWorker",),
    "workers.config": (
        "ModelConfig",
        "OptimizerConfig",
        "Precision",
        "TrainConfig",
    ),
    "workers.critic": ("CriticWorker",),
    "workers.generation.config": (
        "GenerationConfig",
        "SamplingConfig",
    ),
    "workers.losses.config": (
        "PolicyLossConfig",
        "ValueLossConfig",
    ),
    "workers.reference": ("ReferenceWorker",),
    "workers.reward": (
        "FunctionRewardWorker",
        "ModelRewardWorker",
    ),
    "workers.role_config": (
        "ActorConfig",
        "CriticConfig",
        "ReferenceConfig",
        "RewardConfig",
    ),
    "workers.roles": (
        "Actor",
        "Cost",
        "Critic",
        "Generator",
        "Policy",
        "PreferenceModel",
        "Reference",
        "Reward",
    ),
}
"""Module -> what comes from it; the imports above say the same to type checkers."""
_MODULE_OF = {name: module for module, names in _NAMES_OF.items() for name in names}


def __getattr__(name: str) -> object:
    if name not in _MODULE_OF:
        raise AttributeError(f"module 'hybridflow' has no {name!r}; it has {', '.join(__all__)}")
    value: object = vars(import_module(_MODULE_OF[name]))[name]
    globals()[name] = value  # the next use finds it without coming here
    return value


def __dir__() -> list[str]:
    return __all__
