"""Gathering: files that lie in the memory of several nodes are copied to a directory that all nodes
see, without the processes that wrote them."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy


def gather(source: Path, target: Path, timeout_s: float) -> None:
    """Every node copies what it has of the directory `source` into `target`, at the same time.

    What a node that is lost, or slower than `timeout_s`, should have brought is not there; whoever
    calls this looks at what has come.
    """
    answers = []
    for node in ray.nodes():  # type: ignore[no-untyped-call]
        if node["Alive"]:
            strategy = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
            task = ray.remote(bring).options(
                num_cpus=0, scheduling_strategy=strategy, max_retries=0
            )
            answers.append(task.remote(str(source), str(target)))
    ray.wait(answers, num_returns=len(answers), timeout=timeout_s)


def bring(source: str, target: str) -> None:
    """Copies the files of a directory of this node, where it has one; a file is there whole or not
    at all."""
    if not Path(source).is_dir():
        return
    Path(target).mkdir(parents=True, exist_ok=True)
    for file in Path(source).iterdir():
        draft = Path(target) / f".{file.name}.{os.getpid()}"
        shutil.copyfile(file, draft)
        draft.replace(Path(target) / file.name)
