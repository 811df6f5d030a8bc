"""Entry point of the job in test_job.py: two hosts and a gauge, until the file named by the first argument exists."""

from __future__ import annotations

import math
import sys
import time
from pathlib import Path

import ray

from cluster.connect import connect
from hybridflow.metrics import MetricsConfig, Tracker


@ray.remote(num_cpus=1)
class Host:
    def where(self) -> tuple[str, str]:
        import hybridflow

        return str(Path(hybridflow.__file__).parent), sys.executable


def main(stop: Path, output: Path) -> None:
    with connect(cpu_slots=2) as cluster:
        print(cluster.describe())
        hosts = [Host.options(name=f"main/{rank}[actor+critic]").remote() for rank in range(2)]  # type: ignore[attr-defined]
        for package, python in ray.get([host.where.remote() for host in hosts]):
            print(f"mode {cluster.mode}, package {package}, python {python}")
        with Tracker(MetricsConfig(prometheus=True, run="job"), output, total_steps=100) as tracker:
            for step in range(1, 101):
                tracker.log(step, {"reward/mean": 0.25, "kl (k3)": 1.5, "bad": math.inf, "seconds/step": 0.5})
                time.sleep(0.5)
                if stop.exists():
                    break


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
