"""Models: makes the policy as each attempt of an episode sees it (model.py)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from workers.agents.config import EpisodeConfig
from workers.agents.model import Draw, Limits, Model
from workers.agents.renderer import Message, Renderer
from workers.generation.config import SamplingConfig
from workers.generation.sampling import stop_token_ids
from workers.text import ResponseReader


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """How an episode is drawn."""

    seed: int
    sampling: SamplingConfig
    most_tokens: int
    """That the policy may draw in it."""


class Models:
    """models = Models(tokenizer, tools, end_token_ids, config, context_tokens)
    model = models.make(row, draw, plan)

    May be sent to another process.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        tools: Sequence[Message],
        end_token_ids: Sequence[int],
        config: EpisodeConfig,
        *,
        context_tokens: int,
        vocab_size: int,
    ) -> None:
        self.renderer = Renderer(tokenizer, tools)
        self.end_token_ids, self.context_tokens = tuple(end_token_ids), context_tokens
        self._vocab_size = vocab_size
        self._read, self._config = ResponseReader(tokenizer, end_token_ids), config

    def make(self, row: int, draw: Draw, plan: Plan) -> Model:
        """The policy as an attempt of that episode sees it."""
        return Model(
            row=row,
            draw=draw,
            renderer=self.renderer,
            read=self._read,
            end_token_ids=frozenset(stop_token_ids(plan.sampling, self.end_token_ids)),
            config=self._config,
            limits=Limits(
                reply_tokens=plan.sampling.max_response_tokens,
                sampled_tokens=plan.most_tokens,
                context_tokens=self.context_tokens,
            ),
            vocab_size=self._vocab_size,
        )
