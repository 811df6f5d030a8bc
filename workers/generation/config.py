"""Settings of generation: how tokens are drawn, and how the engine that draws them is set up."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum

from workers.config import Precision


class InFlight(StrEnum):
    """How rows in flight (submitted, not finished) go on when the weights are replaced."""

    recompute = "recompute"
    """They read their whole prefix again by the new weights before the next token."""
    keep = "keep"
    """Rows that run go on with the keys and values of the old weights; rows that have not begun
    read with the new ones."""
    drain = "drain"
    """There are none: the caller ran the engine until all were finished."""


@dataclass(kw_only=True)
class SamplingConfig:
    """How a response is drawn: the filters work on the softmax at `temperature`, in the order
    min_p, top_k, top_p.

    SamplingConfig(temperature=0.7, top_p=0.95, max_response_tokens=512)
    """

    temperature: float = 1.0
    """Logits are divided by it; over 0 (use `greedy` for the most likely token)."""
    top_p: float = 1.0
    """Keep the most likely tokens whose probabilities add up to this; 1 keeps all."""
    top_k: int = 0
    """Keep this many of the most likely tokens; 0 keeps all."""
    min_p: float = 0.0
    """Drop tokens whose probability is under this fraction of the most likely token's; 0 keeps
    all."""
    greedy: bool = False
    """Take the most likely token (do_sample=False); temperature, top_p, top_k, min_p and the
    seeds then play no part."""
    max_response_tokens: int = 256
    """A response ends after this many tokens at the latest, with finish reason "length"."""
    stop_token_ids: list[int] = field(default_factory=list)
    """Tokens that end a response, besides the model's own end-of-sequence tokens; the stopping
    token is part of the response."""
    stop_strings: list[str] = field(default_factory=list)
    """Strings that end a response; the tokens that spell them are part of the response. A special
    token is taken as its id in stop_token_ids."""
    ignore_eos: bool = False
    """Go on after an end-of-sequence token (for benchmarks of a fixed length)."""


@dataclass(kw_only=True)
class GenerationConfig:
    """The generation engine of an actor; the data-parallel size is what tp and pp leave of the
    pool."""

    engine: str = "vllm"
    """vllm or hf (a slow reference without parallelism), or an engine of another package: a
    name that it declares, or package.module:Name."""
    tp: int = 1
    """Tensor-parallel size."""
    pp: int = 1
    """Pipeline-parallel size."""
    precision: Precision = Precision.auto
    """Precision of the generation weights and the key/value cache; logits are float32 from the
    softmax on."""
    max_model_len: int = 0
    """Most tokens of prompt and response together. 0: the actor's longest prompt (of training and
    validation) with max_response_tokens; elsewhere what the cache holds, up to the model's limit."""
    max_num_seqs: int = 256
    """Most responses that are generated at the same time by one data-parallel engine; the
    others wait."""
    max_num_batched_tokens: int = 8192
    """Most tokens of one forward pass of one engine (prompts are split over passes where they
    are longer)."""
    kv_cache_bytes: int = 0
    """Key/value cache of one rank on CPU. 0: what the responses of a step need, at most 2 GiB (the
    others wait); 256 MiB where that is not known. On GPU: see gpu_memory_fraction."""
    gpu_memory_fraction: float = 0.5
    """Share of the device's memory that weights, activations and key/value cache of generation
    may take."""
    enforce_eager: bool | None = None
    """Do not compile the model (CPU) nor capture it in CUDA graphs (GPU). null: on a CPU, where
    compiling takes minutes and gains nothing; graphs on a GPU, where a decoded token costs hundreds
    of launches."""
    prefix_caching: bool = True
    """Compute the shared beginning of prompts once (the samples of one prompt, a common system
    prompt)."""
    block_size: int = 0
    """Tokens of one block of the key/value cache; only whole blocks are shared. 0 chooses."""
    release_during_training: bool | None = None
    """Free the key/value cache and the generation weights while any role of the pool computes.
    null: on a CPU where they take more than 256 MiB, because a sync writes the weights anew after
    every update anyway; not on an accelerator."""
    verbose: bool = False
    """Let the engine write its own log lines."""
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
