"""What recipes.evaluate and recipes.generate share: a data set's prompts through the generation
engine, over the pools of any run.

Leaves out resuming: what was answered before a crash is answered again.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import cast

import numpy as np
from rich.console import Console

from controllers.evaluation import Generate
from hybridflow.batch import Batch
from hybridflow.progress import counted
from hybridflow.tracing import to_mermaid
from recipes.config import RunConfig
from recipes.placing import place
from recipes.preparation import Preparation, check_dataflow, dry_run_report, prepare
from recipes.session import Session

CONSOLE = Console(stderr=True)


def answers(config: RunConfig) -> Iterator[tuple[Batch, Preparation]]:
    """data.batch_size prompts at a time with their answers, each column already here; nothing
    for graph=true and dry_run=true."""
    if config.graph:
        print(to_mermaid(check_dataflow(place(config))))
        return
    prepared = prepare(config)
    if config.dry_run:
        print(dry_run_report(prepared))
        return
    prompts = prepared.train
    with Session(prepared) as session:
        algorithm = cast(Generate, session.algorithm)
        starts = range(0, len(prompts), config.data.batch_size)
        for start in counted(starts, "answering"):
            rows = np.arange(start, min(start + config.data.batch_size, len(prompts)))
            batch = algorithm.answer(prompts.rows(rows).repeat(config.algorithm.samples_per_prompt))
            yield batch.local(batch.columns), prepared
            session.wait()
