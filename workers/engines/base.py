"""TrainingEngine: what every training backend offers, whatever its parallelism.

An engine is built on every rank of its pool inside an initialised torch.distributed world (gloo on
CPU, NCCL on GPU; a world of one is fine). All ranks call every method together (SPMD). Ranks of one
data coordinate get the same Sequences; different data coordinates get different ones, possibly of
different sizes, possibly empty.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import ClassVar

from torch import Tensor
from transformers import PretrainedConfig

from hybridflow.context import RankContext
from hybridflow.layout import Layout
from hybridflow.mapping.question.space import SearchSpace
from hybridflow.resharding.shards import LocalParameter
from workers.config import ModelConfig, TrainConfig
from workers.sequences import Sequences


class Head(StrEnum):
    """The layer on top of the decoder."""

    lm = "lm"
    """A language-model head; outputs log_probs (and entropy) of the scored tokens. Loaded as
    AutoModelForCausalLM."""
    value = "value"
    """A linear value head; V of a scored token is read at the position before it. Loaded as
    AutoModelForSequenceClassification with num_labels=1 from any causal LM (the head is then
    new and seeded) or from a saved critic."""
    score = "score"
    """The same model as `value`, read at the last token of each row: one score a row (reward
    and cost models)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Outputs:
    """Numbers for the scored tokens of the sequences passed in, flat, in row order; float32."""

    log_probs: Tensor | None = None
    """[scored_tokens], at the temperature asked for."""
    entropy: Tensor | None = None
    """[scored_tokens], of the full softmax at that temperature."""
    values: Tensor | None = None
    """[scored_tokens]."""
    scores: Tensor | None = None
    """[rows]."""
    routes: Tensor | None = None
    """int16 [tokens, layers, experts per token]: the experts that each token of the sequences was
    sent to, by layer with experts; -1 for tokens that were not computed."""


LossFn = Callable[[Outputs, Sequences], tuple[Tensor, dict[str, Tensor]]]
"""(outputs, the micro-batch) -> (loss, metrics). Both are *sums* over the micro-batch whose
weights already hold the global normalisation (1 / tokens of the whole mini-batch over all
ranks, say), so that adding them over micro-batches and data ranks gives the value for the
mini-batch, however it was cut. A micro-batch without scored tokens must give 0 with a graph."""


@dataclass(frozen=True, kw_only=True, slots=True)
class WeightSource:
    """This rank's shards of what a weight sync sends."""

    parameters: list[LocalParameter]
    transient: frozenset[str] = frozenset()
    """Parameters whose memory is there within `latest` only."""
    latest: Callable[[], AbstractContextManager[None]] = nullcontext
    """Within, the memory holds the trainer's present weights. Collective."""


class TrainingEngine(ABC):
    """How an actor uses it:

        engine = engine_class(config.engine)(model=model_config, config=config, head=Head.lm, context=context)
        outputs = engine.forward(sequences, entropy=True)  # None except on the last pipeline stage
        metrics = engine.train_step(sequences, loss_fn)  # one optimizer step
        parameters = engine.local_parameters()  # for resharding; views, no copies

    The class methods are the engine's facts, which checks and the mapper read before anything
    starts. They are called on machines without a GPU and without `library`, so the module of an
    engine imports its library only where it computes.
    """

    library: ClassVar[str] = "torch"
    """Top-level module that must be installed where the engine computes."""
    trains_adapters: ClassVar[bool] = False
    """train.lora has an effect."""
    lends: ClassVar[bool] = False
    """Other engines of the pool can have their adapters on its frozen weights."""
    shares_rows: ClassVar[bool] = False
    """train.cp has an effect: the ranks of context parallelism share the tokens of a row."""
    divides_experts: ClassVar[bool] = False
    """train.ep has an effect: the experts of a layer are divided over ranks."""
    sees_images: ClassVar[bool] = False
    """Rows may have images, without tensor, context and expert parallelism."""
    layout: Layout
    """Axes dp, pp, cp, tp over the ranks of the pool."""

    @classmethod
    def make_layout(cls, config: TrainConfig, world_size: int) -> Layout:
        """Which coordinates each rank has: tp, cp and pp as set, dp what they leave of the pool.

        A ValueError for sizes that do not divide the pool. Driver and ranks both call it, so it
        reads nothing but its arguments.
        """
        parallel = config.pp * config.cp * config.tp
        if parallel < 1 or world_size % parallel:
            fitting = [size for size in range(1, world_size + 1) if world_size % size == 0]
            shared = "" if config.cp == 1 else f"cp={config.cp} x "
            raise ValueError(
                f"train: pp={config.pp} x {shared}tp={config.tp} does not divide the pool's "
                f"{world_size} devices; choose sizes whose product is one of {fitting}, or another "
                "number of devices (num_devices)"
            )
        return Layout.of(
            order=tuple(config.rank_order),
            dp=world_size // parallel,
            pp=config.pp,
            cp=config.cp,
            tp=config.tp,
        )

    @classmethod
    @abstractmethod
    def check(
        cls, model: PretrainedConfig, config: TrainConfig, head: Head, world_size: int
    ) -> None:
        """Refuse before the start what the engine cannot do: a ValueError with field, value and
        fix for settings that it does not have and for a model that does not fit its layout."""

    @classmethod
    @abstractmethod
    def limit(cls, space: SearchSpace) -> SearchSpace:
        """The mapper's search space, narrowed to the layouts that this engine has."""

    @classmethod
    @abstractmethod
    def zero_stage(cls, config: TrainConfig) -> int:
        """The ZeRO stage that data ranks come to, as the mapper counts it: 0 shards nothing, 1
        optimizer states, 2 gradients too, 3 weights too."""

    @classmethod
    def budget_tokens(cls, config: TrainConfig, num_tokens: int) -> int:
        """Tokens of a micro-batch on a rank, at most, where a call gives a data coordinate rows of
        `num_tokens`. The mapper counts with it."""
        del num_tokens
        return config.micro_batch_tokens

    @classmethod
    @abstractmethod
    def shards_data(cls, config: TrainConfig) -> bool:
        """Whether local_parameters() of a data rank are its own part of each tensor rank's
        weights, cut along the first dim. Resharding assigns generation coordinates so that the
        fewest bytes move; a wrong answer costs bytes, never correctness."""

    @abstractmethod
    def __init__(
        self,
        *,
        model: ModelConfig,
        config: TrainConfig,
        head: Head,
        context: RankContext,
        trains: bool = True,
        seed: int = 0,
        lender: TrainingEngine | None = None,
    ) -> None:
        """Loads the model and builds the optimizer; collective over the pool. trains=False: for
        forward passes alone. seed: decides the weights of a new head (ModelSource draws them).
        lender: an engine whose `lends_base` is true for these settings; not given where there is
        none."""

    @abstractmethod
    def forward(
        self,
        sequences: Sequences,
        *,
        entropy: bool = False,
        temperature: float = 1.0,
        routes: bool = False,
    ) -> Outputs | None:
        """Outputs without gradients, on every rank of the last pipeline stage (all tensor ranks
        the same); None elsewhere. `routes`: those of a mixture of experts too, on every rank."""

    @abstractmethod
    def train_step(
        self,
        sequences: Sequences,
        loss_fn: LossFn,
        *,
        entropy: bool = False,
        temperature: float = 1.0,
    ) -> dict[str, float]:
        """Forward and backward over all micro-batches, sum of gradients over data ranks, clipping,
        one optimizer step.

        Returns loss and loss_fn's metrics summed over micro-batches and data ranks, plus grad_norm
        (before clipping, over all parameters) and learning_rate: the same numbers on every rank. A
        grad_norm that is not finite raises a NotFiniteError on every rank, before the weights are
        touched; the step leaves nothing behind.
        """

    @abstractmethod
    def local_parameters(self) -> list[LocalParameter]:
        """The rank's shards of every logical parameter of the model (all names on every rank,
        in the same order), an adapter's matrices among them."""

    def weight_source(self, *, adapter: bool = False) -> WeightSource:
        """The shards for a weight sync: the model with an adapter merged into it, or (`adapter`) the
        adapter alone, as A and scale * B."""
        assert not adapter, "this engine has no adapter"
        return WeightSource(parameters=self.local_parameters())

    def has_base(self, model: ModelConfig, config: TrainConfig) -> bool:
        """Whether forward within `base_only` gives what an engine of its own with these settings
        would, for a frozen language model: the same weights in the same layout and precision."""
        del model, config
        return False

    def lends_base(self, model: ModelConfig, config: TrainConfig) -> bool:
        """Whether an engine with these settings can have its adapter on the frozen weights of this
        one, in the same memory."""
        del model, config
        return False

    @contextmanager
    def base_only(self) -> Iterator[None]:
        """Within, forward computes with the model as it was loaded, an adapter left out."""
        yield

    @property
    @abstractmethod
    def num_steps(self) -> int:
        """Optimizer steps taken: where the learning-rate schedule stands."""

    @abstractmethod
    def state(self, *, moments: bool, copies: bool) -> list[LocalParameter]:
        """The float32 weights of every trained parameter as model.NAME and, with `moments`, AdamW's
        as exp_avg.NAME and exp_avg_sq.NAME: all names on every rank, in the same order, with views
        of this rank's memory. copies=False leaves out the elements that an earlier rank has too, so
        that the ranks' shards cover everything once. No collective."""

    @abstractmethod
    def restored(self, num_steps: int) -> None:
        """Called after what `state` showed was overwritten by that of step `num_steps`; collective."""

    def scalars(self, further: Mapping[str, int] | None = None) -> dict[str, int]:
        """Those of a snapshot: the number of steps, and `further` ones."""
        return {"num_steps": self.num_steps, **(further or {})}

    @abstractmethod
    def save(self, directory: Path, scalars: Mapping[str, int] | None = None) -> None:
        """Weights, moments, schedule and `scalars` as this rank's file in `directory`
        (hybridflow/snapshots). No collective."""

    @abstractmethod
    def load(self, directory: Path, stamp: str | None = None) -> dict[str, int]:
        """The inverse of save, on this layout or another; returns the scalars, num_steps among
        them. On the same layout training goes on bit for bit. `stamp`: see SnapshotFiles. A
        ValueError on every rank where one can't read what it needs. Collective."""

    @abstractmethod
    def save_pretrained(self, directory: Path) -> None:
        """Weights as a Hugging Face directory (safetensors, config) that transformers loads; of
        an adapter, a PEFT directory. Collective, one rank writes."""

    def try_saving(self, directory: Path) -> int:
        """Does, small, what save and save_pretrained do: everything that can fail only there, without
        the weights. Returns the bytes of a checkpoint with its export. Collective.

        An engine that does not try says 0.
        """
        del directory
        return 0

    @abstractmethod
    def offload(self) -> None:
        """Move optimizer states (and gradients) to host memory; nothing to do on CPU."""

    @abstractmethod
    def onload(self) -> None:
        """Bring back what offload moved."""
