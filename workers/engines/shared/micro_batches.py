"""Micro-batches: rows packed one after the other under a token budget, and results put back in the
caller's order.

How rows are cut changes speed and memory, never results. Rows with the same per-row column `pair`
are in one micro-batch, as losses on pairs need it. Rows that begin with the same prompt (the
samples of a group, the two answers of a pair) share its tokens: they are computed once, and each
response goes on after them. packing=False makes right-padded blocks of rows of similar length
(causal attention: no mask, default positions), for models whose layers can't keep the sequences of
a row apart. Under context parallelism the ranks of a group cut each packed row among themselves
(share_row) and see the numbers of all of it (outputs_of). All of this happens on the host; what is
left of a micro-batch then travels to its device at once (on_device).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup
from transformers import PretrainedConfig, PreTrainedModel

from hybridflow.mapping.question.model import ModelSpec
from workers.config import ContextExchange, Precision, TrainConfig
from workers.engines.base import Head, Outputs
from workers.engines.model.attention import can_share_prompts
from workers.engines.model.context_parallel import cut_row, gather_reads, least_tokens
from workers.engines.model.loading import standard_sizes
from workers.engines.model.packing import Packing
from workers.engines.model.rotary import depends_on_length
from workers.engines.model.router import find_routers
from workers.engines.model.routing import Routing, routing_of
from workers.engines.model.vision import ImageInputs, SeenImages
from workers.engines.shared.rows_together import cut, pack, pack_prompts, prompts_of, units
from workers.engines.shared.together import Move, moved_together
from workers.engines.shared.token_places import (
    block_indices,
    padded_block,
    rows_and_columns,
    segments_of,
    token_indices,
)
from workers.sequences import Sequences, ragged_positions

PAIR = "pair"
"""Per-row column of labels: rows that share one are never cut apart."""
CPU_ACTIVATION_BYTES = 512 << 20
FEWEST_TOKENS, MOST_CPU_TOKENS, MOST_TOKENS = 256, 2048, 8192
"""Bounds of a micro-batch whose size the engine chooses: with fewer tokens the fixed cost of a pass
is felt, with more it is no faster: on a CPU slower, once they leave its caches."""


@dataclass(frozen=True, kw_only=True, slots=True)
class MicroBatch:
    """Rows [5, 6, 7 | 8, 9] and [5 | 6] for a language model, whose last tokens need no forward
    pass:

    packed: input_ids [[5, 6, 7, 8, 5]]                read_positions [2, 3, 4]  targets [8, 9, 6]
    a block: input_ids [[5, 6, 7, 8], [5, 0, 0, 0]]    read_positions [2, 3, 4]  targets [8, 9, 6]

    Rows [5, 6, 7 | 8, 9] and [5, 6, 7 | 4, 2], which share their prompt, packed: input_ids [[5, 6,
    7, 8, 4]]                        read_positions [2, 3, 2, 4]  targets [8, 9, 4, 2]
    """

    sequences: Sequences
    """The rows of this micro-batch in its own order, longest first if packed, as the loss sees
    them."""
    rows: Tensor
    """int64 [rows], where those rows are in the caller's sequences (on the CPU)."""
    input_ids: Tensor
    """int64 [1, tokens] if packed, else [rows, time], right-padded with 0; [1, 1] if there are
    no rows."""
    packing: Packing | None
    """Where the segments of a packed row are."""
    read_positions: Tensor
    """int64: positions in input_ids.flatten() whose hidden states are read: the one before each
    scored token, or, for Head.score, the last token of each row."""
    targets: Tensor
    """int64 [scored_tokens], the scored tokens."""
    part: ReadsOfPart | None = None
    """Where input_ids, read_positions and targets are this rank's part of a row only."""
    routing: Routing | None = None
    """For the routers of a mixture of experts."""
    images: SeenImages | None = None
    """For a model that sees images."""


@dataclass(frozen=True, slots=True)
class ReadsOfPart:
    """The reads of a shared row that are in this rank's part."""

    group: ProcessGroup
    """The ranks that share the row."""
    reads: Tensor
    """int64: their numbers among all reads of the row."""
    total: int
    """All reads of the row."""


@dataclass(frozen=True, slots=True)
class Cutting:
    """How rows become micro-batches: the settings of an engine."""

    budget_tokens: int
    packing: bool
    share_prompts: bool = False
    """With packing: rows that begin with the same prompt share its tokens."""
    whole_rows: bool = False
    """The last token of a row is computed too, since rotary angles depend on the row's length;
    without packing each row has a micro-batch to itself."""
    has_routers: bool = False
    """A mixture of experts, whose routers get a Routing."""
    images: ImageInputs | None = None
    """Makes the images of micro-batches, for a model that sees them."""

    def __post_init__(self) -> None:
        if self.budget_tokens < 1:
            raise ValueError(f"micro_batch_tokens is {self.budget_tokens}; it must be at least 1")


def chosen_tokens(config: TrainConfig, model: PretrainedConfig, device: str) -> int:
    """config.micro_batch_tokens, or where that is 0 what suits the model and the device.

    On a CPU few tokens keep the matrix products busy, so memory decides: what layers store for the
    backward pass, as ModelSpec counts it.
    """
    if config.micro_batch_tokens:
        return config.micro_batch_tokens
    if device != "cpu":
        return MOST_TOKENS
    try:
        spec = ModelSpec.from_hf(standard_sizes(model))
    except ValueError:  # not a plain decoder
        return FEWEST_TOKENS
    element = 2 if config.precision is Precision.bf16 else 4
    remade = not (config.activation_checkpointing or config.offload_activations)
    layer = spec.stored_bytes_per_token(element, compiled=config.compile, remade=remade)
    stored = spec.num_layers * layer
    if config.selective_checkpointing:
        stored = spec.num_layers * spec.products_bytes_per_token(element) + layer
    elif config.activation_checkpointing:
        stored = spec.num_layers * element * spec.hidden_size + layer
    tokens = CPU_ACTIVATION_BYTES * config.tp * config.pp / stored
    return int(min(max(tokens, FEWEST_TOKENS), MOST_CPU_TOKENS))


def cutting_of(config: TrainConfig, model: PreTrainedModel) -> Cutting:
    """The engine's settings, as far as the model allows."""
    shares = config.packing and config.share_prompts and can_share_prompts(model)
    whole_rows = depends_on_length(model.config)
    return Cutting(
        budget_tokens=config.micro_batch_tokens,
        packing=config.packing,
        share_prompts=shares,
        whole_rows=whole_rows,
        has_routers=bool(find_routers(model)),
    )


def make_micro_batches(sequences: Sequences, head: Head, cutting: Cutting) -> list[MicroBatch]:
    """All rows in micro-batches of at most `budget_tokens` tokens, padding included; one longer
    row (or pair) has one to itself."""
    if cutting.whole_rows and not cutting.packing:
        parts = units(sequences.num_rows, pairs_of_rows(sequences))
        cutting = replace(cutting, packing=True)
    else:
        parts = cut_rows(sequences, head, cutting)
    micro_batches = []
    for part in parts:
        micro_batches.append(micro_batch_of(sequences, part, head, cutting))
    return micro_batches


def computed_widths(sequences: Sequences, head: Head, cutting: Cutting) -> Tensor:
    """int64 [rows]: tokens of each row that are computed. Nothing is predicted from the last token
    that is scored, so a language model or critic does not compute it."""
    if head is Head.score or cutting.whole_rows:
        return sequences.lengths
    return (sequences.read_lengths - 1).clamp(min=1)


def pairs_of_rows(sequences: Sequences) -> np.ndarray | None:
    """Labels of rows that are never cut apart, if there are any."""
    return sequences.per_row[PAIR].numpy() if PAIR in sequences.per_row else None


def cut_rows(sequences: Sequences, head: Head, cutting: Cutting) -> list[np.ndarray]:
    """The rows of each micro-batch."""
    widths = computed_widths(sequences, head, cutting).numpy()
    pair, budget = pairs_of_rows(sequences), cutting.budget_tokens
    if not cutting.packing:
        return cut(widths, budget, pair)
    if not cutting.share_prompts:
        return pack(widths, budget, pair)
    return pack_prompts(widths, prompts_of(sequences), budget, pair)


def micro_batch_of(
    sequences: Sequences, rows: np.ndarray, head: Head, cutting: Cutting
) -> MicroBatch:
    """The micro-batch of some rows."""
    widths = computed_widths(sequences, head, cutting)
    return _micro_batch(sequences, torch.from_numpy(rows), widths, head, cutting)


def empty_micro_batch(sequences: Sequences, head: Head, cutting: Cutting) -> MicroBatch:
    """No rows: one padding token that nothing reads, for a rank that must take part in
    collectives; same columns as `sequences`."""
    rows = torch.zeros(0, dtype=torch.int64)
    return _micro_batch(sequences, rows, sequences.lengths, head, cutting)


def pad_time(micro_batch: MicroBatch, multiple: int, least: int = 1) -> MicroBatch:
    """The micro-batch with further padding columns until time divides by `multiple` and is at least
    `least`; in a packed row they are one more sequence."""
    time = micro_batch.input_ids.shape[1]
    missing = max(time + -time % multiple, least + -least % multiple) - time
    if not missing:
        return micro_batch
    positions, packing = micro_batch.read_positions, micro_batch.packing
    routing, images = micro_batch.routing, micro_batch.images
    return replace(
        micro_batch,
        input_ids=torch.nn.functional.pad(micro_batch.input_ids, (0, missing)),
        packing=None if packing is None else packing.padded(missing),
        read_positions=positions + torch.div(positions, time, rounding_mode="floor") * missing,
        routing=None if routing is None else routing.padded(time, missing),
        images=None if images is None else images.padded(missing),
    )


def with_blank_image(micro_batch: MicroBatch, inputs: ImageInputs) -> MicroBatch:
    """The micro-batch with a blank image in padding that nothing reads, where it has no image: for
    ranks that must take part in the collectives of a vision tower."""
    seen = micro_batch.images
    assert seen is not None, "the model sees no images"
    if seen.pixel_values is not None:
        return micro_batch
    time = micro_batch.input_ids.shape[1]
    padded = pad_time(micro_batch, 1, time + inputs.num_blank_tokens)
    assert padded.images is not None
    return replace(padded, images=inputs.with_blank(padded.images))


def share_row(
    micro_batch: MicroBatch, group: ProcessGroup, exchange: ContextExchange, multiple: int
) -> MicroBatch:
    """This rank's part of a packed micro-batch that the ranks of `group` compute together; parts
    have multiples of `multiple` tokens."""
    least = least_tokens(group.size(), exchange)
    micro_batch = pad_time(micro_batch, multiple, least * multiple)
    assert micro_batch.packing is not None, "train.cp was checked against packing"
    packing = cut_row(micro_batch.packing, group, exchange, multiple)
    assert packing.part is not None
    tokens = packing.part.tokens
    place_of = torch.full_like(micro_batch.input_ids[0], -1)
    place_of[tokens] = torch.arange(len(tokens))
    places = place_of[micro_batch.read_positions]
    reads = torch.nonzero(places >= 0).squeeze(1)
    routing, images = micro_batch.routing, micro_batch.images
    targets = micro_batch.targets
    if len(targets) == len(places):  # a score has none
        targets = targets[reads]
    return replace(
        micro_batch,
        input_ids=micro_batch.input_ids[:, tokens],
        packing=packing,
        read_positions=places[reads],
        targets=targets,
        routing=None if routing is None else routing.shared(place_of, len(tokens)),
        images=None if images is None else images.shared(tokens),
        part=ReadsOfPart(group, reads, len(places)),
    )


def route_part(micro_batch: MicroBatch, group: ProcessGroup) -> MicroBatch:
    """The micro-batch with routing for the tokens that routers see on this tensor rank: its part of
    the time."""
    ids = micro_batch.input_ids
    width = ids.shape[1] // group.size()
    begin = group.rank() * width
    place_of = torch.full_like(ids, -1)
    mine = torch.arange(len(ids) * width).view(len(ids), width)
    place_of[:, begin : begin + width] = mine
    assert micro_batch.routing is not None, "the model has no routers"
    routing = micro_batch.routing.shared(place_of.flatten(), mine.numel())
    return replace(micro_batch, routing=routing)


def outputs_of(numbers: dict[str, Tensor], micro_batch: MicroBatch) -> Outputs:
    """The answer of a ScoredModel for the micro-batch; of a shared row, that of all its ranks."""
    part = micro_batch.part
    if part is not None:
        numbers = gather_reads(numbers, part.reads, part.total, part.group)
    return Outputs(**numbers)


def run_micro_batch(
    model: Callable[..., dict[str, Tensor]],
    micro_batch: MicroBatch,
    *,
    entropy: bool,
    temperature: float,
) -> Outputs:
    """One pass of a ScoredModel, or of what wraps it."""
    numbers = model(
        micro_batch.input_ids,
        micro_batch.read_positions,
        micro_batch.targets,
        packing=micro_batch.packing,
        routing=micro_batch.routing,
        **({} if micro_batch.images is None else {"images": micro_batch.images}),
        entropy=entropy,
        temperature=temperature,
    )
    return outputs_of(numbers, micro_batch)


def gather_outputs(
    micro_batches: list[MicroBatch], outputs: list[Outputs], sequences: Sequences
) -> Outputs:
    """Outputs of all blocks, in the row order of `sequences` and on its device."""
    device = sequences.token_ids.device
    rows, tokens = [], []
    for micro_batch in micro_batches:
        rows.append(micro_batch.rows)
        tokens.append(ragged_positions(sequences.scored_lengths, micro_batch.rows))
    result: dict[str, Tensor | None] = {}
    for field in fields(Outputs):
        present = []
        for output in outputs:
            part = _part(output, field.name)
            if part is not None:
                present.append(part.to(device))
        if not present:
            continue
        places = torch.cat(rows if field.name == "scores" else tokens)
        merged = torch.empty(len(places), dtype=torch.float32, device=device)
        merged[places] = torch.cat(present).float()
        result[field.name] = merged
    return Outputs(**result)


def gather_group_outputs(
    micro_batches: list[MicroBatch],
    outputs: list[Outputs],
    sequences: Sequences,
    group: ProcessGroup,
) -> Outputs:
    """The same where each rank of `group` ran some of the micro-batches: the first rank of those
    that shared one tells its outputs. Collective."""
    counted = []
    for micro_batch, output in zip(micro_batches, outputs, strict=True):
        if counts(micro_batch):
            counted.append((micro_batch, output))
    result: dict[str, Tensor | None] = {}
    for field in fields(Outputs):
        if _part(outputs[0], field.name) is None:
            continue
        total = sequences.num_scored_tokens
        if field.name == "scores":
            total = sequences.num_rows
        whole = torch.zeros(total, dtype=torch.float32, device=micro_batches[0].input_ids.device)
        for micro_batch, output in counted:
            places = micro_batch.rows
            if field.name != "scores":
                places = ragged_positions(sequences.scored_lengths, micro_batch.rows)
            part = _part(output, field.name)
            assert part is not None
            whole[places.to(whole.device)] = part.float()
        dist.all_reduce(whole, group=group)
        result[field.name] = whole.to(sequences.token_ids.device)
    return Outputs(**result)


def counts(micro_batch: MicroBatch) -> bool:
    """Whether this rank is the first of those that share the micro-batch."""
    return micro_batch.part is None or micro_batch.part.group.rank() == 0


def _part(output: Outputs, name: str) -> Tensor | None:
    by_name = {
        "log_probs": output.log_probs,
        "entropy": output.entropy,
        "values": output.values,
        "scores": output.scores,
        "routes": output.routes,
    }
    return by_name[name]


def _micro_batch(
    sequences: Sequences,
    rows: Tensor,
    widths: Tensor,
    head: Head,
    cutting: Cutting,
) -> MicroBatch:
    part, width = sequences.rows(rows), widths[rows]
    columns = part.scored_columns
    targets = part.token_ids[
        (torch.cumsum(part.lengths, 0) - part.lengths)[part.row_of_token] + columns
    ]
    if head is Head.score:
        read_rows, read_columns = torch.arange(part.num_rows), part.lengths - 1
    else:
        read_rows, read_columns = part.row_of_token, columns - 1
    packing = routing = None
    if not cutting.packing:
        starts, input_ids = padded_block(part, width)
        tokens = block_indices(part, width, input_ids)

        def place(rows: Tensor, columns: Tensor) -> Tensor:
            return starts[rows] + columns
    else:
        segments = segments_of(part, width, share=cutting.share_prompts)
        tokens = segments.indices(part)
        input_ids, packing = segments.row(part)
        place = segments.positions
    positions = place(read_rows, read_columns)
    if cutting.has_routers:
        routing = _routing(part, width, place, input_ids.numel())
    images = None
    if cutting.images is not None:
        rows_and_time = (input_ids.shape[0], input_ids.shape[1])
        images = cutting.images.of(part, tokens, rows_and_time)
    return MicroBatch(
        sequences=part,
        rows=rows,
        input_ids=input_ids,
        packing=packing,
        read_positions=positions,
        targets=targets,
        routing=routing,
        images=images,
    )


def on_device(micro_batch: MicroBatch, device: torch.device) -> MicroBatch:
    """The micro-batch as its pass reads it, once it was padded and shared."""
    return moved_together(micro_batch, _moved, device)


def _moved(micro_batch: MicroBatch, move: Move) -> MicroBatch:
    """Its rows' numbers stay on the CPU."""
    packing, routing, images = micro_batch.packing, micro_batch.routing, micro_batch.images
    part = micro_batch.part
    return replace(
        micro_batch,
        sequences=micro_batch.sequences.moved(move),
        input_ids=move(micro_batch.input_ids),
        packing=None if packing is None else packing.moved(move),
        read_positions=move(micro_batch.read_positions),
        targets=move(micro_batch.targets),
        part=None if part is None else replace(part, reads=move(part.reads)),
        routing=None if routing is None else routing.moved(move),
        images=None if images is None else images.moved(move),
    )


def _routing(
    part: Sequences,
    width: Tensor,
    place: Callable[[Tensor, Tensor], Tensor],
    num_tokens: int,
) -> Routing:
    rows, columns = rows_and_columns(width)
    routes = None
    if part.routes is not None:
        routes = part.routes[token_indices(part, width)]
    return routing_of(rows, columns, place(rows, columns), num_tokens, routes)
