"""Building vLLM's engine in a process and a torch.distributed world that belong to somebody
else."""

from __future__ import annotations

import gc
import logging
import os
import random
import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.distributed as dist
from transformers import PretrainedConfig

from hybridflow.context import RankContext
from hybridflow.devices import segments_grow
from workers.config import LoraConfig, ModelConfig, Precision
from workers.engines.model.loading import standard_sizes
from workers.generation import other_engines
from workers.generation.cache import CPU_BLOCK_SIZE, cache_bytes
from workers.generation.config import GenerationConfig
from workers.generation.vllm import images
from workers.generation.vllm.adapter import engine_options

if TYPE_CHECKING:
    from vllm import LLM

ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
    "VLLM_USE_V2_MODEL_RUNNER": "0",
    "VLLM_USE_FLASHINFER_SAMPLER": "0",
}
"""Read when vLLM is imported: one process, no telemetry, the model runner whose sampler can be
replaced, no kernels compiled for the sampler that is replaced."""

WINDOWS_WITH_ONE_MORE = ("cohere2", "cohere2_moe")
"""Model types whose windows vLLM makes one token longer than transformers."""


def build_llm(
    model: ModelConfig,
    config: GenerationConfig,
    text_config: PretrainedConfig,
    *,
    load_weights: bool,
    cuda: bool = False,
    fast_sum: bool = False,
    lora: LoraConfig | None = None,
    sees_images: bool = False,
) -> LLM:
    """vLLM's engine in this process, on torch.distributed's world; its parallel groups may
    exist already. `fast_sum`: as in build_vllm_groups."""
    from vllm import LLM

    return LLM(
        model.path,
        revision=model.revision,
        trust_remote_code=model.trust_remote_code,
        tokenizer=model.tokenizer or model.path,
        tokenizer_revision=None if model.tokenizer else model.revision,
        skip_tokenizer_init=not (config.sampling.stop_strings or sees_images),
        generation_config="vllm",
        load_format="auto" if load_weights else "dummy",
        use_tqdm_on_load=False,
        dtype="float32" if config.precision == Precision.fp32 else "bfloat16",
        tensor_parallel_size=config.tp,
        pipeline_parallel_size=config.pp,
        distributed_executor_backend="external_launcher",
        max_model_len=config.max_model_len or -1,  # what the cache holds, up to the model's limit
        max_num_seqs=config.max_num_seqs,
        max_num_batched_tokens=config.max_num_batched_tokens,
        gpu_memory_utilization=config.gpu_memory_fraction,
        kv_cache_memory_bytes=None if cuda else cache_bytes(standard_sizes(text_config), config),
        block_size=config.block_size or (None if cuda else CPU_BLOCK_SIZE),
        enable_prefix_caching=config.prefix_caching,
        enforce_eager=computes_eagerly(config, cuda=cuda),
        enable_sleep_mode=cuda and bool(config.release_during_training),
        disable_custom_all_reduce=not fast_sum,
        # FlashInfer's kernels, the first choice on Blackwell, reorder the experts' weights after
        # loading: a sync would write into the wrong order.
        moe_backend="triton" if cuda else "auto",
        async_scheduling=False,  # TrainerSampler counts the tokens that a row has
        seed=0,
        hf_overrides=own_window(text_config),
        **engine_options(lora),
        **images.engine_options(sees_images),
    )


UNKNOWN_TO_VLLM = (
    AssertionError,
    AttributeError,
    IndexError,
    KeyError,
    NotImplementedError,
    TypeError,
)
"""Raised by vLLM's code at a configuration that it was not written for."""


@contextmanager
def named_refusal(model_type: str) -> Iterator[None]:
    """Turns the errors of vLLM's own code at a model that it does not know into a ValueError."""
    try:
        yield
    except UNKNOWN_TO_VLLM as error:
        where = traceback.extract_tb(error.__traceback__)[-1]
        what = " ".join(f"{type(error).__name__}: {error}".split()).removesuffix(":")
        raise ValueError(
            f"generation.engine is 'vllm', which can't build a model of {model_type} ({what}, in "
            f"{Path(where.filename).name}, line {where.lineno}); set generation.engine to "
            f"{other_engines('vllm')}"
        ) from error


def computes_eagerly(config: GenerationConfig, *, cuda: bool) -> bool:
    """Whether the model runs operator by operator: neither compiled nor captured in CUDA graphs."""
    return not cuda if config.enforce_eager is None else config.enforce_eager


def sums_through_peers(context: RankContext, config: GenerationConfig) -> bool:
    """Whether vLLM may sum tensor parts by kernels that read other GPUs' memory; NCCL sums otherwise.

    It numbers the GPUs of a group from 0, so that this process must see that many
    (RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES=1); by default it sees its own. Graphs open each other's
    buffers, which CUDA does not allow of segments that grow and of memory that sleeps: the process
    would end without a word (vLLM's issue 42609).
    """
    if not context.device.startswith("cuda") or not 1 < config.tp <= torch.cuda.device_count():
        return False
    is_opened = not segments_grow() and not config.release_during_training
    return is_opened or computes_eagerly(config, cuda=True)


def vllm_environment(
    context: RankContext, config: GenerationConfig, *, fast_sum: bool
) -> dict[str, str]:
    """The environment that the engine computes under, from before vLLM is imported."""
    environment = {"VLLM_LOGGING_LEVEL": "INFO" if config.verbose else "ERROR"}
    environment = {**environment, **dict(os.environ), **ENVIRONMENT}
    if not context.device.startswith("cuda"):
        return environment
    if not fast_sum:
        # Both number GPUs as the kernels of sums_through_peers do.
        environment |= {"VLLM_ALLREDUCE_USE_SYMM_MEM": "0", "VLLM_ALLREDUCE_USE_FLASHINFER": "0"}
    if config.precision is Precision.fp32:
        # vLLM's attention in float32 is Triton's, whose products are TF32 by default: three digits.
        # Kernels are compiled at their first use, with what is set then.
        environment["TRITON_F32_DEFAULT"] = "ieee"
    return environment


def own_window(text_config: PretrainedConfig) -> dict[str, int]:
    """Changes to the configuration that vLLM reads: Cohere 2's sliding_window, to which its model adds
    one. In transformers a token attends to itself and to sliding_window - 1 before it."""
    window = standard_sizes(text_config).get("sliding_window")
    if text_config.model_type not in WINDOWS_WITH_ONE_MORE or not window:
        return {}
    return {"sliding_window": window - 1}


@contextmanager
def preserve_process_state(context: RankContext, environment: dict[str, str]) -> Iterator[None]:
    """Let vLLM start without keeping what it changes in the process that it runs in.

    It seeds every global random generator, replaces torch.set_num_threads by a no-op (CPU) and
    edits the environment that later child processes would inherit (LD_PRELOAD among it). It binds
    no thread to a core when it runs in the calling process. `environment`: what stays in place of
    the present one (vllm_environment).
    """
    assert dist.is_initialized(), (
        "the pool's torch.distributed world must exist before a generation engine"
    )
    verbose = environment["VLLM_LOGGING_LEVEL"].upper() != "ERROR"
    os.environ.update(environment)
    # vLLM writes lines before it reads that variable.
    logging.getLogger("vllm").setLevel(os.environ["VLLM_LOGGING_LEVEL"].upper())
    os.environ.update(
        RANK=str(context.rank),
        WORLD_SIZE=str(context.world_size),
        LOCAL_RANK=str(context.local_rank),
    )
    os.environ.pop("VLLM_CPU_KVCACHE_SPACE", None)  # would override kv_cache_bytes
    set_num_threads, num_threads = torch.set_num_threads, torch.get_num_threads()
    matmul_precision = torch.get_float32_matmul_precision()
    python_state, numpy_state = random.getstate(), np.random.get_state()
    cuda = context.device.startswith("cuda")
    stream = torch.cuda.current_stream(context.device) if cuda else None
    # vLLM collects garbage five times while it starts: over everything imported that takes two
    # seconds.
    gc.freeze()
    try:
        with torch.random.fork_rng(), warnings.catch_warnings():
            if not verbose:
                # Of its own use of torch.
                warnings.filterwarnings("ignore", category=FutureWarning, module=r"vllm\.")
            yield
    finally:
        random.setstate(python_state)
        np.random.set_state(numpy_state)
        torch.set_num_threads = set_num_threads
        torch.set_num_threads(num_threads)
        torch.set_float32_matmul_precision(matmul_precision)
        if stream is not None:
            # vLLM makes a stream of its own the current one, for good; DeepSpeed works on the default
            # stream and would not wait for it. vLLM takes notice of this call.
            torch.cuda.synchronize(context.device)
            torch.cuda.set_stream(stream)
        os.environ.clear()
        os.environ.update(environment)
