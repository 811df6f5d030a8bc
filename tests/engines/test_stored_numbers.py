"""What a layer stores for its backward pass, tensor by tensor, beside what the mapper counts
(A9): the difference between models of two layers and of one."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from transformers import AutoConfig, AutoModelForCausalLM

from hybridflow.context import RankContext
from hybridflow.mapping.question.model import ModelSpec
from tests.engines.kept import kept_bytes
from workers.config import ModelConfig, Precision, TrainConfig
from workers.engines.base import Head
from workers.engines.fsdp.engine import FsdpEngine
from workers.engines.model import compiling
from workers.engines.model.loading import standard_sizes
from workers.sequences import Sequences

ROWS, LENGTH = 8, 65


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A process group of one; an earlier test of this process may have left one."""
    if dist.is_initialized():
        yield
        return
    store = tmp_path_factory.mktemp("world") / "store"
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def stored_bytes(
    path: Path, precision: Precision, monkeypatch: pytest.MonkeyPatch, *, compiled: bool = False
) -> float:
    """Bytes that a pass stores for every token, each storage once, weights included; not what it
    makes again."""
    engine = FsdpEngine(
        model=ModelConfig(path=str(path)),
        config=TrainConfig(precision=precision, micro_batch_tokens=8192, compile=compiled),
        head=Head.lm,
        context=RankContext(rank=0, world_size=1),
    )
    sequences = Sequences(
        token_ids=torch.arange(ROWS * LENGTH) % 101,
        lengths=torch.full((ROWS,), LENGTH),
        scored_lengths=torch.full((ROWS,), 20),
    )
    (micro_batch,) = engine._micro_batches(sequences, alike=False)
    kept, _ = kept_bytes(lambda: engine._run(micro_batch, True, 1.0).log_probs, monkeypatch)
    return kept / micro_batch.input_ids.numel()


@pytest.mark.parametrize("precision", [Precision.fp32, Precision.bf16], ids=lambda p: p.value)
@pytest.mark.parametrize("kind", ["llama", "qwen2"])
@pytest.mark.usefixtures("world")
def test_a9_a_layer_stores_what_the_mapper_counts(
    tmp_path: Path, kind: str, precision: Precision, monkeypatch: pytest.MonkeyPatch
) -> None:
    check_stored(tmp_path, kind, precision, monkeypatch, compiled=False)


@pytest.mark.slow
@pytest.mark.parametrize("precision", [Precision.fp32, Precision.bf16], ids=lambda p: p.value)
@pytest.mark.usefixtures("world")
def test_a_compiled_layer_stores_what_the_mapper_counts(
    tmp_path: Path, precision: Precision, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With inductor's division into forward and backward graphs, and no kernels of its own."""
    monkeypatch.setattr(compiling, "BACKEND", "aot_eager_decomp_partition")
    check_stored(tmp_path, "llama", precision, monkeypatch, compiled=True)


def check_stored(
    tmp_path: Path,
    kind: str,
    precision: Precision,
    monkeypatch: pytest.MonkeyPatch,
    *,
    compiled: bool,
) -> None:
    measured = []
    for layers in (1, 2):
        config = AutoConfig.for_model(
            kind,
            num_hidden_layers=layers,
            hidden_size=96,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=32,
            intermediate_size=320,
            vocab_size=101,
            tie_word_embeddings=False,
        )
        AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / str(layers))
        path = tmp_path / str(layers)
        measured.append(stored_bytes(path, precision, monkeypatch, compiled=compiled))
    spec = ModelSpec.from_hf(standard_sizes(config))
    number_bytes = 4 if precision is Precision.fp32 else 2
    weights = number_bytes * spec.layer_parameters / (ROWS * (LENGTH - 1))
    layer = measured[1] - measured[0] - weights
    predicted = spec.stored_bytes_per_token(number_bytes, compiled=compiled, remade=True)
    assert layer == pytest.approx(predicted, rel=0.05)
