"""vLLM inside the host process: scheduler, paged key/value cache, tensor and pipeline parallel over
the pool's own world.

No process is started: every rank builds its own engine, and the ranks of one replica take the same
decisions because they see the same requests. The engine works with the groups that exist (built
beforehand, for another grouping) or lets vLLM build its own of consecutive ranks. Speculative
decoding, adapters and multimodal inputs are left out. docs/generation.md has the measurements
behind the settings.
"""

from __future__ import annotations

import copy
import gc
import time
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from transformers import PretrainedConfig

from hybridflow.context import RankContext
from hybridflow.layout import Layout
from hybridflow.progress import activity
from hybridflow.resharding import ParameterSpec
from workers.config import ModelConfig
from workers.generation.base import GenerationEngine, Generations
from workers.generation.config import GenerationConfig, SamplingConfig
from workers.generation.sampling import (
    check_prompts,
    end_token_ids,
    load_model_config,
    most_tokens,
    stop_token_ids,
)
from workers.generation.vllm.build import check_build
from workers.generation.vllm.destination import VllmShards
from workers.generation.vllm.groups import build_vllm_groups
from workers.generation.vllm.limits import check_fits, check_known, check_meta
from workers.generation.vllm.memory import (
    CpuMemory,
    CudaMemory,
    EngineMemory,
    model_runner,
    reload_weights,
)
from workers.generation.vllm.own_classes import own_classes
from workers.generation.vllm.setup import (
    build_llm,
    computes_eagerly,
    preserve_process_state,
    sums_through_peers,
    vllm_environment,
)
from workers.precision import with_native_precision

if TYPE_CHECKING:
    from vllm import LLM, RequestOutput, SamplingParams


class VllmEngine(GenerationEngine):
    """See GenerationEngine; one object per rank.

    engine = VllmEngine(model=ModelConfig(path=...), config=GenerationConfig(tp=2), context=context,
    load_weights=False)
    """

    library: ClassVar[str] = "vllm"
    shares_process: ClassVar[bool] = True
    llm: LLM
    """vLLM's own object, for what replaces the weights by other means."""
    has_graphs: bool
    """It computes with CUDA graphs, which hold the addresses of the weights."""

    @classmethod
    def check_device(cls, device: str) -> None:
        check_build(device)

    @classmethod
    def check_model(cls, model: PretrainedConfig, config: GenerationConfig) -> None:
        check_known(model)
        check_fits(model, config)

    @classmethod
    def check_sync(cls, model: PretrainedConfig) -> None:
        check_meta(model)

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

        load_weights=False leaves the weights random, for an actor that pushes its own before the
        first generation.
        """
        check_build(context.device)
        if context.world_size % (config.tp * config.pp):
            raise ValueError(
                f"generation.tp={config.tp}, pp={config.pp}: tp * pp must divide the pool's "
                f"{context.world_size} devices"
            )
        self.layout = layout or Layout.of(
            dp=context.world_size // (config.pp * config.tp), pp=config.pp, tp=config.tp
        )
        self.weight_version = -1
        config = with_native_precision(config, context.device)
        text_config = load_model_config(model)
        self._end_tokens = end_token_ids(model, text_config)
        self._vocab_size: int = text_config.vocab_size
        self._tied: bool = text_config.tie_word_embeddings
        self._has_tokenizer = bool(config.sampling.stop_strings)
        self._has_weights = True
        fast_sum = sums_through_peers(context, config.tp)
        environment = vllm_environment(context, config, fast_sum=fast_sum)
        with activity("building vLLM"), preserve_process_state(context, environment):
            from vllm.distributed.parallel_state import model_parallel_is_initialized

            from workers.generation.vllm.sampler import TrainerSampler

            self._owns_groups = not model_parallel_is_initialized()
            if layout is not None and self._owns_groups:
                build_vllm_groups(replicas_of(layout), fast_sum=fast_sum)
            built: list[nn.Module] = []
            with own_classes(built):
                self.llm = build_llm(
                    model,
                    config,
                    text_config,
                    load_weights=load_weights,
                    cuda=context.device.startswith("cuda"),
                    fast_sum=fast_sum,
                )
                built.append(model_runner(self.llm).get_model())
            # vLLM's own finalizer would destroy torch.distributed's world, which is the pool's.
            self.llm.llm_engine.engine_core._finalizer.detach()
            self._sampler = TrainerSampler(model_runner(self.llm))
            model_runner(self.llm).sampler = self._sampler
        self._max_model_len: int = self.llm.model_config.max_model_len
        self._memory: EngineMemory = (
            CudaMemory(self.llm) if context.device.startswith("cuda") else CpuMemory(self.llm)
        )
        cuda = context.device.startswith("cuda")
        self.has_graphs = cuda and not computes_eagerly(config, cuda=cuda)
        self._check_groups(context.rank)
        prepare_pipeline(self.llm)

    def generate(
        self,
        prompts: Sequence[NDArray[np.int64]],
        seeds: NDArray[np.int64],
        sampling: SamplingConfig,
        limits: NDArray[np.int64] | None = None,
    ) -> Generations:
        start = time.perf_counter()
        most = most_tokens(len(prompts), sampling, limits)
        check_prompts(
            prompts, seeds, sampling, vocab_size=self._vocab_size, max_model_len=self._max_model_len
        )
        if sampling.stop_strings and not self._has_tokenizer:
            raise ValueError(
                f"sampling.stop_strings={sampling.stop_strings}: the engine was built without a "
                "tokenizer; set them in actor.generation.sampling.stop_strings, so that it loads "
                "one"
            )
        params = self._sampling_params(most, sampling)
        self._sampler.start(seeds, sampling)
        try:
            outputs = self._run([prompt.tolist() for prompt in prompts], params)
        finally:
            log_probs = self._sampler.finish()
        completions = [output.outputs[0] for output in outputs]
        lengths = np.array(
            [len(completion.token_ids) for completion in completions], dtype=np.int64
        )
        return Generations(
            response_ids=np.array(
                [token for completion in completions for token in completion.token_ids],
                dtype=np.int64,
            ),
            lengths=lengths,
            log_probs=log_probs[np.arange(log_probs.shape[1]) < lengths[:, None]],
            finish_reasons=[str(completion.finish_reason) for completion in completions],
            num_prompt_tokens=sum(len(prompt) for prompt in prompts),
            seconds=time.perf_counter() - start,
        )

    def score(self, token_ids: Sequence[int]) -> NDArray[np.float32]:
        from vllm import SamplingParams

        from workers.generation.vllm.sampler import ROW

        if not 2 <= len(token_ids) < self._max_model_len:
            raise ValueError(
                f"score: {len(token_ids)} tokens; pass at least 2 and fewer than "
                f"max_model_len={self._max_model_len}"
            )
        tokens = np.array(token_ids, dtype=np.int64)
        if self.layout.axis_size("pp") > 1:
            return self._score_prefixes(tokens)
        # Half of them are generated, by force: decoding runs other code than reading a prompt (other
        # kernels, CUDA graphs, matrices derived from the weights).
        prompt, rest = tokens[: -(-len(tokens) // 2)], tokens[-(-len(tokens) // 2) :]
        params = SamplingParams(
            max_tokens=len(rest),
            temperature=0.0,
            prompt_logprobs=0,
            flat_logprobs=True,
            detokenize=False,
            ignore_eos=True,
            extra_args={ROW: 0},
        )
        sampling = SamplingConfig(max_response_tokens=len(rest))
        self._sampler.start(np.zeros(1, dtype=np.int64), sampling, forced=rest[None])
        try:
            (output,) = self._run([prompt.tolist()], [params])
        finally:
            decoded = self._sampler.finish()[0]
        read = np.array(output.prompt_logprobs.logprobs, dtype=np.float32)
        return np.concatenate([read, decoded])

    def _score_prefixes(self, token_ids: NDArray[np.int64]) -> NDArray[np.float32]:
        """score by one forced token after every prefix: with pipeline stages vLLM has no
        log-probs of prompts."""
        sampling = SamplingConfig(max_response_tokens=1)
        count = len(token_ids) - 1
        forced = token_ids[1:, None]
        self._sampler.start(np.zeros(count, dtype=np.int64), sampling, forced=forced)
        try:
            self._run(
                [token_ids[:length].tolist() for length in range(1, count + 1)],
                self._sampling_params([1] * count, sampling),
            )
        finally:
            log_probs = self._sampler.finish()
        return log_probs[:, 0]

    def weight_destination(
        self, parameters: Sequence[ParameterSpec], dtype: torch.dtype, device: str
    ) -> VllmShards:
        """vLLM's own memory has dtype and device already."""
        del dtype, device
        return VllmShards(self, parameters)

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]], *, version: int) -> None:
        reload_weights(self.llm, weights, tied=self._tied)
        self.weights_written(version)

    def weights_written(self, version: int) -> None:
        self._has_weights = True
        self.llm.reset_prefix_cache()
        self.weight_version = version

    def sleep(self) -> int:
        self.llm.reset_prefix_cache()
        freed = self._memory.release()
        self._has_weights = False
        self.weight_version = -1
        return freed

    def wake(self) -> None:
        self._memory.take_back_weights()

    def close(self) -> None:
        from vllm.distributed.parallel_state import destroy_model_parallel

        core = self.llm.llm_engine.engine_core.engine_core
        core.model_executor.shutdown()
        core.scheduler.shutdown()
        del self.llm, self._sampler, self._memory, core
        gc.unfreeze()
        gc.collect()
        if self._owns_groups:
            destroy_model_parallel()

    def _check_groups(self, rank: int) -> None:
        from vllm.distributed.parallel_state import get_pp_group, get_tp_group

        for axis, group in (("tp", get_tp_group()), ("pp", get_pp_group())):
            expected = list(self.layout.group(rank, axis))
            assert group.ranks == expected, (
                f"vLLM's {axis} group is {group.ranks}, the layout's {expected}: build the groups "
                "of the layout"
            )

    def _sampling_params(
        self, most: Sequence[int], sampling: SamplingConfig
    ) -> list[SamplingParams]:
        """One object a row, which may get `most` tokens; vLLM only counts and stops, drawing is
        TrainerSampler's."""
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        from workers.generation.vllm.sampler import ROW

        common = SamplingParams(
            temperature=0.0,
            max_tokens=sampling.max_response_tokens,
            stop=sampling.stop_strings,
            stop_token_ids=stop_token_ids(sampling, self._end_tokens),
            ignore_eos=True,  # the end-of-sequence tokens are among stop_token_ids
            detokenize=bool(sampling.stop_strings),
            output_kind=RequestOutputKind.FINAL_ONLY,
            skip_clone=True,
        )
        result = []
        for row, max_tokens in enumerate(most):
            params = copy.copy(common)
            params.max_tokens = max_tokens
            params.extra_args = {ROW: row}
            result.append(params)
        return result

    def _run(self, prompts: list[list[int]], params: list[SamplingParams]) -> list[RequestOutput]:
        """Outputs in the order of `prompts`."""
        if not self._has_weights:
            raise RuntimeError(
                "generation: sleep freed the weights; wake the engine and give it weights first"
            )
        self._memory.take_back_cache()
        if not prompts:
            return []
        return self.llm.generate(
            [{"prompt_token_ids": prompt} for prompt in prompts], params, use_tqdm=False
        )


def prepare_pipeline(llm: LLM) -> None:
    """Give later pipeline stages the buffers that they receive into: vLLM allocates them in a
    warm-up that CPUs skip."""
    from vllm.distributed.parallel_state import get_pp_group

    runner = model_runner(llm)
    if not get_pp_group().is_first_rank and runner.intermediate_tensors is None:
        runner.intermediate_tensors = runner.model.make_empty_intermediate_tensors(
            batch_size=runner.max_num_tokens, dtype=runner.dtype, device=runner.device
        )


def replicas_of(layout: Layout) -> list[list[list[int]]]:
    """replicas[replica][stage][tensor part] = rank."""
    replicas = []
    for replica in range(layout.axis_size("dp")):
        stages = []
        for stage in range(layout.axis_size("pp")):
            parts = range(layout.axis_size("tp"))
            stages.append([layout.rank(dp=replica, pp=stage, tp=part) for part in parts])
        replicas.append(stages)
    return replicas
