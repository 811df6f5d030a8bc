"""GenerationEngine: what every generation backend offers, whatever its parallelism.

An engine lives inside its host process, in the pool's torch.distributed world; it starts no process
of its own. Ranks of one replica (equal data coordinate) call every method together with the same
arguments and get the same result; replicas are independent of each other in generate and score.
What a row becomes depends on its prompt, its seed and the weights, never on the layout, the rank or
the other rows.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterable, Sequence, Set
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import PretrainedConfig

from hybridflow.context import RankContext
from hybridflow.layout import Layout
from hybridflow.resharding import ParameterSpec
from workers.config import LoraConfig, ModelConfig
from workers.generation.config import GenerationConfig, InFlight, SamplingConfig
from workers.generation.rows import FinishedRow, NewRow, pop_rows
from workers.generation.sampling import (
    check_prompts,
    check_sampling,
    first_positions,
    most_tokens,
)
from workers.generation.weight_destination import FullWeights, WeightDestination
from workers.images.reference import ImageReference


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
    routes: NDArray[np.int16] | None = None
    """[tokens of all prompts and responses but the last of each, layers, experts per token], as
    FinishedRow.routes."""


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

    or, in slices between which rows may be added and weights replaced:

        keys = engine.submit(prompts, seeds, config.sampling)
        engine.run(limit=16)
        engine.load_weights(named_tensors, version=4)
        engine.run(limit=16)
        rows = engine.finished()  # {key: FinishedRow}

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
    records: ClassVar[bool] = False
    """record_routes has an effect."""
    sees_images: ClassVar[bool] = False
    """submit takes images."""
    layout: Layout
    """Axes dp, pp, tp over the ranks of the pool."""
    weight_version: int
    """Version of the weights that the engine holds: that of the last load_weights; -1 before
    the first."""
    _vocab_size: int
    _max_model_len: int
    """Most tokens of a prompt and its response together."""
    _finished: dict[int, FinishedRow]
    """The rows that have finished and that nobody has taken, by their keys."""

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

    @classmethod
    def takes_adapter(
        cls, model: PretrainedConfig, config: GenerationConfig, lora: LoraConfig
    ) -> bool:
        """Whether the engine, built with `lora`, loads the base itself and takes an adapter alone:
        its weight_destination is then one of the matrices A and scale * B."""
        del model, config, lora
        return False

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

    def record_routes(self) -> tuple[int, int]:
        """From now on, before the first row, rows come with the experts that their tokens were sent
        to; returns the layers with experts, and the experts per token. A ValueError for a model
        without experts, or settings that hide their choice."""
        raise ValueError(
            "actor.router_replay is R3, but the generation engine does not record routes; use R2"
        )

    def generate(
        self,
        prompts: Sequence[NDArray[np.int64]],
        seeds: NDArray[np.int64],
        sampling: SamplingConfig,
        limits: NDArray[np.int64] | None = None,
        images: Sequence[tuple[ImageReference, ...]] | None = None,
    ) -> Generations:
        """One response for every prompt, as submit, run and finished give it; rows in flight go
        on meanwhile and stay the caller's."""
        start = time.perf_counter()
        rows = self._run_to_end(self.submit(prompts, seeds, sampling, limits, images=images))
        return generations(
            rows,
            num_prompt_tokens=sum(len(prompt) for prompt in prompts),
            seconds=time.perf_counter() - start,
        )

    def submit(
        self,
        prompts: Sequence[NDArray[np.int64]],
        seeds: NDArray[np.int64],
        sampling: SamplingConfig,
        limits: NDArray[np.int64] | None = None,
        positions: NDArray[np.int64] | None = None,
        images: Sequence[tuple[ImageReference, ...]] | None = None,
    ) -> list[int]:
        """Add a row for every prompt ([tokens] each), behind those that wait; returns their keys,
        which grow and are never used again. n samples of a prompt are n rows with n seeds.

        `seeds` [rows] decides the draws of each row. `limits` [rows] ends single responses before
        max_response_tokens. `positions` [rows]: tokens that were drawn by the same seed before
        (earlier turns of an episode), so that no draw is used twice; 0 by default. `images` [rows]:
        those of each prompt, which has all of their tokens. Rows of any settings can be in flight
        together.

        Raises ValueError with the row for a prompt that is empty, has ids outside the vocabulary,
        or leaves no room for max_response_tokens, and for a limit under 1; no row is added then.
        """
        most = most_tokens(len(prompts), sampling, limits)
        check_sampling(sampling)
        check_prompts(
            prompts, seeds, most, vocab_size=self._vocab_size, max_model_len=self._max_model_len
        )
        first = first_positions(len(prompts), positions)
        rows = []
        for row, prompt in enumerate(prompts):
            rows.append(
                NewRow(
                    prompt=prompt,
                    seed=int(seeds[row]),
                    position=int(first[row]),
                    most_tokens=most[row],
                    images=() if images is None else images[row],
                )
            )
        return self._add(rows, sampling)

    @abstractmethod
    def _add(self, rows: Sequence[NewRow], sampling: SamplingConfig) -> list[int]:
        """submit, of rows that the model can continue; a ValueError for what this engine alone
        can't do adds none."""

    def run(self, limit: int | None = None, *, until: Iterable[int] | None = None) -> int:
        """Run engine steps until nothing is unfinished, at most `limit`, or until the rows with
        the keys `until` have finished; returns the steps run.

        A step draws at most one token for every row. The tokens of a row do not depend on how
        steps are divided over calls.
        """
        steps, missing = 0, set(until or ())
        missing -= self.finished_keys
        while steps != limit and self.num_unfinished and (until is None or missing):
            missing.difference_update(self.step())
            steps += 1
        return steps

    @property
    @abstractmethod
    def num_unfinished(self) -> int:
        """Rows that were submitted and have not finished."""

    @abstractmethod
    def step(self) -> list[int]:
        """One engine step, while a row is unfinished; returns the keys of the rows that it
        finished."""

    def finished(self, keys: Collection[int] | None = None) -> dict[int, FinishedRow]:
        """The rows that have finished (among `keys`; None: all) by their keys, which the engine
        then forgets. The others stay."""
        return pop_rows(self._finished, keys)

    @property
    def finished_keys(self) -> Set[int]:
        """Keys of the rows that finished would return."""
        return self._finished.keys()

    @abstractmethod
    def cancel(self, keys: Iterable[int]) -> None:
        """Forget rows, unfinished or finished; keys that the engine does not know are nothing."""

    @abstractmethod
    def preempt(self) -> None:
        """Give up the keys and values of all rows. The rows stay, and go on by reading their
        prompts and the tokens drawn so far again."""

    def _run_to_end(self, keys: Sequence[int]) -> list[FinishedRow]:
        """The rows of `keys`, in that order, when they have finished; others go on meanwhile."""
        try:
            self.run(until=keys)
            finished = self.finished(keys)
        finally:
            self.cancel(keys)  # after an error, those that are left
        return [finished[key] for key in keys]

    def check_drained(self) -> None:
        """A RuntimeError if rows are unfinished."""
        if self.num_unfinished:
            raise RuntimeError(
                f"generation: {self.num_unfinished} rows are in flight at a weight update with "
                "in_flight=drain; run the engine until none is unfinished, or use recompute"
            )

    @abstractmethod
    def score(self, token_ids: Sequence[int]) -> NDArray[np.float32]:
        """Log-probs [tokens - 1] at temperature 1 of token_ids[1:], each given those before it,
        computed by this engine's weights: by the code that reads prompts and, for the second half,
        by that which generates, where they differ."""

    def weight_destination(
        self,
        parameters: Sequence[ParameterSpec],
        dtype: torch.dtype,
        device: str,
        in_flight: InFlight = InFlight.recompute,
    ) -> WeightDestination:
        """Where a weight sync writes the trainer's `parameters`, and how they come into use;
        `in_flight` as in weights_written.

        By default every rank receives the whole model and load_weights takes it. An engine that can
        name its own boxes of the parameters returns a destination of its own, and receives no other
        bytes.
        """
        return FullWeights(self, parameters, dtype, device, in_flight)

    @abstractmethod
    def load_weights(
        self,
        weights: Iterable[tuple[str, torch.Tensor]],
        *,
        version: int,
        in_flight: InFlight = InFlight.recompute,
    ) -> None:
        """Replace all weights by full tensors under their checkpoint names (tied weights once or
        under both names), and then weights_written.

        Every rank passes every tensor; the engine keeps its part. Raises ValueError if a parameter
        of the model was not in `weights`.
        """

    @abstractmethod
    def weights_written(self, version: int, in_flight: InFlight = InFlight.recompute) -> None:
        """The weights were replaced (load_weights, a resharding plan): no new row uses what was
        computed with the old ones, and rows in flight go on as `in_flight` says.

        With recompute the next log-prob of a row is that of the new weights over its whole prefix.
        """

    @abstractmethod
    def sleep(self) -> int:
        """Free the key/value cache and the weights, and say how many bytes that were; a step and
        score need wake and then new weights first.

        Rows in flight are preempted, and go on then. An engine that freed its weights has
        weight_version -1.
        """

    @abstractmethod
    def wake(self) -> None:
        """Take back the memory that sleep freed (its contents are undefined); nothing to do for
        an engine that is awake."""

    @abstractmethod
    def close(self) -> None:
        """Free everything; the engine cannot be used afterwards. The process group of the pool
        stays."""


def generations(
    rows: Sequence[FinishedRow], *, num_prompt_tokens: int, seconds: float
) -> Generations:
    """Finished rows one after the other."""
    no_ids, no_log_probs = np.empty(0, np.int64), np.empty(0, np.float32)
    routes = [row.routes for row in rows if row.routes is not None]
    assert not routes or len(routes) == len(rows), "some rows have no routes"
    return Generations(
        response_ids=np.concatenate([no_ids, *(row.token_ids for row in rows)]),
        lengths=np.array([len(row.token_ids) for row in rows], dtype=np.int64),
        log_probs=np.concatenate([no_log_probs, *(row.log_probs for row in rows)]),
        finish_reasons=[row.finish_reason for row in rows],
        routes=np.concatenate(routes) if routes else None,
        num_prompt_tokens=num_prompt_tokens,
        seconds=seconds,
    )
