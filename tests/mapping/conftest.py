"""What the mapping tests share: small models, clusters and workloads whose brute force is
feasible."""

from __future__ import annotations

import pytest

from hybridflow.mapping.question.cluster import Cluster
from hybridflow.mapping.question.workload import Lengths, Workload
from hybridflow.mapping.question.zoo import MODELS
from hybridflow.mapping.search.setting import Setting
from recipes.dataflows import PAPER


@pytest.fixture
def paper_setting():
    """paper_setting("llama-7b", 16): PPO on A100 nodes with the paper's workload."""

    def make(model: str, num_devices: int, algorithm: str = "ppo") -> Setting:
        policy = MODELS[model]
        scalar = policy.with_scalar_head()
        return Setting(
            dataflow=PAPER[algorithm],
            models={
                "actor": policy,
                "reference": policy,
                "critic": scalar,
                "reward": scalar,
                "cost": scalar,
            },
            cluster=Cluster.parse(f"{num_devices}xA100-80GB"),
            workload=Workload(
                batch_size=1024,
                prompt=Lengths.fixed(1024),
                response=Lengths.fixed(1024),
                num_mini_batches=8,
            ),
        )

    return make
