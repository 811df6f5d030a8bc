"""Routes that generation engines record: those that transformers computes for each row alone."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models
from transformers import AutoConfig, PreTrainedTokenizerFast

from benchmarks.families.case import GAP, Devices
from benchmarks.families.experts import MIXTURES
from hybridflow.context import RankContext
from tests.engines.threed_cases import VOCABULARY
from tests.experts.plain import CHOSEN, load_mixture, observed, save_tiny_mixture
from workers.config import ModelConfig, Precision
from workers.generation import generation_engine_class
from workers.generation.base import GenerationEngine
from workers.generation.config import GenerationConfig, SamplingConfig
from workers.generation.rows import FinishedRow
from workers.generation.vllm.limits import check_fits, check_router_bias

LAYERS = 2
SAMPLING = SamplingConfig(max_response_tokens=9, ignore_eos=True)


def make_engine(path: Path, name: str, context: RankContext) -> GenerationEngine:
    words = Tokenizer(models.WordLevel({str(i): i for i in range(VOCABULARY)}, unk_token="3"))
    PreTrainedTokenizerFast(tokenizer_object=words, eos_token="2").save_pretrained(path)
    config = GenerationConfig(
        engine=name,
        precision=Precision.fp32,
        max_model_len=64,
        block_size=32,
        max_num_batched_tokens=64,
        max_num_seqs=8,
        kv_cache_bytes=1 << 22,
    )
    engine = generation_engine_class(name)(
        model=ModelConfig(path=str(path)), config=config, context=context
    )
    assert engine.record_routes() == (LAYERS, CHOSEN)
    return engine


def prompts() -> list[np.ndarray]:
    """Two groups of two rows that share a prompt of one block and some, and two short rows."""
    generator = np.random.default_rng(0)
    first = generator.integers(3, VOCABULARY, 37)
    other = generator.integers(3, VOCABULARY, 34)
    return [first, other, first, other, first[:5], first[5:6]]


def check(path: Path, rows: list[FinishedRow]) -> None:
    """Routes as in transformers, all of them (expected in float32), from the ids of each row."""
    model = load_mixture(path)
    for prompt, row in zip(prompts(), rows, strict=True):
        ids = torch.from_numpy(np.concatenate([prompt, row.token_ids]))[:-1]
        with torch.no_grad(), observed(model) as seen:
            model(input_ids=ids[None])
        wanted = torch.stack([experts for _, experts in seen], 1).sort(-1).values
        assert row.routes is not None
        assert row.routes.dtype == np.int16
        routes = torch.from_numpy(row.routes).long().sort(-1).values
        assert routes.shape == wanted.shape
        assert (routes == wanted).all(), "a token went elsewhere"


def drawn(engine: GenerationEngine, *, preempt_after: int = 0) -> list[FinishedRow]:
    rows = prompts()
    keys = engine.submit(rows, np.arange(len(rows), dtype=np.int64), SAMPLING)
    if preempt_after:
        engine.run(limit=preempt_after)
        engine.preempt()
    engine.run()
    finished = engine.finished(keys)
    return [finished[key] for key in keys]


@pytest.fixture(scope="module")
def wide(root: Path) -> Path:
    """A model whose heads are as large as vLLM's attention on CPUs wants them."""
    return save_tiny_mixture(root / "wide", "qwen3_moe", head_dim=32)


@pytest.fixture(scope="module")
def vllm(wide: Path, world: None) -> Iterator[GenerationEngine]:
    engine = make_engine(wide, "vllm", RankContext())
    yield engine
    engine.close()


def test_hf_records_routes(root: Path, world: None) -> None:
    engine = make_engine(root / "deepseek_v3", "hf", RankContext())
    rows = drawn(engine)
    check(root / "deepseek_v3", rows)
    check(root / "deepseek_v3", drawn(engine, preempt_after=3))
    generations = engine.generate(prompts(), np.arange(6, dtype=np.int64), SAMPLING)
    assert generations.routes is not None
    together = np.concatenate([row.routes for row in rows if row.routes is not None])
    assert np.array_equal(generations.routes, together)


def test_vllm_records_routes_with_a_cached_prefix_and_after_preemption(
    wide: Path, vllm: GenerationEngine
) -> None:
    """Finding T36: a prompt that was read for another row, a prompt that is read in pieces, and rows
    that lose their keys and values have the routes that they would have had."""
    first = drawn(vllm)
    check(wide, first)
    cached = drawn(vllm)
    for row, again in zip(first, cached, strict=True):
        assert np.array_equal(row.token_ids, again.token_ids)
    check(wide, cached)
    check(wide, drawn(vllm, preempt_after=4))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["GLM-4 MoE", "Qwen 2 MoE", "Granite MoE, shared expert"])
def test_experts_after_syncs(name: str, tmp_path: Path) -> None:
    """Log-probs are those of training: with a bias that routers keep beside their gate, with shared
    experts that have a gate, with stacks that transformers and files cut otherwise."""
    family = next(entry for entry in MIXTURES if entry.name == name)
    with Devices("one process", tmp_path) as devices:
        row = devices.measure(family)
    assert row.log_prob_gap is not None and row.log_prob_gap < GAP, row.message


def test_what_vllm_computes_otherwise_is_refused() -> None:
    with pytest.raises(ValueError, match="phimoe leaves out the bias of its head") as error:
        check_fits(AutoConfig.for_model("phimoe"), GenerationConfig())
    assert "set generation.engine to hf" in str(error.value)
    check_router_bias("ernie4_5_moe", "cuda")
    check_router_bias("glm4_moe", "cpu")
    with pytest.raises(ValueError, match="routers of ernie4_5_moe choose; set gen"):
        check_router_bias("ernie4_5_moe", "cpu")
