"""Footprint: bytes on a device, by what they are for; and which of them stay between calls."""

from __future__ import annotations

from dataclasses import dataclass

from hybridflow.mapping.question.layouts import GenerationLayout, ModelLayout
from hybridflow.mapping.question.model import ModelSpec
from hybridflow.mapping.question.space import SearchSpace
from hybridflow.mapping.question.workload import Workload
from hybridflow.mapping.simulate.compute import head_width


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
    if layout.p == 1:
        return model.num_parameters / layout.t
    ends = max(model.embedding_parameters, model.head_parameters)
    return (model.longest_stage(layout.p) * model.layer_parameters + ends) / layout.t


def state_footprint(
    model: ModelSpec, layout: ModelLayout, space: SearchSpace, *, trained: bool
) -> Footprint:
    """Parameters, gradients and optimizer states while all are on the device; ZeRO's cuts as in
    Rajbhandari et al. 2020, figure 1."""
    count = stage_parameters(model, layout)
    parameters = space.parameter_bytes * count
    gradients = space.gradient_bytes * count
    optimizer = space.optimizer_bytes * count
    if layout.zero >= 1:
        optimizer /= layout.d
    if layout.zero >= 2:
        gradients /= layout.d
    if layout.zero >= 3:
        parameters /= layout.d
    if not trained:
        return Footprint(parameters=parameters)
    return Footprint(parameters=parameters, gradients=gradients, optimizer=optimizer)


def resident_footprint(
    model: ModelSpec, layout: ModelLayout, space: SearchSpace, *, trained: bool
) -> Footprint:
    """The bytes that stay on the device between the model's calls."""
    state = state_footprint(model, layout, space, trained=trained)
    if not layout.offload:
        return state
    if not trained:
        return Footprint()
    return Footprint(parameters=state.parameters, gradients=state.gradients)


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
    """The bytes that a training (backward) or forward call needs on top of the resident ones.

    Activations: Korthikanti et al. 2022, section 4 (with sequence parallelism all of a layer's are
    cut by t; with recomputation only each layer's input stays, plus a layer at a time); the first
    of p stages holds min(p, micro-batches) of them under 1F1B (Narayanan et al. 2021, section 2.2).
    Logits: compute precision and float32, with a float32 gradient in training.
    """
    tokens = min(
        layout.micro_batch_tokens, max(workload.longest_row, workload.num_tokens / layout.d)
    )
    per_layer = space.activation_bytes * model.activation_elements_per_token * tokens / layout.t
    layer_input = space.activation_bytes * model.hidden_size * tokens / layout.t
    if not backward:
        activations = per_layer
    elif layout.recompute:
        activations = (
            min(layout.p, num_micro_batches) * model.longest_stage(layout.p) * layer_input
            + per_layer
        )
    else:
        activations = min(layout.p, num_micro_batches) * model.longest_stage(layout.p) * per_layer
    scored = workload.response.mean / workload.tokens_per_row
    logit_bytes = space.activation_bytes + (8 if backward else 4)
    logits = tokens * scored * head_width(model) / layout.t * logit_bytes
    fetched, gathered = 0.0, 0.0
    if layout.offload and (backward or not trained):
        state = state_footprint(model, layout, space, trained=trained)
        fetched = state.total - resident_footprint(model, layout, space, trained=trained).total
    if layout.zero >= 3:
        gathered = 2 * space.parameter_bytes * model.layer_parameters / layout.t
    return Footprint(activations=activations, logits=logits, buffers=fetched + gathered)


def kv_tokens(workload: Workload, running: int) -> float:
    """Tokens that `running` sequences hold when all are near their end: each its mean length,
    and one of them the longest."""
    return running * workload.tokens_per_row + (workload.longest_row - workload.tokens_per_row)


def kv_bytes_per_token(model: ModelSpec, layout: GenerationLayout, space: SearchSpace) -> float:
    """Bytes of a token's keys and values on a rank, which has at least one key/value head of
    its layers."""
    share = max(1.0, model.num_kv_heads / layout.tg) / model.num_kv_heads
    return space.activation_bytes * model.kv_elements_per_token / layout.pg * share


def held_for_generation(
    model: ModelSpec, training: ModelLayout | None, space: SearchSpace
) -> float:
    """Bytes of the training shard that generation can compute on in place (docs/paper.md
    section 3: no redundant copy)."""
    if training is None or not space.shared_generation_weights or training.offload:
        return 0.0
    return state_footprint(model, training, space, trained=False).parameters


def generation_footprint(
    model: ModelSpec, layout: GenerationLayout, held: float, space: SearchSpace, workload: Workload
) -> Footprint:
    """The bytes that generation needs on top of the resident ones: its weights beyond those
    held (peak M/(tg pg)), the KV cache of the running sequences, and the resharding's staging
    buffer."""
    weights = space.parameter_bytes * stage_parameters(model, ModelLayout(p=layout.pg, t=layout.tg))
    kv = kv_bytes_per_token(model, layout, space) * kv_tokens(workload, layout.max_running)
    tokens = max(space.max_num_batched_tokens, layout.max_running)
    activations = space.activation_bytes * model.activation_elements_per_token * tokens / layout.tg
    logits = layout.max_running * model.vocab_size / layout.tg * (space.activation_bytes + 4)
    return Footprint(
        generation_weights=max(0.0, weights - held),
        kv_cache=kv,
        activations=activations,
        logits=logits,
        buffers=space.bucket_bytes,
    )
