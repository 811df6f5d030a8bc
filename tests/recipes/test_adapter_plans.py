"""placement=auto with and without LoRA, for a model that is far too large for this machine."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from hybridflow.mapping.question.adapter import AdapterSpec
from recipes.config import RunConfig
from recipes.mapping_settings import model_spec
from recipes.run import run
from tests.matrix import matrix

pytestmark = pytest.mark.usefixtures("nothing_starts")
RANK = 32
QWEN2_72B = {
    "model_type": "qwen2",
    "architectures": ["Qwen2ForCausalLM"],
    "num_hidden_layers": 80,
    "hidden_size": 8192,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "intermediate_size": 29568,
    "vocab_size": 152064,
    "max_position_embeddings": 131072,
    "tie_word_embeddings": False,
}


@pytest.fixture(scope="module")
def large(required: list[str], tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Qwen2 72B's configuration with the tiny model's tokenizer: all that a dry run reads."""
    directory = tmp_path_factory.mktemp("large")
    model = next(text for text in required if text.startswith("model.path=")).partition("=")[2]
    shutil.copytree(model, directory, dirs_exist_ok=True)
    (directory / "config.json").write_text(json.dumps(QWEN2_72B))
    for weights in Path(directory).glob("*.safetensors"):
        weights.unlink()
    return [
        f"model.path={directory}",
        "data.batch_size=128",
        "algorithm.samples_per_prompt=8",
        "actor.generation.sampling.max_response_tokens=32768",
        "actor.generation.max_model_len=40960",
        "algorithm.num_mini_batches=4",
        "actor.loss.kl_coefficient=0.001",
        "device=cuda",
        "dry_run=true",
        "placement=auto",
        "plan.cluster=16x8xH100-80GB",
    ]


@pytest.mark.parametrize(
    "case", matrix([("threed", 32)], [("threed", 0), ("fsdp", 32), ("fsdp", 0)]), ids=str
)
def test_a_72b_model_with_responses_of_32k_tokens(
    settings: Callable[..., RunConfig],
    large: list[str],
    capsys: pytest.CaptureFixture[str],
    case: tuple[str, int],
) -> None:
    """A plan in seconds, with its reasons (issue 16)."""
    engine, rank = case
    lora = [f"actor.train.lora.rank={rank}"] if rank else []
    engines = [f"{role}.train.engine={engine}" for role in ("actor", "reference")]
    started = time.process_time()
    assert run(settings("grpo", *large, *lora, *engines)) is None
    assert time.process_time() - started < 30
    printed = capsys.readouterr().out
    assert "grpo on 16x8xH100-80GB: " in printed
    assert "actor.update_actor" in printed
    assert ("the frozen weights of actor, reference are in memory once" in printed) <= bool(rank)


def test_the_adapters_size_is_the_settings(
    settings: Callable[..., RunConfig], large: list[str]
) -> None:
    """Rank 32 on every linear layer, by hand; two layers alone; merged weights are sent whole."""
    hidden, kv, inner = 8192, 1024, 29568
    config = settings("grpo", *large, f"actor.train.lora.rank={RANK}")
    spec = model_spec("actor", config.actor)
    assert spec is not None
    whole = RANK * (3 * hidden + 2 * hidden + 2 * hidden)
    cut = RANK * (hidden + 2 * kv + 2 * inner) + RANK * (hidden + inner)
    assert spec.adapter == AdapterSpec(whole=whole, cut=cut)
    reference = model_spec("reference", config.reference)
    assert reference is not None
    assert reference.adapter is None
    assert reference.base == spec.base
    assert spec.base
    some = settings(
        "grpo",
        *large,
        f"actor.train.lora.rank={RANK}",
        "actor.train.lora.target_modules=[q_proj]",
        "actor.adapter_sync=merged",
    )
    spec = model_spec("actor", some.actor)
    assert spec is not None
    assert spec.adapter == AdapterSpec(whole=RANK * hidden, cut=RANK * hidden, sent_alone=False)
    assert spec.sent_parameters == spec.num_parameters
