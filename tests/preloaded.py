"""Imported by the server that ranks are forked from (ranks.py): nothing here starts a thread, and
neither vLLM, DeepSpeed nor Ray is among it."""

from __future__ import annotations

import pytest  # noqa: F401
import transformers.models.auto.modeling_auto  # noqa: F401

import workers.engines.fsdp.engine
import workers.engines.threed.engine
import workers.weight_sync  # noqa: F401
