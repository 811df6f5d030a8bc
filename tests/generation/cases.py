"""What the two processes of test_vllm.py run: real engines on tiny models. Everything measured
goes back as plain data."""

from __future__ import annotations

import os
import random
import traceback
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

from hybridflow.context import RankContext
from workers.config import ModelConfig, Precision
from workers.generation.base import GenerationEngine, Generations
from workers.generation.config import GenerationConfig, SamplingConfig
from workers.generation.hf import HfEngine

VOCAB = 500  # vLLM pads it to 512
END = 1
ROWS = 24
PLAIN = SamplingConfig(max_response_tokens=40)
SAMPLINGS = {
    "plain": PLAIN,
    "cool": replace(PLAIN, temperature=0.6),
    "filtered": replace(PLAIN, temperature=0.8, top_p=0.8, top_k=40, min_p=0.01),
    "greedy": replace(PLAIN, greedy=True),
    "stop_ids": replace(PLAIN, stop_token_ids=list(range(100, 130))),
    "ignore_eos": replace(PLAIN, ignore_eos=True),
    "stop_strings": replace(PLAIN, greedy=True, stop_strings=["t7", "4t"]),
}
CONFIG = GenerationConfig(
    precision=Precision.fp32, max_model_len=96, max_num_seqs=16, sampling=SAMPLINGS["stop_strings"]
)


def make_model(directory: Path, *, tied: bool, seed: int = 0) -> Qwen2ForCausalLM:
    """A Qwen2 of 2 layers with a tokenizer of the words t0, t1, ..., which decodes them without
    spaces."""
    torch.manual_seed(seed)
    config = Qwen2Config(
        hidden_size=64,
        num_hidden_layers=2,
        vocab_size=VOCAB,
        intermediate_size=128,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=128,
        tie_word_embeddings=tied,
        eos_token_id=END,
        bos_token_id=None,
        initializer_range=0.15,
    )
    model = Qwen2ForCausalLM(config).eval()
    model.save_pretrained(directory)
    save_tokenizer(directory)
    return model


def save_tokenizer(directory: Path) -> None:
    words = Tokenizer(
        models.WordLevel({f"t{token}": token for token in range(VOCAB)}, unk_token="t0")
    )
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="t0").save_pretrained(directory)


def rows() -> tuple[list[np.ndarray], np.ndarray]:
    """Prompts of 1 to 50 tokens, each twice, and nearby seeds."""
    generator = np.random.default_rng(0)
    prompts = [
        generator.integers(2, VOCAB, length) for length in generator.integers(1, 51, ROWS // 2)
    ]
    return [prompt for prompt in prompts for _ in range(2)], np.arange(ROWS, dtype=np.int64) + (
        7 << 40
    )


def run(rank: int, port: int, models: dict[str, str], output: str) -> None:
    """Entry point of a process; writes {case: result} or the traceback."""
    os.environ.update(
        RANK=str(rank),
        WORLD_SIZE="2",
        LOCAL_RANK=str(rank),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
    )
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=2)
    results: dict[str, Any] = {}
    try:
        for case in (data_parallel, untied, tensor_parallel, pipeline_parallel):
            results |= case(rank, {name: Path(path) for name, path in models.items()})
    except Exception:
        results["failure"] = traceback.format_exc()
        raise
    finally:
        if rank == 0 or "failure" in results:
            torch.save(results, f"{output}.{rank}")
    dist.barrier()
    dist.destroy_process_group()


def vllm_engine(rank: int, path: Path, **config: Any) -> GenerationEngine:
    from tests.generation.labelled import LabelledEngine

    return LabelledEngine(
        model=ModelConfig(path=str(path)), config=replace(CONFIG, **config), context=context(rank)
    )


def context(rank: int) -> RankContext:
    return RankContext(rank=rank, world_size=2, local_rank=rank)


def data_parallel(rank: int, models: dict[str, Path]) -> dict[str, Any]:
    """Two engines of one process each; then rank 0's alone."""
    from tests.generation import vllm_streams

    before = process_state()
    engine = vllm_engine(rank, models["tied"])
    results: dict[str, Any] = {"state_kept": process_state() == before}
    prompts, seeds = rows()
    mine = slice(0, ROWS // 3) if rank == 0 else slice(ROWS // 3, ROWS)  # of unequal sizes
    parts: list[Generations | None] = [None, None]
    dist.all_gather_object(parts, engine.generate(prompts[mine], seeds[mine], PLAIN))
    results["two_engines"] = parts
    results["state_kept"] &= process_state() == before
    if rank == 0:
        hf = HfEngine(
            model=ModelConfig(path=str(models["tied"])), config=CONFIG, context=context(rank)
        )
        for name, sampling in SAMPLINGS.items():
            results[name] = engine.generate(prompts, seeds, sampling)
            results[f"hf {name}"] = hf.generate(prompts, seeds, sampling)
        results["none"] = engine.generate([], seeds[:0], PLAIN)
        results["other_seeds"] = engine.generate(prompts, seeds + 1, PLAIN)
        results["errors"] = bad_inputs(engine)
        results["sleep"] = sleep_and_wake(engine, models["tied"])
        results |= vllm_streams.measure(engine, hf, models)
        results["tied"] = reload(engine, models["other_tied"])
        results["both_names"] = reload(engine, models["tied"], both_names=True)
        results["stale_head"] = stale_head(engine, models["other_tied"])
    dist.barrier()
    engine.close()
    results["world_kept"] = dist.is_initialized()
    return results


def untied(rank: int, models: dict[str, Path]) -> dict[str, Any]:
    engine = vllm_engine(rank, models["untied"])
    results = {"untied": reload(engine, models["other_untied"])}
    if rank == 0:
        results["missing"] = error(
            lambda: engine.load_weights(
                weights(models["untied"], drop="layers.1.self_attn.k_proj.weight"), version=9
            )
        )
    engine.close()
    return results


def tensor_parallel(rank: int, models: dict[str, Path]) -> dict[str, Any]:
    return replica_of_two(rank, models, "tp")


def pipeline_parallel(rank: int, models: dict[str, Path]) -> dict[str, Any]:
    return replica_of_two(rank, models, "pp")


def replica_of_two(rank: int, models: dict[str, Path], axis: str) -> dict[str, Any]:
    """Both ranks ask for the same rows."""
    from tests.generation import vllm_streams

    engine = vllm_engine(rank, models["tied"], **{axis: 2})
    prompts, seeds = rows()
    parts: list[Generations | None] = [None, None]
    dist.all_gather_object(parts, engine.generate(prompts, seeds, PLAIN))
    results = {
        axis: parts,
        f"{axis} layout": engine.layout,
        f"{axis} reload": reload(engine, models["other_tied"]),
    }
    streamed: list[Any] = [None, None]
    dist.all_gather_object(streamed, vllm_streams.slices(engine, models))
    results[f"{axis} stream"] = streamed
    engine.close()
    return results


def reload(
    engine: GenerationEngine, directory: Path, *, both_names: bool = False
) -> tuple[np.ndarray, np.ndarray, int]:
    """Scores by the engine after it got the weights of `directory`, and by transformers."""
    probe = np.random.default_rng(1).integers(0, VOCAB, 40).tolist()
    engine.score(probe)  # its prefix is cached now, under the old weights
    engine.load_weights(weights(directory, both_names=both_names), version=5)
    return engine.score(probe), reference_score(directory, probe), engine.weight_version


def stale_head(engine: GenerationEngine, directory: Path) -> tuple[np.ndarray, np.ndarray]:
    """The fault that score is there for: vLLM's own reload of tied weights leaves its repacked
    head as it was."""
    from workers.generation.vllm.engine import VllmEngine
    from workers.generation.vllm.memory import model_runner

    assert isinstance(engine, VllmEngine)
    probe = np.random.default_rng(1).integers(0, VOCAB, 40).tolist()
    model_runner(engine.llm).reload_weights(weights_iterator=weights(directory))
    engine.weights_written(6)
    return engine.score(probe), reference_score(directory, probe)


def weights(
    directory: Path, *, both_names: bool = False, drop: str = "nothing"
) -> list[tuple[str, torch.Tensor]]:
    model = Qwen2ForCausalLM.from_pretrained(directory)
    named = model.named_parameters(remove_duplicate=not both_names)
    return [(name, parameter.detach()) for name, parameter in named if not name.endswith(drop)]


@torch.no_grad()
def reference_score(directory: Path, probe: list[int]) -> np.ndarray:
    log_probs = (
        Qwen2ForCausalLM.from_pretrained(directory)(torch.tensor([probe]))
        .logits[0, :-1]
        .log_softmax(dim=-1)
    )
    return log_probs.gather(-1, torch.tensor(probe)[1:, None])[:, 0].numpy()


def sleep_and_wake(engine: GenerationEngine, directory: Path) -> dict[str, Any]:
    prompts, seeds = rows()
    before = engine.generate(prompts, seeds, PLAIN)
    cache_bytes = [resident_cache(engine)]
    engine.sleep()
    engine.sleep()
    cache_bytes.append(resident_cache(engine))
    asleep = error(lambda: engine.generate(prompts, seeds, PLAIN)), engine.weight_version
    engine.wake()
    unfilled = error(lambda: engine.score([1, 2, 3]))
    engine.load_weights(weights(directory), version=3)
    after = engine.generate(prompts, seeds, PLAIN)
    cache_bytes.append(resident_cache(engine))
    return {
        "cache_bytes": cache_bytes,
        "asleep": asleep,
        "unfilled": unfilled,
        "before": before,
        "after": after,
    }


def resident_cache(engine: GenerationEngine) -> int:
    from workers.generation.vllm.engine import VllmEngine
    from workers.generation.vllm.memory import model_runner

    assert isinstance(engine, VllmEngine)
    return model_runner(engine.llm).kv_caches[0].untyped_storage().nbytes()


def bad_inputs(engine: GenerationEngine) -> dict[str, str]:
    good = np.array([5, 6, 7])
    calls: dict[str, tuple[list[Any], SamplingConfig]] = {
        "empty": ([good, np.array([], dtype=np.int64)], PLAIN),
        "long": ([good, good, np.full(57, 4)], PLAIN),
        "vocabulary": ([np.array([5, VOCAB])], PLAIN),
        "negative": ([np.array([-1, 5])], PLAIN),
        "temperature": ([good], replace(PLAIN, temperature=0.0)),
        "top_p": ([good], replace(PLAIN, top_p=1.5)),
        "max_response_tokens": ([good], replace(PLAIN, max_response_tokens=0)),
    }
    errors = {}
    for name, (prompts, sampling) in calls.items():
        seeds = np.arange(len(prompts))
        errors[name] = error(partial(engine.generate, prompts, seeds, sampling))
    errors["seeds"] = error(lambda: engine.generate([good], np.arange(2), PLAIN))
    return errors


def error(call: Callable[[], object]) -> str:
    try:
        call()
    except (ValueError, RuntimeError) as raised:
        return f"{type(raised).__name__}: {raised}"
    return "nothing raised"


def process_state() -> tuple[object, ...]:
    """What the trainer in the same process relies on."""
    generators = (
        torch.get_rng_state().sum().item(),
        hash(random.getstate()),
        hash(np.random.get_state()[1].tobytes()),
    )
    return (
        *generators,
        torch.get_num_threads(),
        torch.set_num_threads,
        tuple(os.sched_getaffinity(0)),
        os.environ.get("LD_PRELOAD"),
    )
