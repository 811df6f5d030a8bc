"""Blocks of a batch's columns as plain JSON data, bit for bit, for the metadata of a checkpoint."""

from __future__ import annotations

import base64
from typing import Any

import numpy as np

from hybridflow.columns import Block


def packed(block: Block) -> dict[str, Any]:
    """packed(block) == {"dtype": "int64", "stored": "int64", "shape": [2], "data": "AQAAAA...",
    "lengths": [1, 1]}; objects must be JSON data themselves."""
    if block.dtype == "object":
        return {"dtype": "object", "data": block.data}
    data = np.ascontiguousarray(block.data)
    lengths = None
    if block.offsets is not None:
        lengths = np.diff(block.offsets).tolist()
    return {
        "dtype": block.dtype,
        "stored": str(data.dtype),
        "shape": list(data.shape),
        "data": base64.b64encode(data.tobytes()).decode(),
        "lengths": lengths,
    }


def unpacked(state: dict[str, Any]) -> Block:
    """The block of packed(), writable."""
    if state["dtype"] == "object":
        return Block(list(state["data"]), "object")
    values = np.frombuffer(base64.b64decode(state["data"]), dtype=state["stored"])
    offsets = None
    if state["lengths"] is not None:
        offsets = np.cumsum([0, *state["lengths"]], dtype=np.int64)
    return Block(values.reshape(state["shape"]).copy(), state["dtype"], offsets)
