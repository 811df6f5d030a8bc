"""Seconds that one pass of a model's layers takes on one device: the roofline that all simulators share.

Products: 2 FLOPs per parameter and token, 4 q per attended position (Kaplan et al. 2020, section 2.1), at the
calibrated fraction of the peak, or reading the weights if that takes longer (Williams et al. 2009).
Everything else in a layer is bound by memory: the tensors of `activation_elements_per_token` are written once
and read once.
"""

from __future__ import annotations

from hybridflow.mapping.question.calibration import Calibration
from hybridflow.mapping.question.cluster import DeviceKind
from hybridflow.mapping.question.model import ModelSpec
from hybridflow.mapping.question.space import SearchSpace


def layer_flops(model: ModelSpec, tokens: float, attended_per_token: float) -> float:
    """Of one layer's forward pass over all tensor ranks together."""
    return tokens * (2.0 * model.active_layer_parameters + 4.0 * model.query_dim * attended_per_token)


def products_s(
    model: ModelSpec,
    kind: DeviceKind,
    calibration: Calibration,
    space: SearchSpace,
    *,
    tokens: float,
    attended: float,
    t: int,
    decoding: bool = False,
) -> float:
    """Matrix products and attention of one layer on one of t tensor ranks."""
    computing = layer_flops(model, tokens, attended) / t / (kind.flops * _efficiency(calibration, decoding))
    weights = space.parameter_bytes * model.touched_layer_parameters(tokens) / t
    return max(computing, weights / (kind.memory_bandwidth * calibration.bandwidth_efficiency))


def elementwise_s(
    model: ModelSpec, kind: DeviceKind, calibration: Calibration, space: SearchSpace, *, tokens: float, t: int
) -> float:
    """Everything of one layer that is not a product; with sequence parallelism cut by t (Korthikanti et al.
    2022)."""
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
    """The head over the scored tokens (vocabulary cut by t): product, then logits written and read in
    float32."""
    product = (
        2.0 * scored_tokens * model.head_parameters / t / (kind.flops * _efficiency(calibration, decoding))
    )
    width = 1 if model.scalar_head else model.vocab_size
    weights = (
        space.parameter_bytes
        * model.head_parameters
        / t
        / (kind.memory_bandwidth * calibration.bandwidth_efficiency)
    )
    logits = 8.0 * scored_tokens * width / t / (kind.memory_bandwidth * calibration.elementwise_efficiency)
    return product + weights + logits


def _efficiency(calibration: Calibration, decoding: bool) -> float:
    return calibration.decode_matmul_efficiency if decoding else calibration.matmul_efficiency


def rounds(rows: float, parts: int) -> int:
    """Rows of the fullest of `parts` replicas."""
    return -int(-rows // parts)
