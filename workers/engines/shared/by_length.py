"""ByLength: micro-batches that are shared by as few ranks of a row group as hold their rows."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup
from transformers import PretrainedConfig

from hybridflow.layout import Layout
from workers.config import ContextExchange, TrainConfig
from workers.engines.base import Head
from workers.engines.model.context_parallel import exchange_of
from workers.engines.shared.group_sizes import assign_groups, nested_sizes
from workers.engines.shared.micro_batches import (
    Cutting,
    MicroBatch,
    computed_widths,
    cut_rows,
    micro_batch_of,
    pad_time,
    pairs_of_rows,
    share_row,
)
from workers.engines.shared.rows_together import prompts_of, units
from workers.sequences import Sequences


class ByLength:
    """This rank's micro-batches of the rows of its row group:

    by_length = ByLength(layout, rank, model_config, config)      # collective
    micro_batches = by_length.micro_batches(sequences, Head.lm, cutting)
    """

    def __init__(
        self, layout: Layout, rank: int, model: PretrainedConfig, config: TrainConfig
    ) -> None:
        self._place = layout.coordinates(rank)["cp"]
        self._cp, self._tp = config.cp, config.tp
        # Of a layer's products, 12 hidden^2 weights a token, against 2 hidden products for each of
        # half the tokens before it.
        self._quadratic = 1 / (12 * int(model.get_text_config().hidden_size))
        self._exchanges: dict[int, ContextExchange] = {}
        self._groups: dict[int, ProcessGroup] = {}
        for size in nested_sizes(config.cp):
            self._exchanges[size] = exchange_of(model, replace(config, cp=size))
            if size > 1:
                self._groups[size] = _aligned_group(layout, size)

    def micro_batches(self, sequences: Sequences, head: Head, cutting: Cutting) -> list[MicroBatch]:
        """From the largest groups to the smallest, possibly none; cutting.budget_tokens is for each
        rank."""
        widths = computed_widths(sequences, head, cutting).numpy()
        near = np.arange(sequences.num_rows)
        if cutting.share_prompts:
            near = prompts_of(sequences).label

        def cut(rows: np.ndarray, budget_tokens: int) -> list[np.ndarray]:
            budget = replace(cutting, budget_tokens=budget_tokens)
            return [
                rows[part]
                for part in cut_rows(sequences.rows(torch.from_numpy(rows)), head, budget)
            ]

        assignments = assign_groups(
            widths,
            units(sequences.num_rows, pairs_of_rows(sequences)),
            near,
            cutting.budget_tokens,
            self._cp,
            cut,
            self._quadratic,
        )
        result = []
        for assignment in assignments:
            if self._place // assignment.size == assignment.place:
                whole = micro_batch_of(sequences, assignment.rows, head, cutting)
                result.append(self._share(whole, assignment.size))
        return result

    def _share(self, micro_batch: MicroBatch, size: int) -> MicroBatch:
        if size == 1:
            return pad_time(micro_batch, self._tp)
        return share_row(micro_batch, self._groups[size], self._exchanges[size], self._tp)


def _aligned_group(layout: Layout, size: int) -> ProcessGroup:
    """This rank's group of `size` neighbours along the context axis; collective."""
    groups = []
    for ranks in layout.groups("cp"):
        for first in range(0, len(ranks), size):
            groups.append(list(ranks[first : first + size]))
    group, _ = dist.new_subgroups_by_enumeration(groups)
    assert group is not None, "every rank is in one group"
    return group
