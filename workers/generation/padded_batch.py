"""PaddedBatch: rows of the engine hf that are read together, padded on the left, with the keys and
values of what was read."""

from __future__ import annotations

from collections.abc import Sequence
from inspect import signature
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import pad
from transformers import DynamicCache, PretrainedConfig, PreTrainedModel
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from workers.engines.model.routers import Routers, experts_per_token
from workers.engines.model.routing import routing_of
from workers.engines.model.vision import ImageInputs, SeenImages, image_arguments
from workers.generation.rows import GrowingRow
from workers.sequences import Sequences

FREE_PADDING = 16
"""Tokens by which a row may be padded whatever its length: a pass more costs more than they."""


class PaddedBatch:
    """batch = PaddedBatch(model, rows)
    logits = batch.read()           # of the next token of every row
    batch.append(ids); batch.drop_finished()
    batch.join(PaddedBatch(...))    # after append: both have one token to read
    """

    def __init__(
        self,
        model: PreTrainedModel,
        rows: Sequence[GrowingRow],
        routers: Routers | None = None,
        images: ImageInputs | None = None,
    ) -> None:
        """`routers`: those of the model, where rows keep their routes. `images`: of a model that sees
        them."""
        self.rows = list(rows)
        self._routers = routers
        for row in rows:
            row.routes = []  # those of the whole prefix come with the first read
        self._model = model
        self._inputs, self._mask = left_padded([row.prefix for row in rows], model.device)
        self._positions = (self._mask.cumsum(dim=-1) - 1).clamp(min=0)
        self._cache = DynamicCache(config=model.config)
        named = signature(model.forward).parameters
        self._cache_name = "cache_params" if "cache_params" in named else "past_key_values"
        self._unread: dict[str, Any] = {}
        """Arguments of the first read besides the ids."""
        if images is not None:
            self._unread = image_arguments(self._seen(images), None)
            self._positions = self._unread.pop("position_ids", self._positions)

    def _seen(self, images: ImageInputs) -> SeenImages:
        """The images of all rows, and the positions of their tokens."""
        prefixes = [torch.from_numpy(row.prefix) for row in self.rows]
        lengths = torch.tensor([len(prefix) for prefix in prefixes])
        rows = Sequences(
            token_ids=torch.cat(prefixes),
            lengths=lengths,
            scored_lengths=torch.zeros_like(lengths),
            images=[row.images for row in self.rows],
        )
        read = self._mask.cpu().bool().flatten()
        places = torch.full(read.shape, -1)
        places[read] = torch.arange(len(rows.token_ids))
        shape = (self._mask.shape[0], self._mask.shape[1])
        return images.of(rows, places, shape).moved(lambda tensor: tensor.to(self._mask.device))

    def read(self) -> Tensor:
        """Reads the tokens that were not read yet; logits [rows, vocab] of those that follow."""
        if self._routers is None:
            return self._logits()
        rows, places = torch.nonzero(self._mask[:, -self._inputs.shape[1] :], as_tuple=True)
        width = self._inputs.shape[1]
        routing = routing_of(rows, places, rows * width + places, self._inputs.numel())
        with self._routers.recording():
            logits = self._logits(routing=routing)
        per_token = experts_per_token(self._model.config)
        recorded = routing.recorded(len(self._routers), per_token).cpu()
        counts = torch.bincount(rows, minlength=len(self.rows)).tolist()
        for row, part in zip(self.rows, recorded.split(counts), strict=True):
            if not row.finish_reason:
                row.routes.append(part.numpy())
        return logits

    def _logits(self, **arguments: Any) -> Tensor:
        outputs = self._model(
            input_ids=self._inputs,
            attention_mask=self._mask if self.joins else None,  # others have no padding
            position_ids=self._positions,
            use_cache=True,
            logits_to_keep=1,
            **{self._cache_name: self._cache},
            **arguments,
            **self._unread,
        )
        self._unread = {}
        logits: Tensor = outputs.logits[:, -1]
        return logits

    def append(self, ids: Tensor) -> None:
        """The next token [rows] of every row, to be read."""
        self._inputs, self._positions = ids.unsqueeze(-1), self._positions[..., -1:] + 1
        self._mask = torch.cat([self._mask, torch.ones_like(self._inputs)], dim=-1)

    @property
    def joins(self) -> bool:
        """Whether rows can come."""
        return keeps_single_tokens(self._cache)

    def join(self, other: PaddedBatch) -> None:
        """The rows of another batch come behind these."""
        self._align(max(self._mask.shape[1], other._mask.shape[1]))
        other._align(self._mask.shape[1])
        self.rows += other.rows
        self._inputs = torch.cat([self._inputs, other._inputs])
        self._positions = torch.cat([self._positions, other._positions], dim=-2)
        self._mask = torch.cat([self._mask, other._mask])
        for layer, more in zip(self._cache.layers, other._cache.layers, strict=True):
            if layer.is_initialized:
                layer.keys = torch.cat([layer.keys, more.keys])
                layer.values = torch.cat([layer.values, more.values])

    def drop_finished(self) -> None:
        """Rows that have ended leave, and the padding that only they needed."""
        places = [place for place, row in enumerate(self.rows) if not row.finish_reason]
        if len(places) == len(self.rows) or not places:
            return
        index = torch.tensor(places, device=self._mask.device)
        self.rows = [self.rows[place] for place in places]
        self._inputs = self._inputs[index]
        self._positions = self._positions.index_select(-2, index)
        self._mask = self._mask[index]
        self._cache.reorder_cache(index)
        if self.joins:
            self._align(int(self._mask.sum(dim=-1).max()))

    def _align(self, length: int) -> None:
        """Pad or cut at the left, to `length` columns with the one to be read."""
        self._mask = fit(self._mask.unsqueeze(-1), length).squeeze(-1)
        for layer in self._cache.layers:
            if not layer.is_initialized:
                continue  # it uses another layer's
            columns = length - 1
            if isinstance(layer, DynamicSlidingWindowLayer):
                layer.cumulative_length = columns
                columns = min(columns, layer.sliding_window - 1)
            layer.keys, layer.values = fit(layer.keys, columns), fit(layer.values, columns)


def keeps_single_tokens(cache: DynamicCache) -> bool:
    """Whether every layer keeps keys and values of single tokens, and nothing else."""
    plain = (DynamicLayer, DynamicSlidingWindowLayer)
    return all(type(layer) in plain for layer in cache.layers)


def joins(model: PretrainedConfig) -> bool:
    """Whether batches of this model can become one."""
    return keeps_single_tokens(DynamicCache(config=model))


def of_like_length(rows: Sequence[GrowingRow]) -> list[list[GrowingRow]]:
    """The rows, shortest first, cut so that reading them computes little padding: a row that was
    preempted late has a prefix many times as long as a new prompt."""
    result: list[list[GrowingRow]] = []
    most = 0
    for row in sorted(rows, key=lambda row: len(row.prefix)):
        length = len(row.prefix)
        if length > most:
            result.append([])
            most = length + length // 2 + FREE_PADDING
        result[-1].append(row)
    return result


def of_equal_length(rows: Sequence[GrowingRow]) -> list[list[GrowingRow]]:
    """The rows by their lengths: layers that carry a state would read padding into it."""
    groups: dict[int, list[GrowingRow]] = {}
    for row in rows:
        groups.setdefault(len(row.prefix), []).append(row)
    return list(groups.values())


def fit(tensor: Tensor, length: int) -> Tensor:
    """The last `length` entries of the dimension before the last, with zeros before them where
    there are fewer."""
    missing = length - tensor.shape[-2]
    if missing <= 0:
        return tensor[..., -missing:, :]
    return pad(tensor, (0, 0, missing, 0))


def left_padded(
    prefixes: Sequence[NDArray[np.int64]], device: torch.device
) -> tuple[Tensor, Tensor]:
    """Token ids and attention mask, int64 [rows, longest prefix], prefixes at the right end."""
    longest = max(len(prefix) for prefix in prefixes)
    ids = np.zeros((len(prefixes), longest), dtype=np.int64)
    mask = np.zeros_like(ids)
    for row, prefix in enumerate(prefixes):
        ids[row, longest - len(prefix) :] = prefix
        mask[row, longest - len(prefix) :] = 1
    return torch.from_numpy(ids).to(device), torch.from_numpy(mask).to(device)
