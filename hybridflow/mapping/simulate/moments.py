"""The bytes of a training or forward call beside the resident ones, as they are at its moments.

A training step is fullest at one of these, and the footprint of the call is the fullest:

gather   the end of the first forward pass, while what the weights arrived in is there (FSDP)
head     the head's backward pass: everything that was stored waits, logits and the head's gradient
         are there
first    the backward pass of the layer that comes first, the last one: everything but the head's
last     that of the first layer of a step's last micro-batch: gradients of all others are there
end      the ends of the model, embedding and head, are reduced: a micro-batch's activations are gone
step     gradients are reduced, and the optimizer steps

Left out: kernels' own scratch memory, fragments, communicators' buffers.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from hybridflow.mapping.question.layouts import ModelLayout
from hybridflow.mapping.question.model import ModelSpec
from hybridflow.mapping.question.space import SearchSpace
from hybridflow.mapping.question.workload import Workload
from hybridflow.mapping.simulate.compute import head_width
from hybridflow.mapping.simulate.footprint import (
    FLOAT32_BYTES,
    Footprint,
    cut_trained,
    fetched_bytes,
    gathered_between,
    gathered_parameters,
    gathered_share,
    gathering_bytes,
    is_one_group,
    layer_share,
    state_footprint,
    trained_parameters,
)
from hybridflow.mapping.simulate.packing import fullest_micro_batches

MOMENTS = ("gather", "head", "first", "last", "end", "step")


def pass_footprint(
    model: ModelSpec,
    layout: ModelLayout,
    space: SearchSpace,
    workload: Workload,
    num_micro_batches: int,
    *,
    trained: bool,
    backward: bool,
) -> Footprint:
    """The bytes that a training (backward) or forward call needs on top of the resident ones, at its
    fullest moment."""
    fetched = 0.0
    if backward or not trained:
        fetched = fetched_bytes(model, layout, space, trained=trained)
    if backward:
        moments = training_moments(model, layout, space, workload, num_micro_batches)
        fullest = max(moments.values(), key=lambda moment: moment.total)
        return fullest + Footprint(buffers=fetched)
    stored = Stored.of(model, layout, space, workload)
    needed = Footprint(activations=stored.layer, logits=stored.logits, buffers=fetched)
    return needed + gathering_pass(model, layout, space, trained=trained)


def gathering_pass(
    model: ModelSpec, layout: ModelLayout, space: SearchSpace, *, trained: bool
) -> Footprint:
    """The bytes that a forward pass gathers: weights, and what they arrive in."""
    if not space.cut_between_steps:
        gathered = _two_layers(model, layout, space) if layout.zero >= 3 else 0.0
        return Footprint(buffers=gathered)
    arriving = gathering_bytes(model, layout, space)
    if not trained and is_one_group(model, layout, space):
        arriving = 0.0  # they stay
    return Footprint(parameters=_gathered(model, layout, space), buffers=arriving)


def training_moments(
    model: ModelSpec,
    layout: ModelLayout,
    space: SearchSpace,
    workload: Workload,
    num_micro_batches: int,
) -> dict[str, Footprint]:
    """The bytes on top of the resident ones at the moments of a training step: of its first
    micro-batch, or of a later one, when gradients of others are there."""
    first, later = fullest_micro_batches(layout, workload, share_prompts=space.share_prompts)
    several = num_micro_batches > 1 and later > 0
    if layout.p > 1:
        return _moments(
            model, layout, space, workload, max(first, later), num_micro_batches, earlier=several
        )
    moments = _moments(model, layout, space, workload, first, num_micro_batches, earlier=False)
    if several:
        others = _moments(model, layout, space, workload, later, num_micro_batches, earlier=True)
        for name, moment in others.items():
            if moment.total > moments[name].total:
                moments[name] = moment
    return moments


def _moments(
    model: ModelSpec,
    layout: ModelLayout,
    space: SearchSpace,
    workload: Workload,
    tokens: float,
    num_micro_batches: int,
    *,
    earlier: bool,
) -> dict[str, Footprint]:
    """The moments of a micro-batch of so many tokens; `earlier`: there were others before it."""
    stored = Stored.of(model, layout, space, workload, backward=True, tokens=tokens)
    in_flight = min(layout.p, num_micro_batches)
    gather = Footprint(
        activations=stored.layers + stored.norm,
        logits=stored.read_logits,
        buffers=stored.inner,
    )
    if not earlier:
        gather += _arriving(model, layout, space, workload)
    head = Footprint(
        activations=stored.layers + stored.norm,
        logits=stored.logits,
        buffers=_head_gradient(model, layout, space),
    )
    in_layers = Footprint(buffers=2 * stored.inner)
    first = in_layers + Footprint(activations=stored.with_layer(in_flight * stored.layers, layout))
    last = in_layers + Footprint(activations=stored.with_layer(stored.of_a_layer, layout))
    if layout.offload_activations:
        last = first
    end = Footprint(activations=(in_flight - 1) * stored.layers)
    if space.cut_between_steps:
        several = num_micro_batches > 1
        states = _cut_states(model, layout, space, earlier=earlier, several=several)
    else:
        states = _whole_states(model, layout, space)
    moments = (gather, head, first, last, end, Footprint())
    return {name: moment + states[name] for name, moment in zip(MOMENTS, moments, strict=True)}


def _arriving(
    model: ModelSpec, layout: ModelLayout, space: SearchSpace, workload: Workload
) -> Footprint:
    """The buffer that weights arrive in, in an update's first pass. One group's are there from an
    earlier call of the step, but in a run's first (without optimizer states) and after each update."""
    arriving = Footprint(buffers=gathering_bytes(model, layout, space))
    updates = workload.num_mini_batches * workload.num_epochs
    if not arriving.buffers or updates > 1 or not is_one_group(model, layout, space):
        return arriving
    states = state_footprint(model, layout, space, trained=True).optimizer
    return replace(arriving, optimizer=-states)


@dataclass(frozen=True, kw_only=True, slots=True)
class Stored:
    """Bytes of a micro-batch.

    Korthikanti et al. 2022, section 4: with sequence parallelism all of a layer's are cut by t, and
    under context parallelism by c; with recomputation each layer's input stays, or what selective
    recomputation keeps, plus a layer at a time; offloaded, one layer's are there. The first of p
    stages holds min(p, micro-batches) of them under 1F1B (Narayanan et al. 2021, section 2.2).
    """

    layer: float
    """For the backward pass of a layer."""
    of_a_layer: float
    """Those of a layer that are kept until then."""
    layers: float
    """That of all layers of the longest stage; 0 where it lies in host memory."""
    norm: float
    """Input, normalised input and result of the norm before the head."""
    logits: float
    """Logits of a chunk of tokens, in compute precision and float32, with a float32 gradient in
    training; where softmax takes them in parts, in compute precision, with a gradient like them."""
    read_logits: float
    """Those of a forward pass."""
    inner: float
    """A number for each inner one of an MLP: its product in the forward pass; in the backward pass its
    gradient too."""

    @classmethod
    def of(
        cls,
        model: ModelSpec,
        layout: ModelLayout,
        space: SearchSpace,
        workload: Workload,
        *,
        backward: bool = False,
        tokens: float | None = None,
    ) -> Stored:
        """`tokens`: of the micro-batch; None: the fullest."""
        if tokens is None:
            tokens = max(fullest_micro_batches(layout, workload, share_prompts=space.share_prompts))
        tokens /= layout.c
        of_a_layer = kept_per_token(model, layout, space) * tokens / layout.t
        layers = of_a_layer * model.longest_stage(layout.p)
        scored = workload.response.mean / workload.tokens_per_row
        numbers = min(tokens * scored * head_width(model) / layout.t, space.logits_at_once)
        beside, beside_read = (8.0 if backward else 4.0), 4.0
        if space.logits_in_parts:
            beside, beside_read = (space.activation_bytes if backward else 0.0), 0.0
        return cls(
            layer=stored_per_token(model, layout, space) * tokens / layout.t,
            of_a_layer=of_a_layer,
            layers=0.0 if layout.offload_activations else layers,
            norm=model.norm_bytes_per_token(space.activation_bytes) * tokens / layout.t,
            logits=numbers * (space.activation_bytes + beside),
            read_logits=numbers * (space.activation_bytes + beside_read),
            inner=space.activation_bytes * model.active_intermediate_size * tokens / layout.t,
        )

    def with_layer(self, layers: float, layout: ModelLayout) -> float:
        """Beside what is kept, a layer's as the backward pass reads it."""
        return layers + self.layer if layout.recompute else max(layers, self.layer)


def stored_per_token(model: ModelSpec, layout: ModelLayout, space: SearchSpace) -> float:
    """Bytes that a layer's backward pass reads, per token."""
    remade = space.remade and not (layout.recompute or layout.offload_activations)
    return model.stored_bytes_per_token(
        space.activation_bytes, compiled=layout.compiled, remade=remade
    )


def kept_per_token(model: ModelSpec, layout: ModelLayout, space: SearchSpace) -> float:
    """Bytes of a layer that are kept from the forward to the backward pass, per token."""
    if not layout.recompute:
        return stored_per_token(model, layout, space)
    if layout.selective:
        return model.products_bytes_per_token(space.activation_bytes)
    return space.activation_bytes * model.hidden_size


def _head_gradient(model: ModelSpec, layout: ModelLayout, space: SearchSpace) -> float:
    """It adds up in float32; under half precision each chunk's product lies beside it."""
    if model.adapter is not None:
        return 0.0
    product = space.parameter_bytes if space.parameter_bytes < FLOAT32_BYTES else 0.0
    return (FLOAT32_BYTES + product) * model.head_parameters / layout.t


def _whole_states(
    model: ModelSpec, layout: ModelLayout, space: SearchSpace
) -> dict[str, Footprint]:
    """Where gradients have a buffer of their own, which is resident."""
    gathered = 0.0
    if layout.zero >= 3:
        gathered = _two_layers(model, layout, space)
    waiting = in_end = reduced = 0.0
    if model.adapter is None:
        in_end = space.parameter_bytes * model.embedding_parameters / layout.t
        if model.tied_embeddings and layout.p == 1:  # the head's part waits for the embedding's
            waiting = space.parameter_bytes * model.head_parameters / layout.t
    if layout.shards > 1:
        reduced = FLOAT32_BYTES * cut_trained(model, layout)
        if space.reduction_copies:
            reduced = space.gradient_bytes * trained_parameters(model, layout)
    bucket = space.parameter_bytes * min(space.bucket_elements, model.num_parameters)
    in_layers = Footprint(buffers=gathered + waiting + bucket)
    return {
        "gather": Footprint(buffers=gathered),
        "head": Footprint(buffers=gathered + bucket),
        "first": in_layers,
        "last": in_layers,
        "end": Footprint(buffers=waiting + in_end + bucket),
        "step": Footprint(buffers=reduced),
    }


def _cut_states(
    model: ModelSpec, layout: ModelLayout, space: SearchSpace, *, earlier: bool, several: bool
) -> dict[str, Footprint]:
    """FSDP's gathered weights and gradients, beside the resident shards; of a step of `several`
    micro-batches, or of one, whose layers are freed one by one. `earlier`: of a later micro-batch."""
    shard = FLOAT32_BYTES * cut_trained(model, layout)
    if is_one_group(model, layout, space):
        return _one_group_states(model, layout, space, earlier=earlier)
    gathered = _gathered(model, layout, space)
    if model.adapter is not None:
        largest = model.adapter.whole + model.adapter.cut / layout.t
        state = Footprint(parameters=gathered, gradients=shard, buffers=2 * FLOAT32_BYTES * largest)
        return dict.fromkeys(MOMENTS, state)
    # A gradient is there in the compute precision, and in float32 while it is reduced. A layer's is
    # beside the activations, and the head's waits for the embedding's: they are one group.
    copies = space.parameter_bytes + FLOAT32_BYTES
    layer, ends = layer_share(model, layout), _ends(model, layout)
    in_layers = copies * layer + space.parameter_bytes * model.head_parameters / layout.t
    before = shard if earlier else 0.0
    one_by_one = space.parameter_bytes * (ends + layer) * gathered_share(model, layout, space)
    in_last, at_end = (gathered, gathered) if several else (one_by_one, 0.0)
    if layout.zero >= 3:
        in_last, at_end = gathered, 0.0
    return {
        "gather": Footprint(parameters=gathered, gradients=before),
        "head": Footprint(parameters=gathered, gradients=before),
        "first": Footprint(parameters=gathered, gradients=before, buffers=in_layers),
        "last": Footprint(parameters=in_last, gradients=shard, buffers=in_layers),
        "end": Footprint(parameters=at_end, gradients=shard, buffers=copies * ends),
        "step": Footprint(gradients=shard),
    }


def _one_group_states(
    model: ModelSpec, layout: ModelLayout, space: SearchSpace, *, earlier: bool
) -> dict[str, Footprint]:
    """A gradient that is added up whole, in float32 from the second micro-batch on, and copied to be
    reduced when the gathered weights are gone."""
    count = trained_parameters(model, layout)
    whole, latest = FLOAT32_BYTES * count, space.parameter_bytes * count
    before = whole if earlier else 0.0
    of_a_layer = 0.0
    if not earlier and model.adapter is None:
        of_a_layer = space.parameter_bytes * layer_share(model, layout)
    in_last = before + latest if space.parameter_bytes < FLOAT32_BYTES else whole
    gathered = gathered_between(model, layout, space, trained=True)
    return {
        "gather": Footprint(gradients=before),
        "head": Footprint(gradients=before),
        "first": Footprint(gradients=before + of_a_layer),
        "last": Footprint(gradients=in_last),
        "end": Footprint(parameters=-gathered, gradients=max(before, latest), buffers=whole),
        "step": Footprint(
            parameters=-gathered, gradients=FLOAT32_BYTES * cut_trained(model, layout)
        ),
    }


def _ends(model: ModelSpec, layout: ModelLayout) -> float:
    """Parameters of a tensor rank outside of the layers: one group under FSDP."""
    ends = model.embedding_parameters
    if not model.tied_embeddings or model.scalar_head:
        ends += model.head_parameters
    return ends / layout.t


def _gathered(model: ModelSpec, layout: ModelLayout, space: SearchSpace) -> float:
    """Bytes of FSDP's gathered weights in the layers' passes, but for a model that is one group,
    which has them all the time: a layer's and the next one's, or all."""
    if layout.zero >= 3:
        whole = 2 * layer_share(model, layout) + _ends(model, layout)
        return space.parameter_bytes * whole * gathered_share(model, layout, space)
    if is_one_group(model, layout, space):
        return 0.0
    return space.parameter_bytes * gathered_parameters(model, layout, space)


def _two_layers(model: ModelSpec, layout: ModelLayout, space: SearchSpace) -> float:
    """Bytes of the layer that computes and of the next one, gathered."""
    return 2 * space.parameter_bytes * layer_share(model, layout)
