"""Seconds that a pass of a model's layers takes on a device: the roofline that all simulators
share.

Products: 2 FLOPs per parameter and token, 4 q per attended position (Kaplan et al. 2020, section
2.1), at the calibrated fraction of the peak, or reading the weights if that takes longer (Williams
et al. 2009). All other operations of a layer are bound by memory: the tensors of
`activation_elements_per_token` are written once and read once.
"""

from __future__ import annotations

from hybridflow.mapping.question.calibration import Calibration
from hybridflow.mapping.question.cluster import DeviceKind
from hybridflow.mapping.question.model import ModelSpec
from hybridflow.mapping.question.space import SearchSpace


def layer_flops(model: ModelSpec, tokens: float, attended_per_token: float) -> float:
    """FLOPs of a layer's forward pass, over all tensor ranks together."""
    return tokens * (
        2.0 * model.active_layer_parameters + model.attended_flops * attended_per_token
    )


def products_s(
    model: ModelSpec,
    kind: DeviceKind,
    calibration: Calibration,
    space: SearchSpace,
    *,
    tokens: float,
    attended: float,
    t: int,
    e: int = 1,
    decoding: bool = False,
) -> float:
    """Seconds of a layer's matrix products and attention on one of t tensor ranks; `e`: a rank's
    experts compute the tokens of all ranks of its expert group."""
    computing = (
        layer_flops(model, tokens, attended) / t / (kind.flops * _efficiency(calibration, decoding))
    )
    ranks = max(e, t)
    touched = model.touched_layer_parameters(tokens * ranks / t)
    dense = model.layer_parameters - model.routed_parameters
    weights = space.parameter_bytes * (dense / t + (touched - dense) / ranks)
    return max(computing, weights / (kind.memory_bandwidth * calibration.bandwidth_efficiency))


def elementwise_s(
    model: ModelSpec,
    kind: DeviceKind,
    calibration: Calibration,
    space: SearchSpace,
    *,
    tokens: float,
    t: int,
) -> float:
    """Seconds of a layer's element-wise operations; sequence parallelism cuts them by t
    (Korthikanti et al. 2022)."""
    moved = 2.0 * space.activation_bytes * model.activation_elements_per_token * tokens / t
    return moved / (kind.memory_bandwidth * calibration.elementwise_efficiency)


def head_s(
    model: ModelSpec,
    kind: DeviceKind,
    calibration: Calibration,
    space: SearchSpace,
    *,
    scored_tokens: float,
    t: int,
    decoding: bool = False,
) -> float:
    """Seconds of the head over the scored tokens (vocabulary cut by t): the product, then
    logits written and read in float32."""
    flops = kind.flops * _efficiency(calibration, decoding)
    product = 2.0 * scored_tokens * model.head_parameters / t / flops
    reading = kind.memory_bandwidth * calibration.bandwidth_efficiency
    weights = space.parameter_bytes * model.head_parameters / t / reading
    elementwise = kind.memory_bandwidth * calibration.elementwise_efficiency
    logits = 8.0 * scored_tokens * head_width(model) / t / elementwise
    return product + weights + logits


def head_width(model: ModelSpec) -> int:
    """Numbers that the head gives for a token."""
    if model.scalar_head:
        return 1
    return model.vocab_size


def _efficiency(calibration: Calibration, decoding: bool) -> float:
    if decoding:
        return calibration.decode_matmul_efficiency
    return calibration.matmul_efficiency


def rounds(rows: float, parts: int) -> int:
    """Rows of the fullest of `parts` equal parts: rows / parts, rounded up."""
    return -int(-rows // parts)
