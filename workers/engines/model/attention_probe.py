"""Whether a family's code hands a packed row's segments on to its attention.

They travel as a keyword argument through the forward code of the model, and some families' layers
(Nemotron's) take all keywords and hand none on: sequences of a row would see each other, without a
word. One pass on the meta device, which ends at the first attention, tells.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

PROBE = "attention_probe"
_KNOWN: dict[type[PreTrainedModel], bool] = {}


class _Reached(Exception):
    """The first attention was called."""

    def __init__(self, packed: bool) -> None:
        super().__init__(packed)
        self.packed = packed


def hands_packing_on(model: PreTrainedModel) -> bool:
    """Whether `packing`, given to a model of this class, arrives at its attention."""
    kind = type(model)
    if kind not in _KNOWN:
        _KNOWN[kind] = _ask(kind, model)
    return _KNOWN[kind]


def _ask(kind: type[PreTrainedModel], model: PreTrainedModel) -> bool:
    config = copy.deepcopy(model.config)
    # Tables that depend on the row's length would read positions, which meta tensors have not.
    rope = vars(config.get_text_config()).get("rope_parameters") or {}
    for part in (rope, *rope.values()):
        if isinstance(part, dict) and "rope_type" in part:
            part["rope_type"] = "default"
    with torch.device("meta"):
        twin = kind._from_config(config, attn_implementation=PROBE)
        ids = torch.zeros(1, 2, dtype=torch.int64)
    try:
        twin.base_model(input_ids=ids, attention_mask=ids, use_cache=False, packing=True)
    except _Reached as reached:
        return reached.packed
    except RuntimeError:  # layers before it read numbers, which meta tensors have not
        return False
    return False


def _attend(*_arguments: Any, packing: object = None, **_: Any) -> None:
    raise _Reached(packing is not None)


def _no_mask(**_: Any) -> None:
    return None


AttentionInterface.register(PROBE, _attend)
AttentionMaskInterface.register(PROBE, _no_mask)
