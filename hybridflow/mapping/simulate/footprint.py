"""Footprint: bytes on a device, by what they are for; and which of them stay between calls."""

from __future__ import annotations

from dataclasses import dataclass, replace

from hybridflow.mapping.question.layouts import GenerationLayout, ModelLayout
from hybridflow.mapping.question.model import ModelSpec
from hybridflow.mapping.question.space import SearchSpace
from hybridflow.mapping.question.workload import Workload

FLOAT32_BYTES = 4.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Footprint:
    """Bytes on the fullest device. Footprint(parameters=2e9) + Footprint(kv_cache=1e9)."""

    parameters: float = 0.0
    gradients: float = 0.0
    optimizer: float = 0.0
    activations: float = 0.0
    logits: float = 0.0
    generation_weights: float = 0.0
    kv_cache: float = 0.0
    buffers: float = 0.0

    @property
    def total(self) -> float:
        return (
            self.parameters + self.gradients + self.optimizer + self.activations
            + self.logits + self.generation_weights + self.kv_cache + self.buffers
        )  # fmt: skip

    def __add__(self, other: Footprint) -> Footprint:
        return Footprint(
            parameters=self.parameters + other.parameters,
            gradients=self.gradients + other.gradients,
            optimizer=self.optimizer + other.optimizer,
            activations=self.activations + other.activations,
            logits=self.logits + other.logits,
            generation_weights=self.generation_weights + other.generation_weights,
            kv_cache=self.kv_cache + other.kv_cache,
            buffers=self.buffers + other.buffers,
        )


def stage_parameters(model: ModelSpec, layout: ModelLayout) -> float:
    """Parameters of a tensor rank of the fullest pipeline stage: its layers, and the embedding
    or the head (both without pipeline)."""
    layers = model.longest_stage(layout.p)
    total = model.num_parameters
    if layout.p > 1:
        ends = max(model.embedding_parameters, model.head_parameters)
        total = layers * model.layer_parameters + ends
    routed = layers * model.routed_parameters
    return (total - routed) / layout.t + routed / layout.expert_ranks


def layer_share(model: ModelSpec, layout: ModelLayout) -> float:
    """Parameters of a layer on a tensor rank."""
    routed = model.routed_parameters
    return (model.layer_parameters - routed) / layout.t + routed / layout.expert_ranks


def cut_parameters(model: ModelSpec, layout: ModelLayout, count: float) -> float:
    """A rank's part of `count` parameters under ZeRO's cut. Experts are cut over what the expert
    group leaves of the stage, so that a rank's part is the same for every e."""
    if layout.e > layout.t:
        routed = model.longest_stage(layout.p) * model.routed_parameters
        count += routed / layout.t - routed / layout.e
    return count / layout.shards


def trained_parameters(model: ModelSpec, layout: ModelLayout) -> float:
    """Parameters with gradients of a tensor rank of the fullest pipeline stage: all of them but a
    frozen vision tower, or of a model with an adapter its matrices and a scalar head."""
    if model.adapter is None:
        frozen = 0 if model.tower_trains else model.tower_parameters
        return stage_parameters(model, layout) - frozen / layout.t
    per_layer = model.adapter.whole + model.adapter.cut / layout.t
    head = model.head_parameters if model.scalar_head else 0
    return model.longest_stage(layout.p) * per_layer + head


def base_bytes(model: ModelSpec, layout: ModelLayout, space: SearchSpace) -> float:
    """Bytes of the frozen weights below an adapter, which are in the compute precision; 0 without an
    adapter."""
    if model.adapter is None:
        return 0.0
    count = stage_parameters(model, layout)
    if space.cut_between_steps or layout.zero >= 3:
        count = cut_parameters(model, layout, count)
    return space.parameter_bytes * count


def shared_bytes(
    model: ModelSpec, layout: ModelLayout, space: SearchSpace, *, trained: bool
) -> float:
    """Bytes between calls that a role does not need where another role of its pool has the same base
    in the same layout: the base; of a role without an adapter, all."""
    if layout.offload and not trained:
        return 0.0
    if model.adapter is not None:
        return base_bytes(model, layout, space)
    return resident_footprint(model, layout, space, trained=trained).parameters


def state_footprint(
    model: ModelSpec, layout: ModelLayout, space: SearchSpace, *, trained: bool
) -> Footprint:
    """Parameters, gradients and optimizer states while all are on the device; ZeRO's cuts as in
    Rajbhandari et al. 2020, figure 1."""
    if space.cut_between_steps:
        return _cut_state(model, layout, space, trained=trained)
    return zero_footprint(model, layout, space, trained=trained)


def zero_footprint(
    model: ModelSpec, layout: ModelLayout, space: SearchSpace, *, trained: bool
) -> Footprint:
    """Parameters, gradients, optimizer states, cut by ZeRO."""
    update = update_footprint(model, layout, space)
    parameters = update.parameters + base_bytes(model, layout, space)
    if not trained:
        return Footprint(parameters=parameters)
    return replace(update, parameters=parameters)


def update_footprint(model: ModelSpec, layout: ModelLayout, space: SearchSpace) -> Footprint:
    """The bytes that an update reads and writes: trained parameters, gradients, optimizer states."""
    whole = trained_parameters(model, layout)
    cut = cut_trained(model, layout)
    return Footprint(
        parameters=space.parameter_bytes * (cut if layout.zero >= 3 else whole),
        gradients=space.gradient_bytes * (cut if layout.zero >= 2 else whole),
        optimizer=space.optimizer_bytes * (cut if layout.zero >= 1 else whole),
    )


def cut_trained(model: ModelSpec, layout: ModelLayout) -> float:
    """A rank's part of the parameters with gradients under ZeRO's cut; an adapter has none on
    experts."""
    count = trained_parameters(model, layout)
    if model.adapter is not None:
        return count / layout.shards
    return cut_parameters(model, layout, count)


def _cut_state(
    model: ModelSpec, layout: ModelLayout, space: SearchSpace, *, trained: bool
) -> Footprint:
    """FSDP's: float32 shards of weights, and of gradients and moments where trained; the gathered
    weights of a model that is one group stay too."""
    shard = FLOAT32_BYTES * cut_trained(model, layout)
    parameters = shard + base_bytes(model, layout, space)
    if is_one_group(model, layout, space):
        parameters += space.parameter_bytes * gathered_parameters(model, layout, space)
    if not trained:
        return Footprint(parameters=parameters)
    return Footprint(parameters=parameters, gradients=shard, optimizer=2 * shard)


def gathered_parameters(model: ModelSpec, layout: ModelLayout, space: SearchSpace) -> float:
    """Parameters of which FSDP has a gathered copy in a pass: on a single data rank an adapter's
    base is used where it lies, and so are all weights that data ranks share."""
    count = trained_parameters(model, layout)
    if model.adapter is not None and layout.shards > 1:
        count += stage_parameters(model, layout)
    return count * gathered_share(model, layout, space)


def gathered_share(model: ModelSpec, layout: ModelLayout, space: SearchSpace) -> float:
    """The part of the weights that a gather copies. Experts under expert parallelism are not among
    those that data ranks share, and below an adapter all but its matrices are."""
    if not space.shared_shards or layout.shards == 1:
        return 1.0
    if layout.e > layout.t:
        return model.routed_parameters / model.layer_parameters
    if space.parameter_bytes == FLOAT32_BYTES:
        return 0.0
    if model.adapter is None:
        return 1.0
    return trained_parameters(model, layout) / stage_parameters(model, layout)


def gathered_between(
    model: ModelSpec, layout: ModelLayout, space: SearchSpace, *, trained: bool
) -> float:
    """Bytes of FSDP's gathered weights of a trained model that is one group: they are there from the
    step's first pass to the end of its update, and of a frozen model always (0 here)."""
    if not (trained and space.cut_between_steps and is_one_group(model, layout, space)):
        return 0.0
    return space.parameter_bytes * gathered_parameters(model, layout, space)


def gathering_bytes(model: ModelSpec, layout: ModelLayout, space: SearchSpace) -> float:
    """Bytes that FSDP's gathering needs beside gathered weights: one group flat, as it arrives, until
    the next one is there or the pass ends."""
    if not space.cut_between_steps or layout.shards == 1 or layout.zero >= 3:
        return 0.0
    if is_one_group(model, layout, space):
        return space.parameter_bytes * gathered_parameters(model, layout, space)
    share = gathered_share(model, layout, space)
    return space.parameter_bytes * layer_share(model, layout) * share


def is_one_group(model: ModelSpec, layout: ModelLayout, space: SearchSpace) -> bool:
    """Whether FSDP gathers and reduces the model as a whole, once an update."""
    if model.adapter is not None and layout.shards == 1:
        return True
    return layout.zero < 3 and FLOAT32_BYTES * model.num_parameters <= space.whole_up_to_bytes


def fetched_bytes(
    model: ModelSpec, layout: ModelLayout, space: SearchSpace, *, trained: bool
) -> float:
    """The bytes that lie in host memory between the model's calls."""
    if not layout.offload:
        return 0.0
    state = state_footprint(model, layout, space, trained=trained)
    return state.optimizer if trained else state.total


def resident_footprint(
    model: ModelSpec, layout: ModelLayout, space: SearchSpace, *, trained: bool
) -> Footprint:
    """The bytes that stay on the device between the model's calls."""
    state = state_footprint(model, layout, space, trained=trained)
    if space.cut_between_steps:
        state = replace(state, gradients=0.0)
    if not layout.offload:
        return state
    if not trained:
        return Footprint()
    return Footprint(parameters=state.parameters, gradients=state.gradients)


def kv_tokens(workload: Workload, running: int) -> float:
    """Tokens that `running` sequences hold when all are near their end: each its mean length,
    and one of them the longest."""
    return running * workload.tokens_per_row + (workload.longest_row - workload.tokens_per_row)


def kv_bytes_per_token(model: ModelSpec, layout: GenerationLayout, space: SearchSpace) -> float:
    """Bytes of a token's keys and values on a rank, which has at least one key/value head of
    its layers."""
    share = max(1.0, model.num_kv_heads / layout.tg) / model.num_kv_heads
    if model.latent is not None:  # every rank has what its heads are rebuilt from
        share = 1.0
    return space.activation_bytes * model.kv_elements_per_token / layout.pg * share


def held_for_generation(
    model: ModelSpec, training: ModelLayout | None, space: SearchSpace
) -> float:
    """Bytes of the training shard that generation can compute on in place (docs/paper.md
    section 3: no redundant copy); none where the base below an adapter is not what it computes
    with."""
    if (
        model.adapter is not None
        or training is None
        or not space.shared_generation_weights
        or training.offload
    ):
        return 0.0
    return state_footprint(model, training, space, trained=False).parameters


def merged_bytes(model: ModelSpec, training: ModelLayout | None, space: SearchSpace) -> float:
    """Bytes of the weights with the adapter in them that a training rank makes for a sync: of its own
    part of the base."""
    if training is None or model.adapter is None or model.adapter.sent_alone:
        return 0.0
    return base_bytes(model, training, space)


def generation_footprint(
    model: ModelSpec,
    layout: GenerationLayout,
    held: float,
    space: SearchSpace,
    workload: Workload,
    merged: float = 0.0,
) -> Footprint:
    """The bytes that generation needs on top of the resident ones: its weights beyond those
    held (peak M/(tg pg)), the KV cache of the running sequences, and the resharding's staging
    buffer."""
    weights = space.parameter_bytes * stage_parameters(model, ModelLayout(p=layout.pg, t=layout.tg))
    staging = merged
    if space.repacked_generation:
        if model.tied_embeddings:
            weights += space.parameter_bytes * model.head_parameters / layout.tg
        if layout.kept:
            staging += weights
    if model.adapter is not None and model.adapter.sent_alone:
        weights += space.parameter_bytes * model.adapter_parameters / layout.pg
    kv = kv_bytes_per_token(model, layout, space) * kv_tokens(workload, layout.max_running)
    waiting = layout.max_running * workload.prompt.mean
    tokens = max(min(space.max_num_batched_tokens, waiting), layout.max_running)
    activations = space.activation_bytes * model.activation_elements_per_token * tokens / layout.tg
    logits = layout.max_running * model.vocab_size / layout.tg * (space.activation_bytes + 4)
    # A sync is over before the first token is computed.
    decoding = activations + logits
    if space.cache_of_rows:
        decoding += kv
    return Footprint(
        generation_weights=max(0.0, weights - held),
        kv_cache=kv,
        activations=activations,
        logits=logits,
        buffers=max(0.0, space.bucket_bytes + staging - decoding),
    )
