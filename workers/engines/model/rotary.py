"""Rotary embeddings whose angles depend on the length of a row: dynamic NTK and longrope.

transformers takes the length from the largest position of a batch, and what a batch has left behind
stays for the next one. Here each row of a packed micro-batch has the angles that it has alone in a
fresh model, whatever it is packed with or comes after. Its length counts its last token, so a
language model computes that one too (micro_batches.py).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

LENGTH_ROPES = {"dynamic", "longrope"}
"""Rotary embeddings whose angles depend on the length of the longest row."""


def depends_on_length(config: PretrainedConfig) -> bool:
    """Whether the rotary angles of some layers depend on the length of a row."""
    rope = config.get_text_config().to_dict().get("rope_parameters") or {}
    kinds = {str(rope.get("rope_type"))}
    for value in rope.values():
        if isinstance(value, dict):  # settings that differ by the type of layer
            kinds.add(str(value.get("rope_type")))
    return bool(kinds & LENGTH_ROPES)


def follow_row_lengths(model: PreTrainedModel) -> None:
    """Give each row of a packed micro-batch its own angles; nothing for other rotary embeddings."""
    if not depends_on_length(model.config):
        return
    for module in model.modules():
        if "rope_type" in vars(module):
            module.forward = _by_row(module, module.forward)  # type: ignore[method-assign]


def _by_row(
    module: nn.Module, forward: Callable[..., tuple[Tensor, Tensor]]
) -> Callable[..., tuple[Tensor, Tensor]]:
    def run(
        x: Tensor, position_ids: Tensor, layer_type: str | None = None
    ) -> tuple[Tensor, Tensor]:
        options: dict[str, Any] = {} if layer_type is None else {"layer_type": layer_type}
        kind = vars(module)["rope_type"]
        kind = kind if layer_type is None else kind[layer_type]
        if kind not in LENGTH_ROPES:
            return forward(x, position_ids, **options)
        assert len(position_ids) == 1, "rows of one micro-batch that are not packed"
        lengths = _row_lengths(position_ids[0])
        limit = _original_length(module, layer_type)
        cos = sin = None
        for length in torch.unique(lengths.clamp(min=limit)).tolist():
            chosen = lengths.clamp(min=limit) == length
            _forget(module, layer_type)
            cos_part, sin_part = forward(x, position_ids[:, chosen], **options)
            if cos is None or sin is None:
                shape = (1, position_ids.shape[1], cos_part.shape[-1])
                cos, sin = cos_part.new_empty(shape), sin_part.new_empty(shape)
            cos[:, chosen], sin[:, chosen] = cos_part, sin_part
        assert cos is not None and sin is not None
        return cos, sin

    return run


def _row_lengths(positions: Tensor) -> Tensor:
    """int64 [tokens]: the tokens of the row that each one is in; a row begins at position 0."""
    row = torch.cumsum(positions == 0, 0)
    return torch.bincount(row)[row]


def _original_length(module: nn.Module, layer_type: str | None) -> int:
    """Tokens up to which a row has the angles of the shortest one."""
    config = vars(module)["config"]
    rope = config.rope_parameters if layer_type is None else config.rope_parameters[layer_type]
    kind = rope["rope_type"]
    if kind == "longrope":
        return int(rope["original_max_position_embeddings"])
    return int(vars(module)["original_max_seq_len"])


def _forget(module: nn.Module, layer_type: str | None) -> None:
    """The state of a fresh module: nothing of the rows before."""
    prefix = "" if layer_type is None else f"{layer_type}_"
    original = module.get_buffer(f"{prefix}original_inv_freq")
    module.register_buffer(f"{prefix}inv_freq", original, persistent=False)
    vars(module)[f"{prefix}max_seq_len_cached"] = vars(module)["original_max_seq_len"]
