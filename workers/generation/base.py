"""GenerationEngine: what every generation backend offers, whatever its parallelism.

An engine lives inside its host process, in the pool's torch.distributed world; it starts no process
of its own. Ranks of one replica (equal data coordinate) call every method together with the same
arguments and get the same result; replicas are independent of each other in generate and score.
What a row becomes depends on its prompt, its seed and the weights, never on the layout, the rank or
the other rows.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import PretrainedConfig

from hybridflow.context import RankContext
from hybridflow.layout import Layout
from hybridflow.resharding import ParameterSpec
from workers.config import ModelConfig
from workers.generation.config import GenerationConfig, SamplingConfig
from workers.generation.weight_destination import FullWeights, WeightDestination


@dataclass(frozen=True, kw_only=True, slots=True)
class Generations:
    """Responses [8, 2] ("stop") and [7] ("length"):

    Generations(response_ids=[8, 2, 7], lengths=[2, 1], log_probs=[-.1, -.2, -.3], finish_reasons=["stop",
    "length"], ...)
    """

    response_ids: NDArray[np.int64]
    """[sum(lengths)], the responses one after the other in the order of the prompts, with the
    token that ended them."""
    lengths: NDArray[np.int64]
    """[rows], at least 1."""
    log_probs: NDArray[np.float32]
    """[sum(lengths)], of the response tokens under the full softmax at the sampling
    temperature, before top-p, top-k and min-p: what a trainer computes for them. Greedy:
    temperature 1."""
    finish_reasons: list[str]
    """[rows]: "stop" (end of sequence, stop token or stop string) or "length"."""
    num_prompt_tokens: int
    """Prompt tokens of all rows, repeated prompts counted every time."""
    seconds: float
    """Wall time of the call on this rank."""


class GenerationEngine(ABC):
    """How an actor uses it:

        engine = generation_engine_class(config.engine)(
            model=model_config, config=config, context=context, load_weights=False
        )
        engine.wake()
        engine.load_weights(named_tensors, version=3)
        assert_close(engine.score(probe), trainer_log_probs)
        generations = engine.generate(prompts, seeds, config.sampling)
        engine.sleep()

    `library`, `shares_process`, `check` are read before anything starts, on machines without
    `library` too: the module of an engine imports its library only where it computes.
    """

    library: ClassVar[str] = "torch"
    """Top-level module that must be installed where the engine computes."""
    shares_process: ClassVar[bool] = False
    """All engines of one process share its groups of ranks and its GPU's memory: roles of one
    pool then need equal tp and pp, and shares of memory (gpu_memory_fraction) that fit
    together."""
    releases: ClassVar[bool] = True
    """sleep frees memory: weights and a cache that outlive a call."""
    layout: Layout
    """Axes dp, pp, tp over the ranks of the pool."""
    weight_version: int
    """Version of the weights that the engine holds: that of the last load_weights; -1 before
    the first."""

    @classmethod
    def check(cls, config: GenerationConfig) -> None:
        """Refuse before the start settings that the engine does not have: a ValueError with
        field, value and fix. Nothing by default."""
        del config

    @classmethod
    def check_device(cls, device: str) -> None:
        """Refuse before the start a kind of device, "cpu" or "cuda", that the installed library
        can't compute on: a ValueError with field, value and fix. Nothing by default."""
        del device

    @classmethod
    def check_model(cls, model: PretrainedConfig, config: GenerationConfig) -> None:
        """Refuse before the start a model that the engine can't run, or not in this layout: a
        ValueError with field, value and fix. Nothing by default."""
        del model, config

    @classmethod
    def check_sync(cls, model: PretrainedConfig) -> None:
        """Refuse before the start a model whose weights an actor can't bring to the engine, as
        check_model does. Nothing by default."""
        del model

    @abstractmethod
    def __init__(
        self,
        *,
        model: ModelConfig,
        config: GenerationConfig,
        context: RankContext,
        load_weights: bool = True,
        layout: Layout | None = None,
    ) -> None:
        """Build the engine; collective over the pool.

        load_weights=False: an actor pushes its own weights before the first generation. layout:
        which rank takes which generation coordinate; consecutive ranks form a replica if it is not
        given.
        """

    @abstractmethod
    def generate(
        self,
        prompts: Sequence[NDArray[np.int64]],
        seeds: NDArray[np.int64],
        sampling: SamplingConfig,
        limits: NDArray[np.int64] | None = None,
    ) -> Generations:
        """One response for every prompt ([tokens] each); n samples of a prompt are n equal rows
        with n seeds.

        `seeds` [rows] decides the draws of each row. `limits` [rows] ends single responses before
        max_response_tokens. Raises ValueError with the row for a prompt that is empty, has ids
        outside the vocabulary, or leaves no room for max_response_tokens, and for a limit under 1.
        """

    @abstractmethod
    def score(self, token_ids: Sequence[int]) -> NDArray[np.float32]:
        """Log-probs [tokens - 1] at temperature 1 of token_ids[1:], each given those before it,
        computed by this engine's weights: by the code that reads prompts and, for the second half,
        by that which generates, where they differ."""

    def weight_destination(
        self, parameters: Sequence[ParameterSpec], dtype: torch.dtype, device: str
    ) -> WeightDestination:
        """Where a weight sync writes the trainer's `parameters`, and how they come into use.

        By default every rank receives the whole model and load_weights takes it. An engine that can
        name its own boxes of the parameters returns a destination of its own, and receives no other
        bytes.
        """
        return FullWeights(self, parameters, dtype, device)

    @abstractmethod
    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]], *, version: int) -> None:
        """Replace all weights by full tensors under their checkpoint names (tied weights once or
        under both names).

        Every rank passes every tensor; the engine keeps its part. Forgets every cached prefix.
        Raises ValueError if a parameter of the model was not in `weights`.
        """

    @abstractmethod
    def weights_written(self, version: int) -> None:
        """The weights were replaced by other means (a resharding plan); forget what was
        computed with the old ones."""

    @abstractmethod
    def sleep(self) -> int:
        """Free the key/value cache and the weights, and say how many bytes that were; generate and
        score need wake and then new weights first.

        An engine that freed its weights has weight_version -1.
        """

    @abstractmethod
    def wake(self) -> None:
        """Take back the memory that sleep freed (its contents are undefined); nothing to do for
        an engine that is awake."""

    @abstractmethod
    def close(self) -> None:
        """Free everything; the engine cannot be used afterwards. The process group of the pool
        stays."""
