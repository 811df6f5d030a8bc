"""Calibration: the fractions of the datasheet that are reached, and the overheads; every empirical
constant.

The defaults are for A100 nodes with Megatron-like training and a vLLM-like engine.
`hybridflow.mapping.calibrate.fit` computes a Calibration from measurements; it is saved as JSON
with a name.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from hybridflow.mapping.question.files import read_json

POSITIVE = (
    "matmul_efficiency",
    "decode_matmul_efficiency",
    "bandwidth_efficiency",
    "link_efficiency",
    "memory_fraction",
)
"""The constants that divide something."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Calibration:
    """Calibration.load(Path("calibration.json")); Calibration() for A100 nodes."""

    name: str = "a100"
    matmul_efficiency: float = 0.70
    """Reached fraction of the peak in the matrix products of a large layer. Megatron-LM reports
    52 % of an A100's peak end to end (Narayanan et al. 2021, table 1) and 54 to 56 %
    (Korthikanti et al. 2022, table 5); those figures include overheads that have constants of
    their own here."""
    backward_factor: float = 2.0
    """Backward over forward: two products for each one (Narayanan et al. 2021, appendix)."""
    bandwidth_efficiency: float = 0.80
    """Reached fraction of the memory bandwidth (STREAM-like kernels reach 80 to 90 % of an
    A100's)."""
    elementwise_efficiency: float = 0.80
    """Reached fraction of the memory bandwidth in the element-wise operations of a layer, and
    in logits. As high as that of plain reading where kernels are fused; without fusion (CPU)
    each tensor passes several times."""
    update_efficiency: float = 0.80
    """Reached fraction of the memory bandwidth in the optimizer and in adding up gradients over
    micro-batches."""
    decode_matmul_efficiency: float = 0.70
    """The same as matmul_efficiency for products with the few rows of a decode step."""
    layer_overhead_s: float = 1.0e-4
    """Launching one layer's kernels in one pass: about 20 of 5 microseconds."""
    micro_batch_overhead_s: float = 1.0e-3
    """Packing, embedding, loss and bookkeeping of one micro-batch, per pass."""
    decode_layer_overhead_s: float = 3.0e-5
    """One layer of one decode step beyond reading its bytes (kernel gaps under CUDA graphs)."""
    decode_step_overhead_s: float = 5.0e-3
    """Host work of one decode step: scheduling, input preparation, sampling."""
    decode_row_overhead_s: float = 5.0e-5
    """Host work of one decode step per running sequence (block tables, sampler, detokeniser)."""
    link_efficiency: float = 0.80
    """Reached fraction of a link in large collectives (NCCL's bus bandwidth over the wire's)."""
    intra_latency_s: float = 4.0e-6
    """Latency of a collective inside a node, for every doubling of the group."""
    inter_latency_s: float = 1.0e-5
    """Latency of a collective between nodes, for every doubling of the number of nodes."""
    reduce_factor: float = 1.0
    """A reduce-scatter's seconds over those of an all-gather of as many bytes."""
    gradient_overlap: float = 0.0
    """Fraction of the gradient reduction hidden behind the backward pass; 0 is Megatron-LM's
    default."""
    sync_overhead_s: float = 0.0
    """Fixed work of entering the generation layout with new weights: reloading, probing,
    attesting."""
    sync_ranks_s: float = 0.0
    """Additional seconds of a sync in a pool of several ranks, beside the bytes: its
    collectives, and waiting for the slowest rank."""
    sync_parameter_s: float = 0.0
    """Attesting and repacking the weights, per parameter of a rank's generation shard."""
    call_overhead_s: float = 0.05
    """Controller to worker and back, once per call."""
    call_ranks_s: float = 0.0
    """Additional seconds of a call in a pool of several ranks, which do not begin and end at
    the same moment."""
    transfer_overhead_s: float = 0.05
    """Handing columns from one pool to another, beside their bytes."""
    controller_s: float = 0.2
    """A controller function such as compute_advantages, with all else that a step does between
    its calls."""
    function_s: float = 0.2
    """A call of a role that is a Python function."""
    memory_fraction: float = 0.90
    """Part of the device's memory that is planned with (the rest is lost to fragmentation;
    vLLM's default limit is the same)."""
    process_bytes: float = 0.0
    """A process before it has a model, where its memory is the device's (CPUs)."""
    library_bytes: float = 0.0
    """The same for what a generation engine's library adds to it (vLLM: its modules, and what it
    makes beside weights and cache)."""
    allocator_overhead: float = 0.0
    """Freed memory between pieces in use that the C library's allocator can't give out again, as a
    share of what is in use."""
    preloaded_overhead: float = 0.0
    """The same of tcmalloc, which hosts use where it is installed."""
    reserved_bytes: float = 2.0e9
    """Context and communication buffers of one process."""

    def __post_init__(self) -> None:
        constants = asdict(self)
        del constants["name"]
        for name, value in constants.items():
            if not isinstance(value, (int, float)) or value < 0:
                raise ValueError(
                    f"calibration {self.name}: {name} is {value!r}; it must be a number and not "
                    "negative"
                )
        for name in POSITIVE:
            if constants[name] <= 0:
                raise ValueError(
                    f"calibration {self.name}: {name} is {constants[name]}; it must be positive"
                )

    @classmethod
    def load(cls, path: Path) -> Calibration:
        """Reads a JSON file; unknown names are an error, missing ones keep their default."""
        content = read_json(path, "calibration")
        known = {field.name for field in fields(cls)}
        unknown = sorted(set(content) - known)
        if unknown:
            raise ValueError(
                f"calibration file {path}: unknown constants {unknown}; known: "
                f"{', '.join(sorted(known))}"
            )
        return cls(**content)

    def save(self, path: Path) -> None:
        path.write_text(json.dumps(asdict(self), indent=1) + "\n")


CPU = Calibration(
    name="cpu",
    matmul_efficiency=0.92,
    backward_factor=2.1,
    bandwidth_efficiency=0.73,
    elementwise_efficiency=0.18,
    update_efficiency=0.45,
    decode_matmul_efficiency=0.61,
    layer_overhead_s=0.00094,
    micro_batch_overhead_s=0.0,
    decode_layer_overhead_s=0.00065,
    decode_step_overhead_s=0.0,
    decode_row_overhead_s=5.2e-05,
    link_efficiency=0.99,
    intra_latency_s=0.00027,
    reduce_factor=1.5,
    sync_overhead_s=0.0,
    sync_ranks_s=0.036,
    sync_parameter_s=1.6e-09,
    call_overhead_s=0.0,
    call_ranks_s=0.0085,
    transfer_overhead_s=0.0,
    controller_s=0.043,
    function_s=0.012,
    process_bytes=3.4e8,
    library_bytes=1.9e8,
    allocator_overhead=0.2,
    preloaded_overhead=0.14,
)
"""Constants for CPU processes with one thread each and bf16, measured by recipes.calibrate on
the two cores of an AMD EPYC without AMX."""


def usual_constants(kind: str) -> Calibration:
    """The constants for devices of the kind of this name, where nothing was measured."""
    if kind.startswith("cpu"):
        return CPU
    return Calibration()
