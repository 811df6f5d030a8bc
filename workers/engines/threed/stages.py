"""Stages: the slices of a Hugging Face model that one pipeline rank holds, run by the model's own
forward code.

The decoder keeps its full list of layers; those of other stages are replaced by modules that pass
their input on, so parameters keep their checkpoint names and the family's own forward (masks,
rotary embeddings, layer types, scaling) runs unchanged on every stage. On a stage that is not the
first, the embedding gives a placeholder of the right shape (only its shape and dtype are read, for
masks and positions) and the activations that arrived enter in the place of layer 0. The head and
the final norm exist on the last stage only, a vision tower on the first. Between stages an
activation is [rows, time / tp, hidden]: every tensor rank sends its own part.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from workers.engines.model.scored import ScoredModel, decoder_layers, layer_arguments
from workers.engines.model.split_plan import pipeline_plan
from workers.engines.model.tower import decoder_of, drop_tower
from workers.engines.model.vision import image_arguments
from workers.engines.shared.micro_batches import MicroBatch


class Stages:
    """stages.forward(stage, micro_batch, received) for the stages in `local`; the other stages'
    modules are dropped from the model."""

    def __init__(
        self,
        scored: ScoredModel,
        layers: list[range],
        local: list[int],
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.scored = scored
        self.base = scored.model.base_model
        self.decoder: Any = decoder_of(scored.model)
        self.num_stages = len(layers)
        self.local = local
        first, last = local[0] == 0, local[-1] == self.num_stages - 1
        self._received = _Received()
        config = scored.model.config
        names = list(pipeline_plan(config))
        self._first_name, self._last_name = names[0], names[-1]
        self._embedding = self.decoder.get_submodule(self._first_name)
        self._norm = self.decoder.get_submodule(self._last_name)
        hidden_size = int(config.get_text_config().hidden_size)
        self._placeholder = _Placeholder(hidden_size, dtype, device)
        all_layers = decoder_layers(scored.model)
        local_layers: set[int] = set()
        self._lists: dict[int, nn.ModuleList] = {}
        for stage in local:
            local_layers.update(layers[stage])
            stage_list = self._slice(all_layers, set(layers[stage]), stage > 0)
            self._lists[stage] = nn.ModuleList(stage_list)
        if not last:
            self._norm = nn.Identity()
            for name, child in scored.model.named_children():
                if child is not self.base:
                    setattr(scored.model, name, nn.Identity())
        if not first:
            self._embedding = self._placeholder
            drop_tower(scored.model)
        self._whole = nn.ModuleList(self._slice(all_layers, local_layers, False))
        self._attach(self._whole, self._embedding, self._norm)

    def forward(
        self,
        stage: int,
        micro_batch: MicroBatch,
        received: Tensor | None,
        *,
        entropy: bool,
        temperature: float,
    ) -> Tensor | dict[str, Tensor]:
        """Activations [rows, time / tp, hidden] for the next stage, or, of the last stage,
        ScoredModel's numbers."""
        is_last = stage == self.num_stages - 1
        ids, packing, images = micro_batch.input_ids, micro_batch.packing, micro_batch.images
        if images is not None and stage:
            images = images.without_pixels()
        self._received.value = received
        self._attach(
            self._lists[stage],
            self._placeholder if stage else self._embedding,
            self._norm if is_last else _PASS,
        )
        try:
            if is_last:
                reads, targets = micro_batch.read_positions, micro_batch.targets
                numbers: dict[str, Tensor] = self.scored(
                    ids,
                    reads,
                    targets,
                    packing=packing,
                    routing=micro_batch.routing,
                    images=images,
                    entropy=entropy,
                    temperature=temperature,
                )
                return numbers
            where = layer_arguments(packing, micro_batch.routing)
            if images is not None:
                where |= image_arguments(images, packing)
            hidden: Tensor = self.base(input_ids=ids, use_cache=False, **where).last_hidden_state
            return hidden
        finally:
            self._received.value = None
            self._attach(self._whole, self._embedding, self._norm)

    def _slice(self, layers: list[nn.Module], keep: set[int], receives: bool) -> list[nn.Module]:
        result: list[nn.Module] = [_PASS] * len(layers)
        for index in keep:
            result[index] = layers[index]
        if receives:
            result[0] = self._received
        return result

    def _attach(self, layers: nn.ModuleList, embedding: nn.Module, norm: nn.Module) -> None:
        self.decoder.layers = layers
        setattr(self.decoder, self._first_name, embedding)
        setattr(self.decoder, self._last_name, norm)


class _Pass(nn.Module):
    """A layer of another stage."""

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return hidden_states


_PASS = _Pass()


class _Received(nn.Module):
    """Stands where layer 0 would: gives what the stage before has sent."""

    value: Tensor | None = None

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        assert self.value is not None, "a later stage ran without the activations of the one before"
        return self.value


class _Placeholder(nn.Module):
    """Stands for the embedding on later stages: [rows, time, hidden] of zeros that take no
    memory."""

    def __init__(self, hidden_size: int, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        self.zero = torch.zeros((), dtype=dtype, device=device)
        self.hidden_size = hidden_size

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.zero.expand(*input_ids.shape, self.hidden_size)
