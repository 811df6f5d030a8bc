"""The mapper's bytes on a CPU beside those that PyTorch allocates and the system counts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from controllers.data import PromptDataset
from hybridflow.mapping.question.layouts import ModelLayout
from hybridflow.mapping.question.model import ModelSpec
from hybridflow.mapping.question.space import SearchSpace
from hybridflow.mapping.question.workload import Lengths, Workload
from hybridflow.mapping.simulate.moments import Stored
from hybridflow.mapping.simulate.packing import fullest_micro_batches
from recipes.preparation import foresee, prepare
from recipes.python_settings import make_settings
from tests.tiny import by_length, make_model, tiny_grpo
from workers.engines.base import Head
from workers.engines.model import log_probs
from workers.engines.shared.micro_batches import Cutting, make_micro_batches
from workers.sequences import Sequences

VOCAB, HIDDEN, TOKENS, CHUNK = 2048, 16, 512, 128
MODEL = ModelSpec(
    name="wide",
    num_layers=1,
    hidden_size=HIDDEN,
    num_heads=1,
    num_kv_heads=1,
    head_dim=16,
    intermediate_size=16,
    vocab_size=VOCAB,
)


class Live(TorchDispatchMode):
    """with Live() as live: ...; live.peak_bytes: the most that the tensors made inside had at the same
    time."""

    def __init__(self) -> None:
        super().__init__()
        self.peak_bytes = 0
        self._made: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        given = {tensor.untyped_storage()._cdata for tensor in args if isinstance(tensor, Tensor)}
        result = function(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(tensor, Tensor) and tensor.untyped_storage()._cdata not in given:
                storage = tensor.untyped_storage()
                self._made[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        self._made = {key: kept for key, kept in self._made.items() if not kept[0].expired()}
        self.peak_bytes = max(self.peak_bytes, sum(size for _, size in self._made.values()))
        return result


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("backward", [False, True])
def test_logits_of_a_chunk(
    dtype: torch.dtype, backward: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Beside the logits of a chunk there is their gradient, and nothing else of that size: softmax
    looks at parts that stay in a cache."""
    monkeypatch.setattr(log_probs, "CHUNK_ELEMENTS", CHUNK * VOCAB)
    monkeypatch.setattr(log_probs, "CACHE_ELEMENTS", VOCAB)
    hidden = torch.randn(TOKENS, HIDDEN, dtype=dtype, requires_grad=backward)
    weight = torch.randn(VOCAB, HIDDEN, dtype=dtype)
    targets = torch.zeros(TOKENS, dtype=torch.int64)
    with Live() as live:
        values, entropies = log_probs.head_log_probs(hidden, weight, None, targets, entropy=True)
        assert entropies is not None
        if backward:
            (values.sum() + entropies.sum()).backward()  # type: ignore[no-untyped-call]
    space = SearchSpace(
        activation_bytes=dtype.itemsize, logits_at_once=CHUNK * VOCAB, logits_in_parts=True
    )
    workload = Workload(batch_size=1, prompt=Lengths.fixed(0), response=Lengths.fixed(TOKENS))
    layout = ModelLayout(micro_batch_tokens=TOKENS)
    predicted = Stored.of(MODEL, layout, space, workload, backward=backward).logits
    assert live.peak_bytes == pytest.approx(predicted, rel=0.08)


@pytest.mark.parametrize("batch_size", [4, 64])
def test_a_pipelines_micro_batches(batch_size: int, tmp_path: Path) -> None:
    """Two stages get eight micro-batches of an update, of at least 512 tokens: that, and not
    micro_batch_tokens, is what two of them store."""
    settings = tiny_grpo(tmp_path) | {
        "runtime": "ray",
        "num_devices": 2,
        "model.path": make_model(tmp_path / "deep", layers=2),
        "data.batch_size": batch_size,
        "actor.train.engine": "threed",
        "actor.train.pp": 2,
        "actor.train.micro_batch_tokens": 2048,
        "actor.generation.sampling.max_response_tokens": 64,
        "output_dir": tmp_path / "run",
    }
    config = make_settings("grpo", settings, by_length)
    layout = foresee(config).role("actor").layout
    prompts = prepare(config).train
    assert layout is not None and isinstance(prompts, PromptDataset)
    eighth = 2 * batch_size * (float(prompts.lengths.mean()) + 64) / 8
    assert layout.micro_batch_tokens == pytest.approx(max(512, eighth), abs=1)


@pytest.mark.parametrize("share", [False, True])
@pytest.mark.parametrize("budget", [100, 300, 1000, 4000])
@pytest.mark.parametrize("lengths", ["130", "uniform:20:250"])
def test_a_micro_batch_has_whole_rows_and_groups(budget: int, lengths: str, share: bool) -> None:
    """The fullest one, beside those that the engines cut for the same rows; the mapper counts a
    row's last token too."""
    response = Lengths.parse(lengths)
    workload = Workload(
        batch_size=16, prompt=Lengths.fixed(40), response=response, samples_per_prompt=4
    )
    layout = ModelLayout(d=2, zero=2, micro_batch_tokens=budget)
    responses = torch.tensor(response.sample(32))
    prompts = torch.arange(8).repeat_interleave(4)
    token_ids = []
    for prompt, size in zip(prompts.tolist(), responses.tolist(), strict=True):
        token_ids += [torch.full((40,), prompt), torch.zeros(size, dtype=torch.int64)]
    rows = Sequences(
        token_ids=torch.cat(token_ids), lengths=responses + 40, scored_lengths=responses
    )
    cut = make_micro_batches(rows, Head.lm, Cutting(budget, True, share))
    sizes = [micro_batch.input_ids.numel() for micro_batch in cut]
    first, later = fullest_micro_batches(layout, workload, share_prompts=share)
    assert max(first, later) == pytest.approx(max(sizes), rel=0.08)
    assert (later > 0) == (len(sizes) > 1)


@pytest.mark.parametrize(("cluster", "number_bytes"), [("2x1xcpu", 4), ("1x2xcpu", 0)])
def test_gathered_weights_are_there_from_the_first_pass_to_the_update(
    cluster: str, number_bytes: int, tmp_path: Path
) -> None:
    """Of a model that FSDP gathers at once: of the critic in all calls of a step of PPO but generation
    and the actor's update, which follows its own; of the reference always. The data ranks of one
    machine's CPUs share them, and nothing is gathered."""
    path = make_model(tmp_path / "model")
    settings = tiny_grpo(tmp_path) | {
        "runtime": "ray",
        "num_devices": 2,
        "model.path": path,
        "plan.cluster": cluster,
        "output_dir": tmp_path / "run",
    }
    mapping = foresee(make_settings("ppo", settings, by_length))
    held = {}
    for call in mapping.calls:
        if "parameters" in call.bytes:
            held[call.call.partition("#")[0]] = call.bytes["parameters"]
    critic = held["critic.compute_values"] - held["actor.update_actor"]
    assert critic == held["critic.update_critic"] - held["actor.update_actor"]
    assert critic == held["critic.compute_values"] - held["actor.generate_sequences"]
    spec = ModelSpec.from_directory(path).with_scalar_head()
    assert critic == pytest.approx(number_bytes * spec.num_parameters, rel=0.02)


def test_keys_and_values_of_engine_hf_go_with_their_rows(tmp_path: Path) -> None:
    settings = tiny_grpo(tmp_path) | {"output_dir": tmp_path / "run"}
    mapping = foresee(make_settings("grpo", settings, by_length))
    held = {call.kind: call.bytes for call in mapping.calls}
    assert held["generation"]["kv_cache"] > 0
    assert "kv_cache" not in held["training"] and "generation_weights" in held["training"]
