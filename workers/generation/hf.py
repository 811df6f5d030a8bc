"""The slow reference: a transformers model, one token for every row at a time, with the draws that
every engine uses.

Waiting rows start in the order in which they came, as many as max_num_seqs allows, and every row
that runs has its keys and values in one batch padded on the left. No shared prefixes, no
parallelism: every rank holds the whole model and is a replica of its own. In float32 it gives the
tokens that vLLM gives.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import (
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from hybridflow.context import RankContext
from hybridflow.layout import Layout
from hybridflow.resharding import ParameterSpec
from workers.config import ModelConfig, Precision
from workers.engines.base import Head
from workers.engines.model.loading import language_model_class, position_limit, stored_buffers
from workers.engines.model.router import find_routers
from workers.engines.model.routers import REPLAYS, Routers, check_declared, experts_per_token
from workers.engines.model.scored import decoder_layers
from workers.engines.model.vision import ImageInputs, place_images
from workers.generation import other_engines
from workers.generation.base import GenerationEngine
from workers.generation.config import GenerationConfig, InFlight, SamplingConfig
from workers.generation.draws import draw_groups, sample_grouped
from workers.generation.padded_batch import PaddedBatch, joins, of_equal_length, of_like_length
from workers.generation.rows import GrowingRow, NewRow, StopRule
from workers.generation.sampling import (
    end_token_ids,
    load_model_config,
    stop_token_ids,
)
from workers.generation.weight_destination import OwnWeights, WeightDestination
from workers.hub import local_directory
from workers.images import family_of
from workers.images.families import published_config
from workers.precision import with_native_precision
from workers.quiet import quiet
from workers.tokenizer import load_tokenizer
from workers.weight_files import check_weight_files

OWN_STATE = ("minimax", "recurrent_gemma", "rwkv", "xlstm")
"""Families whose state is no cache of the kind that transformers' other models share."""


class HfEngine(GenerationEngine):
    """See GenerationEngine.

    engine = HfEngine(model=ModelConfig(path=...), config=GenerationConfig(), context=context)
    """

    releases = False
    records = True
    sees_images = True

    @classmethod
    def check(cls, config: GenerationConfig) -> None:
        if config.tp * config.pp != 1:
            raise ValueError(
                f"generation: tp={config.tp} pp={config.pp}, but engine hf has no parallelism; "
                f"use 1 and 1, or another engine: {other_engines('hf')}"
            )

    @classmethod
    def check_model(cls, model: PretrainedConfig, config: GenerationConfig) -> None:
        del config
        if model.model_type in OWN_STATE:
            raise ValueError(
                f"generation.engine is 'hf', which keeps keys, values and states of layers in a cache "
                f"that {model.model_type} does not take; set generation.engine to another: "
                f"{other_engines('hf')}"
            )

    def __init__(
        self,
        *,
        model: ModelConfig,
        config: GenerationConfig,
        context: RankContext,
        load_weights: bool = True,
        layout: Layout | None = None,
    ) -> None:
        """`load_weights` is there for the interface: the weights of the directory are read
        either way."""
        self.check(config)
        self.layout = layout or Layout.of(dp=context.world_size)
        self.weight_version = -1
        config = with_native_precision(config, context.device)
        text_config = load_model_config(model)
        self._vocab_size = text_config.vocab_size
        self._max_model_len = config.max_model_len or position_limit(model, Head.lm)
        self._max_num_seqs = config.max_num_seqs
        self._end_tokens = end_token_ids(model, text_config)
        self._device = context.device
        self._keys = itertools.count()
        self._waiting: deque[GrowingRow] = deque()
        self._batches: list[PaddedBatch] = []
        self._finished = {}
        self._tokenizer: PreTrainedTokenizerBase | None = None
        if config.sampling.stop_strings:
            self._tokenizer = load_tokenizer(model)
        published = published_config(model)
        self._images = ImageInputs(model) if family_of(published) is not None else None
        check_weight_files(model.path, "model.path", local_directory(model.path, model.revision))
        with quiet():
            loaded = language_model_class(published).from_pretrained(
                model.path,
                revision=model.revision,
                trust_remote_code=model.trust_remote_code,
                dtype=torch.float32 if config.precision == Precision.fp32 else torch.bfloat16,
            )
        if getattr(text_config, "attn_logit_softcapping", None) is not None:
            # The fused kernel leaves the cap out in silence.
            loaded.set_attn_implementation("eager")
        self._model: PreTrainedModel = loaded.to(context.device)
        self._model.eval()
        place_images(self._model)
        self._routers: Routers | None = None

    def record_routes(self) -> tuple[int, int]:
        check_declared(self._model.config, REPLAYS)
        self._routers = Routers(find_routers(self._model), decoder_layers(self._model))
        return len(self._routers), experts_per_token(self._model.config)

    def _add(self, rows: Sequence[NewRow], sampling: SamplingConfig) -> list[int]:
        stop = StopRule(stop_token_ids(sampling, self._end_tokens), sampling, self._tokenizer)
        keys = []
        for row in rows:
            keys.append(next(self._keys))
            self._waiting.append(
                GrowingRow(
                    keys[-1],
                    row.prompt,
                    row.seed,
                    row.position,
                    sampling,
                    stop,
                    row.most_tokens,
                    row.images,
                )
            )
        return keys

    @property
    def num_unfinished(self) -> int:
        return len(self._waiting) + self._num_running

    @torch.no_grad()
    def step(self) -> list[int]:
        self._admit()
        ended = []
        for batch in self._batches:
            for row in self._draw(batch):
                ended.append(row.key)
                self._finished[row.key] = row.finished()
        self._tidy()
        return ended

    def preempt(self) -> None:
        running = []
        for batch in self._batches:
            running += [row for row in batch.rows if not row.finish_reason]
        self._batches = []
        self._waiting.extendleft(sorted(running, key=lambda row: -row.key))

    def cancel(self, keys: Iterable[int]) -> None:
        cancelled = set(keys)
        for key in cancelled:
            self._finished.pop(key, None)
        self._waiting = deque(row for row in self._waiting if row.key not in cancelled)
        for batch in self._batches:
            for row in batch.rows:
                if row.key in cancelled:
                    row.finish_reason = "cancelled"
        self._tidy()

    @property
    def _num_running(self) -> int:
        return sum(not row.finish_reason for batch in self._batches for row in batch.rows)

    def _admit(self) -> None:
        """Waiting rows become batches, as many rows as may run."""
        places = self._max_num_seqs - self._num_running
        rows = [self._waiting.popleft() for _ in range(min(places, len(self._waiting)))]
        padded = joins(self._model.config)
        for together in of_like_length(rows) if padded else of_equal_length(rows):
            batch = PaddedBatch(self._model, together, self._routers, self._images)
            self._batches.append(batch)

    def _draw(self, batch: PaddedBatch) -> list[GrowingRow]:
        """One token for every row; returns the rows that it ended."""
        running = [row for row in batch.rows if not row.finish_reason]
        seeds = torch.tensor([row.seed for row in batch.rows], device=self._device)
        positions = torch.tensor([row.position for row in batch.rows], device=self._device)
        samplings = {place: row.sampling for place, row in enumerate(batch.rows)}
        groups = draw_groups(samplings, self._device)
        ids, log_probs = sample_grouped(batch.read(), seeds, positions, groups)
        for row, token, log_prob in zip(batch.rows, ids.tolist(), log_probs.tolist(), strict=True):
            row.take(token, log_prob, self.weight_version)
        batch.append(ids)
        return [row for row in running if row.finish_reason]

    def _tidy(self) -> None:
        """Rows that have ended leave, and what can be read together is one batch."""
        batches: list[PaddedBatch] = []
        for batch in self._batches:
            batch.drop_finished()
            if all(row.finish_reason for row in batch.rows):
                continue
            if batches and batches[-1].joins and batch.joins:
                batches[-1].join(batch)
            else:
                batches.append(batch)
        self._batches = batches

    @torch.no_grad()
    def score(self, token_ids: Sequence[int]) -> NDArray[np.float32]:
        ids = torch.tensor([list(token_ids)], device=self._device)
        log_probs = self._model(input_ids=ids).logits[0, :-1].float().log_softmax(dim=-1)
        return log_probs.gather(-1, ids[0, 1:, None])[:, 0].cpu().numpy()

    @torch.no_grad()
    def load_weights(
        self,
        weights: Iterable[tuple[str, Tensor]],
        *,
        version: int,
        in_flight: InFlight = InFlight.recompute,
    ) -> None:
        parameters, names = self._weights(), []
        for name, tensor in weights:
            self._check_name(name, parameters)
            parameters[name].copy_(tensor)
            names.append(name)
        self._check_complete(names, parameters)
        self.weights_written(version, in_flight)

    def weight_destination(
        self,
        parameters: Sequence[ParameterSpec],
        dtype: torch.dtype,
        device: str,
        in_flight: InFlight = InFlight.recompute,
    ) -> WeightDestination:
        """The engine's own weights; their data type and device are those that it was built with."""
        del dtype, device
        weights, names = self._weights(), [parameter.name for parameter in parameters]
        for name in names:
            self._check_name(name, weights)
        self._check_complete(names, weights)
        return OwnWeights(self, {name: weights[name] for name in names}, in_flight)

    def _weights(self) -> dict[str, Tensor]:
        """The model's, tied ones under each of their names."""
        parameters = dict(self._model.named_parameters(remove_duplicate=False))
        return parameters | stored_buffers(self._model)

    @staticmethod
    def _check_name(name: str, weights: Mapping[str, Tensor]) -> None:
        if name not in weights:
            raise ValueError(
                f"load_weights: {name} is no parameter of the model; pass checkpoint names"
            )

    @staticmethod
    def _check_complete(names: Iterable[str], weights: Mapping[str, Tensor]) -> None:
        """ValueError if a weight is missing; one of the names of a tied one suffices."""
        written = {id(weights[name]) for name in names}
        missing = [name for name, weight in weights.items() if id(weight) not in written]
        if missing:
            raise ValueError(
                f"load_weights: {', '.join(sorted(missing))} not given; pass every parameter of the "
                "model"
            )

    def weights_written(self, version: int, in_flight: InFlight = InFlight.recompute) -> None:
        if in_flight is InFlight.drain:
            self.check_drained()
        if in_flight is InFlight.recompute:
            self.preempt()
        self.weight_version = version

    def sleep(self) -> int:
        """Rows in flight lose their keys and values. The weights stay: this engine is not for
        training large models."""
        self.preempt()
        return 0

    def wake(self) -> None:
        """See sleep."""

    def close(self) -> None:
        del self._model
