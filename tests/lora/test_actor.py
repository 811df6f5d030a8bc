"""An actor with an adapter, its reference and its generation engine, in one process."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch.testing import assert_close
from transformers import AutoConfig, AutoModelForCausalLM

from hybridflow.batch import Batch
from hybridflow.columns import Ragged
from hybridflow.group import spawn
from hybridflow.local_pool import LocalPool
from hybridflow.pool import PoolSpec
from tests.experts.plain import save_tiny_mixture
from tests.lora.plain import adapt, matrices_of
from tests.matrix import matrix
from workers.actor import ActorWorker
from workers.config import LoraConfig, ModelConfig, OptimizerConfig, Precision, TrainConfig
from workers.engines.shared.sharded_engine import ShardedEngine
from workers.generation.config import GenerationConfig, SamplingConfig
from workers.generation.vllm.adapter import VllmAdapter
from workers.generation.vllm.destination import VllmShards
from workers.generation.vllm.memory import model_runner
from workers.reference import ReferenceWorker
from workers.role_config import ActorConfig, AdapterSync, ReferenceConfig
from workers.weight_sync import WeightSync

MADE: list[ActorWorker | ReferenceWorker] = []
FAMILIES = matrix(["qwen3"], ["llama", "gemma3_text"])
MERGED_FAMILIES = matrix(["qwen3"], ["llama", "gemma3_text", "phi3", "qwen3_moe"])
ALPHA, RANK = 16.0, 8
CLOSE_TO_TRANSFORMERS = 3e-6
"""Of a log-prob, whose rounding is 5e-7."""
VOCABULARY = 96


class ObservedActor(ActorWorker):
    def __init__(self, *arguments: object) -> None:
        super().__init__(*arguments)  # type: ignore[arg-type]
        MADE.append(self)


class ObservedReference(ReferenceWorker):
    def __init__(self, *arguments: object) -> None:
        super().__init__(*arguments)  # type: ignore[arg-type]
        MADE.append(self)


def save_model(directory: Path, family: str) -> Path:
    """A random model with heads that are wide enough for vLLM on CPU."""
    if family == "qwen3_moe":
        return save_tiny_mixture(directory, family, hidden_size=64, head_dim=32)
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        family,
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=64,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        tie_word_embeddings=family == "gemma3_text",
    )
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(directory)
    return directory


@pytest.fixture
def pool() -> Iterator[LocalPool]:
    MADE.clear()
    with LocalPool(PoolSpec(name="main", num_devices=1)) as pool:
        yield pool


def actor_config(
    path: Path, engine: str, sync: AdapterSync, targets: str | list[str]
) -> ActorConfig:
    return ActorConfig(
        adapter_sync=sync,
        model=ModelConfig(path=str(path)),
        train=TrainConfig(
            precision=Precision.fp32,
            lora=LoraConfig(rank=RANK, alpha=ALPHA, target_modules=targets),
            optimizer=OptimizerConfig(learning_rate=2e-2),
        ),
        generation=GenerationConfig(
            engine=engine,
            precision=Precision.fp32,
            max_model_len=32,
            sampling=SamplingConfig(max_response_tokens=6, ignore_eos=True),
        ),
    )


def prompts() -> Batch:
    generator = torch.Generator().manual_seed(0)
    lengths = torch.tensor([3, 5, 1, 4])
    ids = torch.randint(3, VOCABULARY, (int(lengths.sum()),), generator=generator)
    return Batch.of(prompt_ids=Ragged(ids, lengths), uid=torch.arange(4))


def check_actor(
    path: Path,
    engine: str,
    pool: LocalPool,
    sync: AdapterSync = AdapterSync.auto,
    targets: str | list[str] = "all-linear",
) -> WeightSync:
    """Three generations with an update before the second and the third: the engine scores what it
    drew as the trainer does, and draws with other weights each time."""
    actor = spawn(ObservedActor, pool, actor_config(path, engine, sync, targets), role="actor")
    config = ReferenceConfig(
        model=ModelConfig(path=str(path)), train=TrainConfig(precision=Precision.fp32)
    )
    reference = spawn(ObservedReference, pool, config, role="reference")
    trainer, frozen = MADE
    assert isinstance(trainer, ActorWorker)
    assert frozen.engine is trainer.engine, "the reference is the base with the adapter left out"
    first, base = None, None
    for number in range(3):
        batch = prompts()
        batch |= actor.generate_sequences(batch)
        batch |= actor.compute_log_prob(batch)
        batch |= reference.compute_ref_log_prob(batch)
        local = batch.local(["rollout_log_probs", "log_probs", "ref_log_probs"])
        rollout, scored = local.ragged("rollout_log_probs"), local.ragged("log_probs")
        assert_close(rollout.values, scored.values, rtol=0.0, atol=1e-5)
        assert trainer.sync.last is not None
        assert trainer.sync.last.probe_gap < 1e-5
        referred = local.ragged("ref_log_probs").values
        if number == 0:
            first, base = batch, referred
            assert torch.equal(referred, scored.values)
        else:
            assert (referred - scored.values).abs().max() > 1e-2, "the policy has moved"
            again = reference.compute_ref_log_prob(first).local(["ref_log_probs"])
            assert torch.equal(again.ragged("ref_log_probs").values, base), "the base has not"
        check_transformers(path, trainer, batch, rollout)
        assert actor.update_supervised(batch)["actor/grad_norm"] > 0
    check_cleared(actor, trainer, reference)
    return trainer.sync


def check_transformers(path: Path, trainer: ActorWorker, batch: Batch, rollout: Ragged) -> None:
    """What was drawn has the log-probs of transformers' model with the saved adapter in its
    weights."""
    adapter = path.parent / f"{path.name}-adapter"
    trainer.engine.save_pretrained(adapter)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    adapt(model, matrices_of(adapter), ALPHA / RANK)
    local = batch.local(["prompt_ids", "response_ids"])
    rows = zip(
        local.ragged("prompt_ids").unbind(),
        local.ragged("response_ids").unbind(),
        rollout.unbind(),
        strict=True,
    )
    for prompt, response, drawn in rows:
        ids = torch.cat([prompt, response])[None]
        with torch.no_grad():
            table = model(input_ids=ids).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
        expected = table.gather(-1, response[:, None]).squeeze(-1)
        assert_close(drawn, expected, rtol=0.0, atol=CLOSE_TO_TRANSFORMERS)


def check_cleared(actor: ActorWorker, trainer: ActorWorker, reference: ReferenceWorker) -> None:
    """With B at zero again the engine is the base: nothing of an earlier adapter stays in it."""
    assert isinstance(trainer.engine, ShardedEngine)
    for parameter in trainer.engine.local_parameters():
        if parameter.name.endswith("lora_B"):
            for shard in parameter.shards:
                shard.tensor.detach().zero_()
    batch = prompts()
    batch |= actor.generate_sequences(batch)
    batch |= reference.compute_ref_log_prob(batch)
    local = batch.local(["rollout_log_probs", "ref_log_probs"])
    drawn, base = local.ragged("rollout_log_probs"), local.ragged("ref_log_probs")
    assert_close(drawn.values, base.values, rtol=0.0, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_hf_generates_with_the_latest_adapter(pool: LocalPool, tmp_path: Path, family: str) -> None:
    check_actor(save_model(tmp_path / family, family), "hf", pool)


@pytest.mark.parametrize("family", FAMILIES)
def test_vllm_takes_the_adapter_alone(pool: LocalPool, tmp_path: Path, family: str) -> None:
    """The gap of log-probs stays under 1e-5 after the second and third sync, with changed weights.
    Every matrix of the adapter has its place (finding T1), and nothing else is sent. vLLM has one
    adapter after three syncs as after the first (finding T13)."""
    sync = check_actor(save_model(tmp_path / family, family), "vllm", pool)
    assert isinstance(sync.destination, VllmAdapter)
    runner = model_runner(sync.destination.engine.llm)
    assert len(runner.lora_manager.list_adapters()) == 1
    written = {}
    for parameter in sync.destination.destinations():
        written[parameter.name] = sum(shard.box.numel for shard in parameter.shards)
        assert written[parameter.name] == math.prod(parameter.shape), parameter.name
    assert len(written) == 2 * 7 * 2, "A and B of seven layers in each of two blocks"
    widths = {"q": (64, 128), "k": (64, 64), "v": (64, 64), "o": (128, 64)}
    inner = [(64, 96), (64, 96), (96, 64)]
    expected = 2 * sum(8 * (rows + columns) for rows, columns in [*widths.values(), *inner])
    assert sum(written.values()) == expected
    assert sync.certificate.received_total == sync.certificate.bound_total
    assert sync.certificate.model_bytes == 4 * expected


@pytest.mark.slow
def test_vllm_takes_an_adapter_on_parts_of_fused_layers(pool: LocalPool, tmp_path: Path) -> None:
    """Values without queries and keys, gates without what they multiply, in one of two blocks."""
    targets = r".*layers\.1\..*(v|gate|o)_proj"
    path = save_model(tmp_path / "qwen3", "qwen3")
    sync = check_actor(path, "vllm", pool, AdapterSync.adapter, targets)
    assert isinstance(sync.destination, VllmAdapter)
    assert len(sync.destination.destinations()) == 3 * 2


@pytest.mark.parametrize("family", MERGED_FAMILIES)
def test_vllm_takes_merged_weights(pool: LocalPool, tmp_path: Path, family: str) -> None:
    """The same with the adapter merged into the weights."""
    targets = ["q_proj", "o_proj"] if family == "qwen3_moe" else "all-linear"
    path = save_model(tmp_path / family, family)
    sync = check_actor(path, "vllm", pool, AdapterSync.merged, targets)
    assert isinstance(sync.destination, VllmShards)
