"""The size of a CPU's key/value cache, in bytes of a rank."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

from workers.config import Precision
from workers.generation.config import GenerationConfig

CPU_BLOCK_SIZE = 32
"""The smallest that vLLM's CPU attention takes: prompts share whole blocks only, and a response
wastes half a block."""
DEFAULT_CACHE_BYTES = 256 * 2**20
"""Where neither settings nor data say what is needed."""
MAX_CACHE_BYTES = 2 * 2**30
"""The most that is chosen for the rows of a step; further ones wait."""


def cache_bytes_of_rows(sizes: Mapping[str, Any], config: GenerationConfig, rows: int) -> int:
    """The cache that `rows` responses (at most max_num_seqs) of max_model_len tokens fill.

    `sizes`: the model's (loading.standard_sizes). Counted for attention with keys and values per
    head over the whole row: an upper bound for windows and for the compressed kinds. 0 for models
    without attention.
    """
    if "num_attention_heads" not in sizes:
        return 0
    heads = num_kv_heads(sizes)
    head_dim = sizes.get("head_dim") or sizes["hidden_size"] // sizes["num_attention_heads"]
    number_bytes = 4 if config.precision is Precision.fp32 else 2
    token_bytes = 2 * -(-heads // config.tp) * head_dim * number_bytes
    block = config.block_size or CPU_BLOCK_SIZE
    # Models with windows give each kind of layer blocks of its own, padded to the same number of
    # layers; one block stays empty.
    kinds = Counter(sizes.get("layer_types") or ["full"])
    layers = sizes["num_hidden_layers"]
    if len(kinds) > 1:
        layers = len(kinds) * max(kinds.values())
    blocks = min(rows, config.max_num_seqs) * -(-config.max_model_len // block) + 1 + len(kinds)
    return -(-layers // config.pp) * token_bytes * block * blocks


def cache_bytes(sizes: Mapping[str, Any], config: GenerationConfig) -> int:
    """The cache of an engine with these settings: no more than max_num_seqs rows can use."""
    chosen = config.kv_cache_bytes or DEFAULT_CACHE_BYTES
    if not config.max_model_len:
        return chosen
    if not config.kv_cache_bytes:
        chosen = max(chosen, cache_bytes_of_rows(sizes, config, 1))
    return min(chosen, cache_bytes_of_rows(sizes, config, config.max_num_seqs) or chosen)


def num_kv_heads(sizes: Mapping[str, Any]) -> int:
    """Key-value heads, in whichever way the family says it."""
    if sizes.get("multi_query") and not sizes.get(
        "new_decoder_architecture"
    ):  # Falcon, GPT-BigCode
        return 1
    for name in ("num_key_value_heads", "num_kv_heads"):
        if sizes.get(name):
            return int(sizes[name])
    return int(sizes["num_attention_heads"])
