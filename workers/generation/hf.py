"""The slow reference: a transformers model, one token for every row at a time, with the draws that
every engine uses.

No scheduler, no shared prefixes, no parallelism: every rank holds the whole model and is a replica
of its own. In float32 it gives the tokens that vLLM gives.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoModelForCausalLM,
    DynamicCache,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from hybridflow.context import RankContext
from hybridflow.layout import Layout
from workers.config import ModelConfig, Precision
from workers.engines.base import Head
from workers.engines.model.loading import position_limit
from workers.generation import other_engines
from workers.generation.base import GenerationEngine, Generations
from workers.generation.config import GenerationConfig, SamplingConfig
from workers.generation.draws import sample_tokens
from workers.generation.sampling import (
    check_prompts,
    end_token_ids,
    load_model_config,
    most_tokens,
    stop_token_ids,
)
from workers.precision import with_native_precision
from workers.tokenizer import load_tokenizer


class HfEngine(GenerationEngine):
    """See GenerationEngine.

    engine = HfEngine(model=ModelConfig(path=...), config=GenerationConfig(), context=context)
    """

    releases = False

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
        kind = type(model)
        if kind in MODEL_FOR_CAUSAL_LM_MAPPING and MODEL_FOR_CAUSAL_LM_MAPPING[kind]._is_stateful:
            raise ValueError(
                f"generation.engine is 'hf', which pads prompts on the left, and the layers of "
                f"{model.model_type} carry a state that would read the padding; set "
                f"generation.engine to another: {other_engines('hf')}"
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
        self._vocab_size: int = text_config.vocab_size
        self._max_model_len: int = config.max_model_len or position_limit(model, Head.lm)
        self._max_num_seqs = config.max_num_seqs
        self._end_tokens = end_token_ids(model, text_config)
        self._device = context.device
        self._tokenizer: PreTrainedTokenizerBase | None = None
        if config.sampling.stop_strings:
            self._tokenizer = load_tokenizer(model)
        self._model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
            model.path,
            revision=model.revision,
            trust_remote_code=model.trust_remote_code,
            dtype=torch.float32 if config.precision == Precision.fp32 else torch.bfloat16,
        ).to(context.device)
        self._model.eval()

    @torch.no_grad()
    def generate(
        self,
        prompts: Sequence[NDArray[np.int64]],
        seeds: NDArray[np.int64],
        sampling: SamplingConfig,
        limits: NDArray[np.int64] | None = None,
    ) -> Generations:
        start = time.perf_counter()
        rows = [Row(most) for most in most_tokens(len(prompts), sampling, limits)]
        check_prompts(
            prompts, seeds, sampling, vocab_size=self._vocab_size, max_model_len=self._max_model_len
        )
        stop = StopRule(stop_token_ids(sampling, self._end_tokens), sampling, self._tokenizer)
        for first in range(0, len(prompts), self._max_num_seqs):
            part = slice(first, first + self._max_num_seqs)
            own_seeds = torch.from_numpy(np.asarray(seeds[part], dtype=np.int64)).to(self._device)
            self._generate(rows[part], prompts[part], own_seeds, sampling, stop)
        return Generations(
            response_ids=np.array([token for row in rows for token in row.tokens], dtype=np.int64),
            lengths=np.array([len(row.tokens) for row in rows], dtype=np.int64),
            log_probs=np.array(
                [value for row in rows for value in row.log_probs], dtype=np.float32
            ),
            finish_reasons=[row.finish_reason for row in rows],
            num_prompt_tokens=sum(len(prompt) for prompt in prompts),
            seconds=time.perf_counter() - start,
        )

    def _generate(
        self,
        rows: Sequence[Row],
        prompts: Sequence[NDArray[np.int64]],
        seeds: Tensor,
        sampling: SamplingConfig,
        stop: StopRule,
    ) -> None:
        """Fills the rows."""
        inputs, mask = left_padded(prompts, self._device)
        positions = (mask.cumsum(dim=-1) - 1).clamp(min=0)
        cache = DynamicCache(config=self._model.config)
        for step in range(sampling.max_response_tokens):
            outputs = self._model(
                input_ids=inputs,
                attention_mask=mask,
                position_ids=positions,
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=1,
            )
            ids, log_probs = sample_tokens(
                outputs.logits[:, -1], seeds, torch.full_like(seeds, step), sampling
            )
            for row, token, log_prob in zip(rows, ids.tolist(), log_probs.tolist(), strict=True):
                row.take(token, log_prob, stop)
            if all(row.finish_reason for row in rows):
                break
            inputs, positions = ids.unsqueeze(-1), positions[:, -1:] + 1
            mask = torch.cat([mask, torch.ones_like(inputs)], dim=-1)

    @torch.no_grad()
    def score(self, token_ids: Sequence[int]) -> NDArray[np.float32]:
        ids = torch.tensor([list(token_ids)], device=self._device)
        log_probs = self._model(input_ids=ids).logits[0, :-1].float().log_softmax(dim=-1)
        return log_probs.gather(-1, ids[0, 1:, None])[:, 0].cpu().numpy()

    @torch.no_grad()
    def load_weights(self, weights: Iterable[tuple[str, Tensor]], *, version: int) -> None:
        parameters = dict(self._model.named_parameters(remove_duplicate=False))
        # Tied names count once.
        missing = {id(parameter): name for name, parameter in parameters.items()}
        for name, tensor in weights:
            if name not in parameters:
                raise ValueError(
                    f"load_weights: {name} is no parameter of the model; pass checkpoint names"
                )
            parameters[name].copy_(tensor)
            missing.pop(id(parameters[name]), None)
        if missing:
            raise ValueError(
                f"load_weights: {', '.join(sorted(missing.values()))} not given; pass every "
                "parameter of the model"
            )
        self.weight_version = version

    def weights_written(self, version: int) -> None:
        self.weight_version = version

    def sleep(self) -> int:
        """Nothing to free: the cache lives for one call only, and this engine is not for
        training large models."""
        return 0

    def wake(self) -> None:
        """See sleep."""

    def close(self) -> None:
        del self._model


class Row:
    """One response as it grows; tokens after its end are ignored."""

    def __init__(self, most: int) -> None:
        """`most`: tokens after which it ends at the latest."""
        self.most = most
        self.tokens: list[int] = []
        self.log_probs: list[float] = []
        self.finish_reason = ""

    def take(self, token: int, log_prob: float, stop: StopRule) -> None:
        if not self.finish_reason:
            self.tokens.append(token)
            self.log_probs.append(log_prob)
            self.finish_reason = stop.reason(self.tokens, self.most)


class StopRule:
    """Why a response ends, if it does."""

    def __init__(
        self,
        token_ids: Sequence[int],
        sampling: SamplingConfig,
        tokenizer: PreTrainedTokenizerBase | None,
    ) -> None:
        if sampling.stop_strings and tokenizer is None:
            raise ValueError(
                f"sampling.stop_strings={sampling.stop_strings} needs a tokenizer; set "
                "generation.sampling.stop_strings too"
            )
        self._token_ids = set(token_ids)
        self._sampling = sampling
        self._tokenizer = tokenizer

    def reason(self, tokens: list[int], most: int) -> str:
        """ "stop", "length", or "" to go on."""
        if tokens[-1] in self._token_ids:
            return "stop"
        if self._sampling.stop_strings and self._tokenizer is not None:
            text = self._tokenizer.decode(tokens, skip_special_tokens=True)
            if any(string in text for string in self._sampling.stop_strings):
                return "stop"
        return "length" if len(tokens) == most else ""


def left_padded(prompts: Sequence[NDArray[np.int64]], device: str) -> tuple[Tensor, Tensor]:
    """Token ids and attention mask, int64 [rows, longest prompt], prompts at the right end."""
    longest = max(len(prompt) for prompt in prompts)
    ids = np.zeros((len(prompts), longest), dtype=np.int64)
    mask = np.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, longest - len(prompt) :] = prompt
        mask[row, longest - len(prompt) :] = 1
    return torch.from_numpy(ids).to(device), torch.from_numpy(mask).to(device)
