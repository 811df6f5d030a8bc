"""What recording routes (R3) costs the generation engine: two engines vllm in this process draw the same
responses in turns, and one of them keeps the routes of every token."""

from __future__ import annotations

import atexit
import statistics
import time
from pathlib import Path

import numpy as np
import torch.distributed as dist

from hybridflow.context import RankContext
from tests.engines.threed_cases import VOCABULARY
from tests.experts.plain import save_tiny_mixture
from workers.config import ModelConfig, Precision
from workers.generation import generation_engine_class
from workers.generation.base import GenerationEngine, Generations
from workers.generation.config import GenerationConfig, SamplingConfig

SIZES = {
    "hidden_size": 256,
    "num_hidden_layers": 4,
    "head_dim": 64,
    "num_experts": 32,
    "num_experts_per_tok": 4,
    "moe_intermediate_size": 128,
    "mlp_only_layers": [],
    "max_position_embeddings": 256,
}
ROWS, PROMPT_TOKENS, RESPONSE_TOKENS = 32, 48, 64
TURNS = 7
SAMPLING = SamplingConfig(max_response_tokens=RESPONSE_TOKENS, ignore_eos=True)


def overhead(directory: Path) -> tuple[float, int, int]:
    """(processor seconds of generation with routes over those without, the median of several turns;
    bytes of the routes of a call; the fewest: two for each expert of a token and layer)."""
    path = save_tiny_mixture(directory / "routes", "qwen3_moe", **SIZES)
    if not dist.is_initialized():  # for good: vLLM keeps its group of all ranks in it
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        atexit.register(dist.destroy_process_group)
    engines = [_engine(path), _engine(path)]
    engines[1].record_routes()
    ratios = []
    routes = None
    for turn in range(TURNS + 1):
        plain, _ = _timed(engines[0], turn)
        recording, drawn = _timed(engines[1], turn)
        routes = drawn.routes
        if turn:  # the first warms up
            ratios.append(recording / plain)
    assert routes is not None
    for engine in engines[::-1]:
        engine.close()
    tokens = ROWS * (PROMPT_TOKENS + RESPONSE_TOKENS - 1)
    fewest = 2 * tokens * int(SIZES["num_hidden_layers"]) * int(SIZES["num_experts_per_tok"])
    return statistics.median(ratios), routes.nbytes, fewest


def _engine(path: Path) -> GenerationEngine:
    config = GenerationConfig(
        engine="vllm",
        precision=Precision.fp32,
        max_model_len=PROMPT_TOKENS + RESPONSE_TOKENS,
        max_num_seqs=ROWS,
        kv_cache_bytes=1 << 26,
    )
    return generation_engine_class("vllm")(
        model=ModelConfig(path=str(path)), config=config, context=RankContext()
    )


def _timed(engine: GenerationEngine, turn: int) -> tuple[float, Generations]:
    generator = np.random.default_rng(turn)
    prompts = list(generator.integers(3, VOCABULARY, (ROWS, PROMPT_TOKENS)))
    started = time.process_time()
    drawn = engine.generate(prompts, np.arange(ROWS, dtype=np.int64), SAMPLING)
    return time.process_time() - started, drawn
