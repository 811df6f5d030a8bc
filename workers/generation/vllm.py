"""vLLM inside the host process: scheduler, paged key/value cache, tensor and pipeline parallel over the pool's own world.

No process is started: every rank builds its own engine, and the ranks of one replica take the same decisions because they see
the same requests. The engine works with the groups that exist (built beforehand, for another grouping) or lets vLLM build its
own of consecutive ranks. Speculative decoding, adapters and several models are left out.
"""

from __future__ import annotations

import copy
import gc
import os
import random
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray

from hybridflow.context import RankContext
from hybridflow.layout import Layout
from workers.config import ModelConfig, Precision
from workers.generation.base import GenerationEngine, Generations
from workers.generation.config import GenerationConfig, SamplingConfig
from workers.generation.sampling import check_prompts, end_token_ids, load_model_config, stop_token_ids

if TYPE_CHECKING:
    from vllm import LLM, SamplingParams

ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
    "VLLM_USE_V2_MODEL_RUNNER": "0",
}
"""What vLLM reads when it is imported: one process, no telemetry, the model runner whose sampler can be replaced."""


class VllmEngine(GenerationEngine):
    """See GenerationEngine; one object per rank.

    engine = VllmEngine(model=ModelConfig(path=...), config=GenerationConfig(tp=2), context=context, load_weights=False)
    """

    def __init__(
        self, *, model: ModelConfig, config: GenerationConfig, context: RankContext, load_weights: bool = True, layout: Layout | None = None
    ) -> None:
        """Build the engine; collective over the pool.

        load_weights=False leaves the weights random, for an actor that pushes its own before the first generation.
        """
        check_layout(config, context.world_size)
        self.layout = layout or Layout.of(dp=context.world_size // (config.pp * config.tp), pp=config.pp, tp=config.tp)
        self.weight_version = -1
        self._config = config
        self._rank = context.rank
        text_config = load_model_config(model)
        self._end_tokens = end_token_ids(model, text_config)
        self._vocab_size: int = text_config.vocab_size
        self._tied: bool = text_config.tie_word_embeddings
        self._num_calls = 0
        with guest(context, config):
            from vllm.distributed.parallel_state import model_parallel_is_initialized

            from workers.generation.vllm_sampler import TrainerSampler

            self._owns_groups = not model_parallel_is_initialized()
            self._llm = build_llm(model, config, load_weights=load_weights)
            self._sampler = self._runner.sampler = TrainerSampler(self._runner)
            # vLLM's own finalizer would destroy torch.distributed's world, which is the pool's.
            self._llm.llm_engine.engine_core._finalizer.detach()
        self._max_model_len: int = self._llm.model_config.max_model_len

    def generate(self, prompts: Sequence[NDArray[np.int64]], seeds: NDArray[np.int64], sampling: SamplingConfig) -> Generations:
        start = time.perf_counter()
        check_prompts(prompts, seeds, sampling, vocab_size=self._vocab_size, max_model_len=self._max_model_len)
        params = self._sampling_params(len(prompts), sampling)
        self._sampler.start(seeds, sampling)
        outputs = self._run([prompt.tolist() for prompt in prompts], params)
        log_probs = self._sampler.finish()
        completions = [output.outputs[0] for output in outputs]
        lengths = np.array([len(completion.token_ids) for completion in completions], dtype=np.int64)
        return Generations(
            response_ids=np.array([token for completion in completions for token in completion.token_ids], dtype=np.int64),
            lengths=lengths,
            log_probs=log_probs[np.arange(log_probs.shape[1]) < lengths[:, None]],
            finish_reasons=[completion.finish_reason for completion in completions],
            num_prompt_tokens=sum(len(prompt) for prompt in prompts),
            seconds=time.perf_counter() - start,
        )

    def score(self, token_ids: Sequence[int]) -> NDArray[np.float32]:
        from vllm import SamplingParams

        params = SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=0, flat_logprobs=True, detokenize=False, ignore_eos=True)
        (output,) = self._run([list(token_ids)], [params])
        return np.array(output.prompt_logprobs.logprobs, dtype=np.float32)

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]], *, version: int) -> None:
        self._runner.reload_weights(weights_iterator=self._with_head(weights))
        self._llm.reset_prefix_cache()
        self.weight_version = version

    def sleep(self) -> None:
        pass

    def wake(self) -> None:
        pass

    def close(self) -> None:
        from vllm.distributed.parallel_state import destroy_model_parallel

        core = self._llm.llm_engine.engine_core.engine_core
        core.model_executor.shutdown()
        core.scheduler.shutdown()
        del self._llm, core
        gc.unfreeze()
        gc.collect()
        if self._owns_groups:
            destroy_model_parallel()

    @property
    def _runner(self):
        return self._llm.llm_engine.model_executor.driver_worker.worker.model_runner

    def _sampling_params(self, num_rows: int, sampling: SamplingConfig) -> list[SamplingParams]:
        """One object a row; vLLM only counts and stops, drawing is TrainerSampler's."""
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        from workers.generation.vllm_sampler import ROW

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
        for row in range(num_rows):
            params = copy.copy(common)
            params.extra_args = {ROW: row}
            result.append(params)
        return result

    def _run(self, prompts: list[list[int]], params: list[SamplingParams]):
        """Outputs in the order of `prompts`."""
        return self._llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], params, use_tqdm=False)

    def _with_head(self, weights: Iterable[tuple[str, torch.Tensor]]) -> Iterator[tuple[str, torch.Tensor]]:
        """Pass tied embeddings a second time as the head: on CPU vLLM keeps a repacked copy that only its own name refreshes."""
        for name, tensor in weights:
            yield name, tensor
            if self._tied and name.endswith("embed_tokens.weight"):
                yield "lm_head.weight", tensor


def check_layout(config: GenerationConfig, world_size: int) -> None:
    """Raise a ValueError for sizes that do not divide the pool."""
    if world_size % (config.tp * config.pp):
        raise ValueError(f"generation.tp={config.tp}, pp={config.pp}: tp * pp must divide the pool's {world_size} devices")


def build_llm(model: ModelConfig, config: GenerationConfig, *, load_weights: bool) -> LLM:
    """vLLM's engine in this process, on torch.distributed's world."""
    from vllm import LLM

    return LLM(
        model.path,
        revision=model.revision,
        trust_remote_code=model.trust_remote_code,
        tokenizer=model.tokenizer or model.path,
        skip_tokenizer_init=not config.sampling.stop_strings,
        generation_config="vllm",
        load_format="auto" if load_weights else "dummy",
        dtype="float32" if config.precision == Precision.fp32 else "bfloat16",
        tensor_parallel_size=config.tp,
        pipeline_parallel_size=config.pp,
        distributed_executor_backend="external_launcher",
        max_model_len=config.max_model_len or None,
        max_num_seqs=config.max_num_seqs,
        max_num_batched_tokens=config.max_num_batched_tokens,
        gpu_memory_utilization=config.gpu_memory_fraction,
        kv_cache_memory_bytes=config.kv_cache_bytes if not torch.cuda.is_available() else None,
        enforce_eager=config.enforce_eager,
        enable_prefix_caching=config.prefix_caching,
        block_size=config.block_size or None,
        async_scheduling=False,  # TrainerSampler counts the tokens that a row has
        seed=0,
    )


@contextmanager
def guest(context: RankContext, config: GenerationConfig) -> Iterator[None]:
    """Let vLLM start without keeping what it changes in the process that it is a guest of.

    It seeds every global random generator, replaces torch.set_num_threads by a no-op (CPU) and edits the environment that
    later child processes would inherit (LD_PRELOAD among it).
    """
    assert dist.is_initialized(), "the pool's torch.distributed world must exist before a generation engine"
    os.environ.update(ENVIRONMENT)
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "INFO" if config.verbose else "ERROR")
    environment = dict(os.environ)
    os.environ.update(RANK=str(context.rank), WORLD_SIZE=str(context.world_size), LOCAL_RANK=str(context.local_rank))
    os.environ.pop("VLLM_CPU_KVCACHE_SPACE", None)  # would override kv_cache_bytes
    set_num_threads, num_threads = torch.set_num_threads, torch.get_num_threads()
    python_state, numpy_state = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng():
            yield
    finally:
        random.setstate(python_state)
        np.random.set_state(numpy_state)
        torch.set_num_threads = set_num_threads
        torch.set_num_threads(num_threads)
        os.environ.clear()
        os.environ.update(environment)
