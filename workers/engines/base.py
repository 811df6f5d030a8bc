"""TrainingEngine: what every training backend offers, whatever its parallelism.

An engine is built on every rank of its pool inside an initialised torch.distributed world (gloo on CPU, NCCL
on GPU; a world of one is fine). All ranks call every method together (SPMD). Ranks of one data coordinate get
the same Sequences; different data coordinates get different ones, possibly of different sizes, possibly
empty.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from torch import Tensor

from hybridflow.context import RankContext
from hybridflow.layout import Layout
from hybridflow.resharding.shards import LocalParameter
from workers.config import ModelConfig, TrainConfig
from workers.sequences import Sequences


class Head(StrEnum):
    """What stands on top of the decoder."""

    lm = "lm"
    """A language-model head; outputs log_probs (and entropy) of the scored tokens. Loaded as
    AutoModelForCausalLM."""
    value = "value"
    """A linear value head; V of a scored token is read at the position before it. Loaded as
    AutoModelForSequenceClassification with num_labels=1 from any causal LM (the head is then new and seeded)
    or from a saved critic."""
    score = "score"
    """The same model as `value`, read at the last token of each row: one score a row (reward and cost
    models)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Outputs:
    """Of the scored tokens of the sequences passed in, flat, in row order; float32."""

    log_probs: Tensor | None = None
    """[scored_tokens], at the temperature asked for."""
    entropy: Tensor | None = None
    """[scored_tokens], of the full softmax at that temperature."""
    values: Tensor | None = None
    """[scored_tokens]."""
    scores: Tensor | None = None
    """[rows]."""


LossFn = Callable[[Outputs, Sequences], tuple[Tensor, dict[str, Tensor]]]
"""(outputs, the micro-batch) -> (loss, metrics). Both are *sums* over the micro-batch whose weights already
hold the global normalisation (1 / tokens of the whole mini-batch over all ranks, say), so that adding them
over micro-batches and data ranks gives the value for the mini-batch, however it was cut. A micro-batch
without scored tokens must give 0 with a graph."""


class TrainingEngine(ABC):
    """How an actor uses it:

    engine = engine_class(config.engine)(model=model_config, config=train_config, head=Head.lm,
    context=context) outputs = engine.forward(sequences, entropy=True, temperature=1.0)      # None except on
    the last pipeline stage metrics = engine.train_step(sequences, loss_fn)                         # one
    optimizer step parameters = engine.local_parameters()                                  # for resharding;
    views, no copies
    """

    layout: Layout
    """Axes dp, pp, cp, tp over the ranks of the pool."""

    @abstractmethod
    def __init__(
        self,
        *,
        model: ModelConfig,
        config: TrainConfig,
        head: Head,
        context: RankContext,
        trains: bool = True,
    ) -> None:
        """Loads the model and builds the optimizer; collective over the pool. trains=False: for forward
        passes alone."""

    @abstractmethod
    def forward(
        self, sequences: Sequences, *, entropy: bool = False, temperature: float = 1.0
    ) -> Outputs | None:
        """Outputs without gradients, on every rank of the last pipeline stage (all tensor ranks the same);
        None elsewhere."""

    @abstractmethod
    def train_step(
        self, sequences: Sequences, loss_fn: LossFn, *, entropy: bool = False, temperature: float = 1.0
    ) -> dict[str, float]:
        """Forward and backward over all micro-batches, sum of gradients over data ranks, clipping, one
        optimizer step.

        Returns loss and loss_fn's metrics summed over micro-batches and data ranks, plus grad_norm (before
        clipping, over all parameters) and learning_rate: the same numbers on every rank. A grad_norm that is
        not finite raises a RuntimeError before the weights are touched.
        """

    @abstractmethod
    def local_parameters(self) -> list[LocalParameter]:
        """The rank's shards of every logical parameter of the model (all names on every rank, in the same
        order)."""

    @abstractmethod
    def save(self, directory: Path) -> None:
        """Weights, optimizer and schedule into `directory` (torch.distributed.checkpoint); collective.
        Loadable on any layout."""

    @abstractmethod
    def load(self, directory: Path) -> None:
        """The inverse of save; on the same layout training goes on bit for bit."""

    @abstractmethod
    def save_pretrained(self, directory: Path) -> None:
        """Weights as a Hugging Face directory (safetensors, config) that transformers loads; collective, one
        rank writes."""

    @abstractmethod
    def offload(self) -> None:
        """Move optimizer states (and gradients) to host memory; nothing to do on CPU."""

    @abstractmethod
    def onload(self) -> None:
        """Bring back what offload moved."""
