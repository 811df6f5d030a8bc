"""Rows of context parallelism: engine fsdp on 1, 2 and 4 gloo processes against plain PyTorch in
one, with ragged rows of 1 to 97 tokens."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.scale.errors import relative_error, update_error
from benchmarks.scale.row import Row
from tests.engines.context_workers import (
    OPTIMIZER,
    Case,
    Result,
    batches,
    make_engine,
    rows_of_rank,
    train,
)
from tests.engines.fsdp_workers import data_rows
from tests.engines.threed_cases import (
    TEMPERATURE,
    PlainRun,
    load_plain,
    loss_fn,
    plain_run,
    save_tiny_model,
)
from tests.ranks import run_ranks, worlds
from workers.config import ContextExchange
from workers.engines.fsdp.engine import FsdpEngine
from workers.sequences import Sequences, ragged_positions

FAMILIES = {"llama": 4, "qwen3": 6, "mistral": 4, "gemma2": 4, "gemma3_text": 4}
"""Query heads of each, over 2 key-value heads."""
LAYERS = 2
TIMED_STEPS = 5
FLOAT = 4


@dataclass(frozen=True, slots=True)
class Measured:
    """The measurements of one rank."""

    result: Result
    sent_bytes: int
    bound_bytes: int
    peak_bytes: int
    step_s: float


def measure(directory: Path) -> Iterator[Row]:
    """Each family alone, with all exchanges over 2 ranks, and over 4 with cp=4 and with dp=2."""
    cases: list[Case] = []
    for family, heads in FAMILIES.items():
        tied = family.startswith("gemma")
        save_tiny_model(directory / family, family, heads=heads, layers=LAYERS, tied=tied)
        cases += [
            Case(model=family, world_size=1, cp=1),
            Case(model=family, exchange=ContextExchange.ulysses),
            Case(model=family, exchange=ContextExchange.allgather),
            Case(model=family, exchange=ContextExchange.ring),
            Case(model=family, world_size=4, cp=4),
            Case(model=family, world_size=4, cp=4, exchange=ContextExchange.ring),
            Case(model=family, world_size=4, by_length=True, micro_batch_tokens=16),
        ]
    (directory / "stores-cp").mkdir()
    run_ranks(_run, (directory, cases), 4)
    for family in FAMILIES:
        model = load_plain(directory / family, cases[0].head)
        start = {name: value.detach().clone() for name, value in model.named_parameters()}
        expected = plain_run(model, cases[0].head, batches(cases[0]), OPTIMIZER)
        for case in cases:
            if case.model == family:
                yield _row(directory, case, expected, start)


def _run(rank: int, directory: Path, cases: list[Case]) -> None:
    for world_size in worlds(rank, directory / "stores-cp", (4, 2, 1)):
        for case in cases:
            if case.world_size == world_size:
                measured = _measure(rank, directory, case)
                torch.save(measured, directory / f"{case.name}.{rank}.pt")


def _measure(rank: int, directory: Path, case: Case) -> Measured:
    result = train(rank, directory, case)
    engine = make_engine(rank, directory, case)
    assert isinstance(engine, FsdpEngine)
    rows = rows_of_rank(engine, rank, batches(case)[0])
    stored = _Stored()
    with _SentBytes() as sent, saved_tensors_hooks(stored.keep, lambda tensor: tensor):
        engine.train_step(rows, loss_fn, entropy=True, temperature=TEMPERATURE)
    seconds = []
    for _ in range(TIMED_STEPS):
        started = time.perf_counter()
        engine.train_step(rows, loss_fn, entropy=True, temperature=TEMPERATURE)
        seconds.append(time.perf_counter() - started)
    bound = _fewest_bytes(engine, rows, case)
    return Measured(result, sent.bytes, bound, stored.bytes, statistics.median(seconds))


def _fewest_bytes(engine: FsdpEngine, rows: Sequences, case: Case) -> int:
    """Bytes that a rank sends in a step with the exchange of the case, where parts are of equal
    size and no key head is copied."""
    if case.cp == 1:
        return 0
    model = engine._scored.model.config
    heads, key_heads = model.num_attention_heads, model.num_key_value_heads
    head_dim = model.hidden_size // heads
    if model.model_type == "qwen3" or model.model_type.startswith("gemma"):
        head_dim = model.head_dim
    total = 0.0
    for micro_batch in engine._micro_batches(rows, alike=True):
        assert micro_batch.packing is not None
        part = micro_batch.packing.part
        if part is None:
            continue
        size = part.group.size()
        # Keys and values go to all others, and their gradients come back; round a ring the
        # backward pass needs them once more. Heads go there and back in both passes.
        each = 4 * key_heads * (size - 1)
        if part.ring is not None:
            each = 6 * key_heads * (size - 1)
        elif part.seen is None:
            each = 4 * (heads + key_heads) * (size - 1) / size
        total += micro_batch.packing.position_ids.shape[1] / size * each
    return int(model.num_hidden_layers * total * FLOAT * head_dim)


class _Stored:
    """Counts the storages that the backward pass keeps, weights aside."""

    def __init__(self) -> None:
        self.bytes = 0
        self._seen: dict[int, Tensor] = {}

    def keep(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self._seen and not isinstance(tensor, torch.nn.Parameter):
            self._seen[storage.data_ptr()] = tensor
            self.bytes += storage.nbytes()
        return tensor


class _SentBytes(TorchDispatchMode):
    """Counts the bytes that this rank sends to others in exchanges of attention: the only
    collectives on matrices, and all messages of a ring."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        name = func._schema.name
        if name == "c10d::send":
            self.bytes += sum(tensor.numel() * tensor.element_size() for tensor in args[0])
        elif name in (
            "c10d::alltoall_base_",
            "c10d::_allgather_base_",
            "c10d::_reduce_scatter_base_",
        ):
            output, source = args[0], args[1]
            if source.ndim == 2:
                self.bytes += self._bytes(name, output, source, args)
        return func(*args, **(kwargs or {}))

    @staticmethod
    def _bytes(name: str, output: Tensor, source: Tensor, args: tuple[Any, ...]) -> int:
        if name == "c10d::_allgather_base_":
            return (output.numel() - source.numel()) * source.element_size()
        if name == "c10d::_reduce_scatter_base_":
            return (source.numel() - output.numel()) * source.element_size()
        # All but the rank's part of what it sends, which is about equal for all ranks.
        size = len(args[4])
        return source.numel() * (size - 1) // size * source.element_size()


def _row(directory: Path, case: Case, expected: PlainRun, start: dict[str, Tensor]) -> Row:
    ranks: list[Measured] = []
    for rank in range(case.world_size):
        ranks.append(torch.load(directory / f"{case.name}.{rank}.pt", weights_only=False))
    first = ranks[0].result
    losses = [step["loss"] for step in first.metrics]
    norms = [step["grad_norm"] for step in first.metrics]
    return Row(
        feature="cp",
        family=case.model,
        layout=_layout(case),
        loss_error=relative_error(losses, expected.losses),
        grad_norm_error=relative_error(norms, expected.grad_norms),
        update_error=update_error(first.whole, expected.parameters, start),
        log_prob_gap=max(_gap(case, measured.result, expected) for measured in ranks),
        sync_bytes=max(measured.sent_bytes for measured in ranks),
        bound_bytes=max(measured.bound_bytes for measured in ranks),
        peak_bytes=max(measured.peak_bytes for measured in ranks),
        step_s=max(measured.step_s for measured in ranks),
    )


def _layout(case: Case) -> str:
    if case.cp == 1:
        return "1 rank"
    data = case.world_size // case.cp
    words = [f"cp{case.cp}"]
    if data > 1:
        words.append(f"dp{data}")
    words.append("by length" if case.by_length else case.exchange.value)
    return " ".join(words)


def _gap(case: Case, result: Result, expected: PlainRun) -> float:
    batch = batches(case)[0]
    rows = data_rows(batch.num_rows, case.world_size // case.cp, result.data)
    places = ragged_positions(batch.scored_lengths, rows)
    assert result.outputs is not None and result.outputs.log_probs is not None
    assert expected.outputs.log_probs is not None
    return float((result.outputs.log_probs - expected.outputs.log_probs[places]).abs().max())
