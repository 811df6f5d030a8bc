"""What recipes.evaluate and recipes.generate share: a data set's prompts through the generation
engine, over the pools of any run.

Leaves out resuming: what was answered before a crash is answered again.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import cast

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from rich.console import Console
from transformers import PreTrainedTokenizerBase

from controllers.evaluation import Generate
from hybridflow.batch import Batch
from hybridflow.progress import counted
from hybridflow.tracing import to_mermaid
from recipes.config import RunConfig
from recipes.placing import place
from recipes.preparation import check_dataflow, dry_run_report, prepare
from recipes.session import Session

CONSOLE = Console(stderr=True)


def answers(config: RunConfig) -> Iterator[tuple[Batch, PreTrainedTokenizerBase]]:
    """data.batch_size prompts at a time with their answers, each column already here; nothing
    for graph=true and dry_run=true."""
    if config.graph:
        print(to_mermaid(check_dataflow(place(config))))
        return
    check_samples(config)
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
            yield batch.local(batch.columns), prepared.tokenizer
            session.wait()


def check_samples(config: RunConfig) -> None:
    samples = config.algorithm.samples_per_prompt
    if samples > 1 and config.actor.generation.sampling.greedy:
        raise ValueError(
            f"algorithm.samples_per_prompt is {samples} with "
            "actor.generation.sampling.greedy=true: all samples would be the same; set "
            "actor.generation.sampling.greedy=false, and a temperature"
        )


def table(batch: Batch, tokenizer: PreTrainedTokenizerBase, *, log_probs: bool) -> pa.Table:
    """One row a response: prompt, response, finish_reason, sample, reward (where there is one),
    the data's columns, token ids."""
    extras = batch.objects("extras")
    columns = {
        "prompt": [
            prompt_text(tokenizer, ids.tolist()) for ids in batch.ragged("prompt_ids").unbind()
        ],
        "response": tokenizer.batch_decode(
            [ids.tolist() for ids in batch.ragged("response_ids").unbind()],
            skip_special_tokens=True,
        ),
        "finish_reason": batch.objects("finish_reason"),
        "row": batch.tensor("uid").tolist(),
        "sample": batch.tensor("sample").tolist(),
        "response_ids": [ids.tolist() for ids in batch.ragged("response_ids").unbind()],
    }
    if "rewards" in batch:
        columns["reward"] = batch.tensor("rewards").tolist()
        further = batch.objects("reward_metrics")
        names = dict.fromkeys(name for row in further for name in row)
        columns |= {f"reward/{name}": [row.get(name) for row in further] for name in names}
    if log_probs:
        columns["log_probs"] = [
            values.tolist() for values in batch.ragged("rollout_log_probs").unbind()
        ]
    columns |= {
        name: [row[name] for row in extras]
        for name in (extras[0] if extras else {})
        if name not in columns
    }
    return pa.table(columns)


def prompt_text(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> str:
    """The text whose tokens the prompt is: a beginning-of-sequence token that the tokenizer
    adds by itself is left out, or whoever reads the file would have two."""
    added = tokenizer("")["input_ids"][:1]
    return str(
        tokenizer.decode(
            ids[1:] if added and ids[:1] == added and added[0] == tokenizer.bos_token_id else ids
        )
    )


def write(tables: list[pa.Table], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.concat_tables(tables, promote_options="permissive"), path)
