"""ModelSpec: the sizes of a decoder, from which time and memory follow; read from any Hugging Face
config.

Dense and mixture-of-experts decoders, grouped-query and latent attention, gated or plain MLPs, an LM
head or a scalar head. Left out: biases and norms are counted roughly (below 0.1 % of a model),
encoders and state-space layers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

from hybridflow.mapping.question.adapter import AdapterSpec
from hybridflow.mapping.question.files import read_json
from hybridflow.mapping.question.latent import LatentAttention

PLAIN_MLP_TYPES = (
    "apertus",
    "arcee",
    "bloom",
    "codegen",
    "falcon",
    "gpt2",
    "gpt_bigcode",
    "gpt_neo",
    "gpt_neox",
    "gptj",
    "mpt",
    "nemotron",
    "opt",
    "persimmon",
    "phi",
    "starcoder2",
)
"""Model types whose MLP has two matrices; all others are taken to be gated (three)."""
GATED_ATTENTION_TYPES = ("afmoe",)
"""Model types whose attention's output is multiplied with a gate of its input."""
SHARED_AS_DENSE_TYPES = ("hunyuan_v1_moe", "llama4_text")
"""Model types whose layers with experts have one more of that size, which every token passes."""


@dataclass(frozen=True, kw_only=True)
class ModelSpec:
    """A decoder-only model.

    config = {"model_type": "llama", "num_hidden_layers": 32, "hidden_size": 4096, "num_attention_heads": 32,
              "intermediate_size": 11008, "vocab_size": 32000}
    ModelSpec.from_hf(config, name="llama-7b").num_parameters  # 6.74e9
    """

    name: str
    num_layers: int
    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    """Inner size of a dense layer's MLP."""
    vocab_size: int
    tied_embeddings: bool = False
    gated_mlp: bool = True
    num_experts: int = 0
    """Experts of a mixture-of-experts layer; 0 for a dense model."""
    experts_per_token: int = 0
    expert_intermediate_size: int = 0
    shared_intermediate_size: int = 0
    """Inner size of the experts that every token passes."""
    num_dense_layers: int = 0
    """Layers of a mixture-of-experts model that are dense."""
    tower_parameters: int = 0
    """Parameters of a vision tower, which lies beside the embedding."""
    tower_trains: bool = True
    """False: it is frozen."""
    gated_attention: bool = False
    """Attention has one more matrix, as large as the queries'."""
    num_convolution_layers: int = 0
    """Layers with a short convolution and two matrices [3 hidden, hidden] and [hidden, hidden] in place of
    attention (LFM2); they keep no keys and values."""
    latent: LatentAttention | None = None
    """Attention of DeepSeek's kind; head_dim is then that of its queries."""
    scalar_head: bool = False
    """One number per token in place of the vocabulary (critic, reward, cost)."""
    adapter: AdapterSpec | None = None
    """Trained in place of the weights, which are frozen."""
    base: str = ""
    """A name of the frozen weights: roles of a pool with the same one and the same layout have them
    in memory once."""

    def __post_init__(self) -> None:
        sizes = {
            "num_layers": self.num_layers,
            "hidden_size": self.hidden_size,
            "num_heads": self.num_heads,
            "num_kv_heads": self.num_kv_heads,
            "head_dim": self.head_dim,
            "vocab_size": self.vocab_size,
        }
        for name, value in sizes.items():
            if value < 1:
                raise ValueError(f"model {self.name}: {name} is {value}; it must be at least 1")
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"model {self.name}: num_kv_heads {self.num_kv_heads} does not divide num_heads "
                f"{self.num_heads}"
            )
        if self.num_experts and not 1 <= self.experts_per_token <= self.num_experts:
            raise ValueError(
                f"model {self.name}: experts_per_token {self.experts_per_token} is outside "
                f"1..{self.num_experts}"
            )

    @classmethod
    def from_hf(cls, config: Mapping[str, object], *, name: str = "") -> ModelSpec:
        """Reads the content of a config.json; errors name the missing key."""
        text = config.get("text_config")
        if isinstance(text, Mapping):
            return cls.from_hf(text, name=name)
        heads = _integer(config, "num_attention_heads", "n_head", "n_heads")
        hidden = _integer(config, "hidden_size", "n_embd", "d_model")
        experts = _integer(
            config, "num_local_experts", "num_experts", "n_routed_experts", default=0
        )
        inner = _integer(config, "intermediate_size", "n_inner", "ffn_dim", default=4 * hidden)
        latent = LatentAttention.from_hf(config)
        width = hidden // heads if latent is None else latent.head_dim
        dense = cls(
            name=name or str(config.get("_name_or_path") or config.get("model_type", "model")),
            num_layers=_integer(config, "num_hidden_layers", "n_layer", "n_layers"),
            hidden_size=hidden,
            num_heads=heads,
            num_kv_heads=_integer(config, "num_key_value_heads", "num_kv_heads", default=heads),
            head_dim=width if latent else _integer(config, "head_dim", default=width),
            latent=latent,
            intermediate_size=inner,
            vocab_size=_integer(config, "vocab_size"),
            tied_embeddings=bool(config.get("tie_word_embeddings", False)),
            gated_mlp=config.get("model_type") not in PLAIN_MLP_TYPES,
            gated_attention=config.get("model_type") in GATED_ATTENTION_TYPES,
            num_convolution_layers=_convolution_layers(config),
        )
        if not experts:
            return dense
        expert_inner = _integer(config, "moe_intermediate_size", default=inner)
        shared = expert_inner * _integer(
            config,
            "n_shared_experts",
            "num_shared_experts",
            "moe_num_shared_experts",
            default=int(config.get("model_type") in SHARED_AS_DENSE_TYPES),
        )
        return replace(
            dense,
            intermediate_size=_integer(config, "intermediate_size_mlp", default=inner),
            num_experts=experts,
            experts_per_token=_most(config, "num_experts_per_tok", "moe_topk", "top_k_experts"),
            expert_intermediate_size=expert_inner,
            shared_intermediate_size=_integer(
                config,
                "shared_expert_intermediate_size",
                "shared_intermediate_size",
                default=shared,
            ),
            num_dense_layers=_dense_layers(config, dense.num_layers),
        )

    @classmethod
    def from_directory(cls, path: str | Path) -> ModelSpec:
        """Reads a Hugging Face directory or a config.json."""
        path = Path(path)
        directory, file = (path, path / "config.json") if path.is_dir() else (path.parent, path)
        if not file.is_file():
            raise ValueError(
                f"model path {str(path)!r} holds no config.json; give a Hugging Face directory, a "
                "config.json or a known name"
            )
        return cls.from_hf(read_json(file, "model config"), name=directory.name)

    def with_scalar_head(self) -> ModelSpec:
        """The same decoder as a critic or reward model."""
        return replace(self, scalar_head=True)

    def with_adapter(self, rank: int, *, base: str = "", sent_alone: bool = True) -> ModelSpec:
        """The same decoder, frozen, with an adapter on every linear layer but the head."""
        hidden, inner = self.hidden_size, self.active_intermediate_size
        columns: list[tuple[float, float]] = [(hidden, self.query_dim)]
        columns += [(hidden, self.kv_dim)] * 2
        columns += [(hidden, inner)] * (self._mlp_matrices - 1)
        rows = [(self.query_dim, hidden), (inner, hidden)]
        adapter = AdapterSpec.of(rank, columns=columns, rows=rows, sent_alone=sent_alone)
        return replace(self, adapter=adapter, base=base)

    @cached_property
    def adapter_parameters(self) -> float:
        """Parameters of the adapter; 0 without one."""
        if self.adapter is None:
            return 0.0
        return self.num_layers * (self.adapter.whole + self.adapter.cut)

    @cached_property
    def sent_parameters(self) -> float:
        """Parameters that a weight sync sends."""
        if self.adapter is not None and self.adapter.sent_alone:
            return self.adapter_parameters
        return self.num_parameters

    def longest_stage(self, num_stages: int) -> int:
        """Layers of the slowest pipeline stage: one more where the stages do not divide them."""
        return -(-self.num_layers // num_stages)

    @cached_property
    def query_dim(self) -> int:
        return self.num_heads * self.head_dim

    @cached_property
    def kv_dim(self) -> int:
        return self.num_kv_heads * self.head_dim

    @cached_property
    def attention_parameters(self) -> int:
        """Parameters of a layer's query, key, value and output matrices, averaged over the layers."""
        if self.latent is not None:
            return self.latent.parameters(self.hidden_size, self.num_heads)
        queries = 3 if self.gated_attention else 2
        attention = self.hidden_size * (queries * self.query_dim + 2 * self.kv_dim)
        convolution = 4 * self.hidden_size**2
        return round(self._mean(attention, convolution))

    @cached_property
    def layer_parameters(self) -> float:
        """Parameters of a layer, averaged over the layers."""
        if not self.num_experts:
            return self.attention_parameters + self._mlp(self.intermediate_size)
        dense = self.num_dense_layers * self._mlp(self.intermediate_size)
        expert = self._mlp(self.expert_intermediate_size) * self.num_experts + self._mlp(
            self.shared_intermediate_size
        )
        return self.attention_parameters + (dense + self._moe_layers * expert) / self.num_layers

    @cached_property
    def routed_parameters(self) -> float:
        """Parameters of a layer's experts, shared ones aside, averaged over the layers."""
        routed = self._mlp(self.expert_intermediate_size) * self.num_experts
        return routed * self._moe_layers / self.num_layers

    @cached_property
    def routed_rows(self) -> float:
        """Rows of hidden states that a layer sends to experts for a token, averaged over the layers."""
        return self.experts_per_token * self._moe_layers / self.num_layers

    @cached_property
    def attended_flops(self) -> float:
        """FLOPs of a layer's attention for a token and a position that it attends to."""
        if self.latent is not None:
            return 2.0 * self.num_heads * (self.latent.head_dim + self.latent.value_dim)
        return self._mean(4.0 * self.query_dim, 0.0)

    @cached_property
    def active_layer_parameters(self) -> float:
        """Parameters of a layer that a token is multiplied with, averaged over the layers."""
        return self.attention_parameters + self._mlp(1) * self.active_intermediate_size

    @cached_property
    def active_intermediate_size(self) -> float:
        """Inner MLP size that a token passes, averaged over the layers."""
        if not self.num_experts:
            return self.intermediate_size
        moe = self.experts_per_token * self.expert_intermediate_size + self.shared_intermediate_size
        return (
            self.num_dense_layers * self.intermediate_size + self._moe_layers * moe
        ) / self.num_layers

    def touched_layer_parameters(self, num_tokens: float) -> float:
        """Parameters of a layer that a pass over `num_tokens` tokens reads: all of a dense
        layer; in a mixture those of the expected number of distinct experts, E (1 - (1 -
        k/E)^tokens) for tokens that choose k of E experts evenly."""
        if not self.num_experts:
            return self.layer_parameters
        share: float = 1.0 - (1.0 - self.experts_per_token / self.num_experts) ** max(
            num_tokens, 1.0
        )
        return self.layer_parameters - self.routed_parameters * (1.0 - share)

    @cached_property
    def embedding_parameters(self) -> int:
        """Those before the first layer: the embedding, and a vision tower."""
        return self.vocab_size * self.hidden_size + self.tower_parameters

    @cached_property
    def head_parameters(self) -> int:
        """Size of the matrix that the head multiplies with, tied to the embedding or not."""
        return self.hidden_size if self.scalar_head else self.vocab_size * self.hidden_size

    @cached_property
    def num_parameters(self) -> float:
        total = self.num_layers * self.layer_parameters + self.embedding_parameters
        if self.tied_embeddings and not self.scalar_head:
            return total
        return total + self.head_parameters

    @cached_property
    def kv_elements_per_token(self) -> int:
        """Numbers that the KV cache of all layers holds for one token (keys and values, or what they
        are rebuilt from)."""
        if self.latent is not None:
            return self.num_layers * self.latent.cached
        return 2 * (self.num_layers - self.num_convolution_layers) * self.kv_dim

    @cached_property
    def activation_elements_per_token(self) -> float:
        """Numbers that pass through a layer's element-wise operations, per token (method of
        Korthikanti et al. 2022, section 4.1, for a gated MLP and an attention that does not store
        its score matrix): inputs of two norms and of attention and MLP (4 h), queries and
        attention output (2 q), keys and values (2 kv), MLP's inner tensors (3 f; 2 f without a
        gate)."""
        inner = self._mlp_matrices * self.active_intermediate_size
        return 4 * self.hidden_size + 2 * self.query_dim + 2 * self.kv_dim + inner

    @cached_property
    def stored_elements_per_token(self) -> float:
        """Numbers that a layer stores for its backward pass, per token, in the precision that it
        computes in: each of two norms its input, the normalised input and the result, which the
        next product reads (6 h); queries and attention output (2 q), keys and values (2 kv); the
        MLP's gate before and after its activation, the other factor and their product (4 f; 2 f
        without a gate); of k experts what goes in and what comes out (2 k h)."""
        inner = 4 if self.gated_mlp else 2
        return (
            6 * self.hidden_size
            + 2 * self.query_dim
            + 2 * self.kv_dim
            + inner * self.active_intermediate_size
            + 2 * self.routed_rows * self.hidden_size
        )

    def stored_bytes_per_token(
        self, number_bytes: float, *, compiled: bool = False, remade: bool = False
    ) -> float:
        """Bytes that a layer stores for its backward pass, per token. Norms compute in float32:
        under half precision they store their input and its normalised form as such (4 h more).
        `remade`: a dense gated MLP makes what it computes of its two factors again (2 f less).

        A compiled layer computes again what takes no product: the normalised inputs of two norms (2
        h, and half of the float32 ones) and the MLP's gate after its activation (f). Norms that are
        not trained need no normalised input (2 h).
        """
        elements, float32 = self.stored_elements_per_token, 2.0
        if self.adapter is not None and not compiled:
            elements -= 2 * self.hidden_size
        if compiled:
            elements -= 2 * self.hidden_size
            elements -= self.active_intermediate_size if self.gated_mlp else 0
            float32 = 1.0
        elif remade and self.gated_mlp and not self.num_experts:
            elements -= 2 * self.intermediate_size
        stored = number_bytes * elements
        if number_bytes < 4:
            stored += float32 * 4 * self.hidden_size
        return stored

    def norm_bytes_per_token(self, number_bytes: float) -> float:
        """Bytes that one norm stores, per token: its input, the normalised input and the result, the
        first two in float32."""
        float32 = 2 * (4 - number_bytes) if number_bytes < 4 else 0.0
        return self.hidden_size * (3 * number_bytes + float32)

    def products_bytes_per_token(self, number_bytes: float) -> float:
        """Bytes that selective recomputation keeps of a layer, per token: its input, the outputs of
        its matrix products (queries, keys, values, two of hidden size, the MLP's inner ones) and of
        attention."""
        inner = 2 if self.gated_mlp else 1
        return number_bytes * (
            3 * self.hidden_size
            + 2 * self.query_dim
            + 2 * self.kv_dim
            + inner * self.active_intermediate_size
        )

    def _mean(self, attention: float, convolution: float) -> float:
        """The mean over the layers of what one with attention and one with a convolution has."""
        layers, without = self.num_layers, self.num_convolution_layers
        return ((layers - without) * attention + without * convolution) / layers

    @cached_property
    def _mlp_matrices(self) -> int:
        """Matrices of an MLP: two, and a third one where it has a gate."""
        return 3 if self.gated_mlp else 2

    @cached_property
    def _moe_layers(self) -> int:
        return self.num_layers - self.num_dense_layers

    def _mlp(self, inner: int) -> int:
        """Parameters of an MLP with this inner size."""
        return self._mlp_matrices * self.hidden_size * inner


def _dense_layers(config: Mapping[str, object], num_layers: int) -> int:
    """How many layers of a mixture of experts have none: the first ones (DeepSeek, Ernie, LFM2), those
    that are named, all but those that are (Llama 4), and all but every so-manieth (Qwen)."""
    kinds, mixed = config.get("mlp_layer_types"), config.get("moe_layers")
    if isinstance(kinds, list):
        return kinds.count("dense")
    if isinstance(mixed, list):
        return num_layers - len(mixed)
    first = _integer(
        config,
        "first_k_dense_replace",
        "moe_layer_start_index",
        "num_dense_layers",
        default=0,
    )
    every = _integer(config, "decoder_sparse_step", "interleave_moe_layer_step", default=1)
    named = config.get("mlp_only_layers")
    dense = set(range(first))
    if isinstance(named, list):
        dense.update(layer for layer in named if layer < num_layers)
    dense.update(layer for layer in range(num_layers) if (layer + 1) % max(every, 1))
    return len(dense)


def _convolution_layers(config: Mapping[str, object]) -> int:
    kinds = config.get("layer_types")
    return kinds.count("conv") if isinstance(kinds, list) else 0


def _most(config: Mapping[str, object], *keys: str) -> int:
    """The value of the first of `keys` that is there, the largest one where each layer has its own."""
    for key in keys:
        value = config.get(key)
        if isinstance(value, list):
            return max(map(int, value))
    return _integer(config, *keys, default=0)


def _integer(config: Mapping[str, object], *keys: str, default: int | None = None) -> int:
    """The value of the first of `keys` that the config has; model families name the same size
    differently."""
    for key in keys:
        value = config.get(key)
        if isinstance(value, int):
            return value
    if default is None:
        raise ValueError(
            f"model config: none of {', '.join(keys)} is there; give a decoder's config.json"
        )
    return default
