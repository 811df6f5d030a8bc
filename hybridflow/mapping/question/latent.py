"""LatentAttention: the sizes of DeepSeek's attention, whose keys and values are rebuilt from a narrow
row."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class LatentAttention:
    """DeepSeek-V3: LatentAttention(query_rank=1536, kv_rank=512, rope_dim=64, nope_dim=128, value_dim=128)
    (DeepSeek-V2, 2405.04434, section 2.1)."""

    query_rank: int
    """Width of the row that queries are rebuilt from; 0: they are computed from the hidden state."""
    kv_rank: int
    """Width of the row that keys and values are rebuilt from."""
    rope_dim: int
    """Numbers of a head's query and key that are rotated; the key's are shared by all heads."""
    nope_dim: int
    """Those that are not."""
    value_dim: int

    @classmethod
    def from_hf(cls, config: Mapping[str, object]) -> LatentAttention | None:
        """Reads a config.json; None for another kind of attention."""
        sizes = []
        for key in ("kv_lora_rank", "qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim"):
            value = config.get(key)
            if not isinstance(value, int):
                return None
            sizes.append(value)
        query_rank = config.get("q_lora_rank")
        return cls(
            query_rank=query_rank if isinstance(query_rank, int) else 0,
            kv_rank=sizes[0],
            rope_dim=sizes[1],
            nope_dim=sizes[2],
            value_dim=sizes[3],
        )

    @property
    def head_dim(self) -> int:
        """Numbers of a head's query."""
        return self.rope_dim + self.nope_dim

    @property
    def cached(self) -> int:
        """Numbers that the KV cache of a layer holds for one token, on every tensor rank."""
        return self.kv_rank + self.rope_dim

    def parameters(self, hidden: int, heads: int) -> int:
        """The parameters of a layer's matrices."""
        queries = hidden * heads * self.head_dim
        if self.query_rank:
            queries = self.query_rank * (hidden + heads * self.head_dim)
        rebuilt = self.kv_rank * heads * (self.nope_dim + self.value_dim)
        return queries + hidden * self.cached + rebuilt + heads * self.value_dim * hidden
