"""torch.compile of the decoder layers of a model, one by one.

All layers run the same code, so it is compiled once and serves each of them, whatever their number;
shapes are dynamic, so that rows of other lengths need no compilation of their own. Attention stays
as it is (attention.py): its kernels are picked by the segments of a micro-batch, and a graph that
knew those would be compiled anew for each. A layer is therefore cut in front of its attention and
behind it, and where tensor parallelism or FSDP exchanges tensors.
"""

from __future__ import annotations

import logging
import os
import shutil
from functools import partial

import torch
from torch import nn
from transformers import AttentionInterface, PreTrainedModel

from workers.engines.model.attention import ATTENTION, FUSED_ATTENTION, attend
from workers.engines.model.scored import decoder_layers

LOGGER = logging.getLogger(__name__)
BACKEND = "inductor"
MOST_VERSIONS = 64
"""Versions of a piece of code that are compiled: for passes with gradients and without, rows with
shared prompts and without, layers of different kinds, a single token. What would be one more runs
uncompiled."""


def compile_layers(model: PreTrainedModel) -> None:
    """Compiles each decoder layer at its first pass; before FSDP wraps them. Parameters keep their
    names."""
    compiler = os.environ.get("CXX", "g++")
    if shutil.which(compiler) is None:
        raise ValueError(
            f"train.compile is true, but there is no C++ compiler ({compiler}); install g++, set CXX, "
            "or set train.compile=false"
        )
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, MOST_VERSIONS)
    for name, fused in ((ATTENTION, False), (FUSED_ATTENTION, True)):
        AttentionInterface.register(name, torch.compiler.disable(partial(attend, fused=fused)))
    for layer in decoder_layers(model):
        assert isinstance(layer, nn.Module)
        layer.compile(dynamic=True, backend=BACKEND)
