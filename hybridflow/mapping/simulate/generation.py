"""Simulator of generation: prefill is compute-bound, decoding is bound by reading weights and KV
cache (docs/paper.md section 4).

A decode step reads every weight once per pipeline micro-batch, and the keys and values of all
running sequences once (Pope et al. 2022, section 2; Kwon et al. 2023 for paged caches). Left out:
speculative decoding, prefix caching between samples of one prompt, chunked prefill mixed into
decode steps (prefill is counted before).
"""

from __future__ import annotations

from dataclasses import dataclass

from hybridflow.mapping.question.layouts import GenerationLayout
from hybridflow.mapping.question.model import ModelSpec
from hybridflow.mapping.simulate.ahead import continuous_profile
from hybridflow.mapping.simulate.compute import elementwise_s, head_s, products_s, rounds
from hybridflow.mapping.simulate.decoding import Segment, decode_profile
from hybridflow.mapping.simulate.fabric import Fabric
from hybridflow.mapping.simulate.footprint import kv_bytes_per_token
from hybridflow.mapping.simulate.passes import Machine


@dataclass(frozen=True, kw_only=True, slots=True)
class GenerationTime:
    """Seconds of a generation call by cause, without the transition into the generation layout."""

    prefill: float
    decode: float
    overhead: float
    reread: float = 0.0
    """Tokens of responses that are being drawn, read anew after new weights."""

    @property
    def total(self) -> float:
        return self.prefill + self.decode + self.overhead + self.reread


def replica_rows(layout: GenerationLayout, machine: Machine) -> int:
    """Responses that the busiest replica generates."""
    return rounds(machine.workload.num_rows, layout.replicas)


def generation_time(
    model: ModelSpec, layout: GenerationLayout, machine: Machine, *, ahead: bool = False
) -> GenerationTime:
    """Seconds of a response for every row of the step; `ahead`: of a step's share of a generation
    that never stops, because responses are drawn ahead of the steps."""
    workload, rows = machine.workload, replica_rows(layout, machine)
    step = DecodeStep(model, layout, machine)
    prompt, reread = workload.prompt.mean, 0.0
    if ahead and workload.asynchrony is not None and not workload.asynchrony.drains:
        profile = continuous_profile(workload, layout.replicas, layout.max_running)
        if workload.asynchrony.rereads:
            reread = _reread_s(model, layout, machine, profile)
    else:
        profile = decode_profile(workload.response, rows, layout.max_running)
    decode = 0.0
    for part in profile:
        decode += part.steps * step.seconds(part.running, prompt + part.generated)
    prefill = 0.0
    if prompt:
        attended = workload.prompt.mean_square / (2 * prompt)
        prefill = _prefill_s(model, layout, machine, rows * prompt, attended, rows)
    return GenerationTime(
        prefill=prefill,
        decode=decode,
        overhead=machine.call_s(layout.num_devices),
        reread=reread,
    )


def _reread_s(
    model: ModelSpec,
    layout: GenerationLayout,
    machine: Machine,
    profile: tuple[Segment, ...],
) -> float:
    """Seconds to read what is being drawn, once, at a moment of average load."""
    steps = running = generated = 0.0
    for part in profile:
        steps += part.steps
        running += part.steps * part.running
        generated += part.steps * part.running * part.generated
    length = machine.workload.prompt.mean + generated / running
    rows = running / steps
    return _prefill_s(model, layout, machine, rows * length, length / 2, rows)


class DecodeStep:
    """DecodeStep(model, layout, machine).seconds(running=64, context=1536)"""

    def __init__(self, model: ModelSpec, layout: GenerationLayout, machine: Machine) -> None:
        self.model, self.layout, self.machine = model, layout, machine
        self._fabric = Fabric(machine.kind, machine.calibration, layout.num_devices)
        self._kv_bytes = kv_bytes_per_token(model, layout, machine.space)

    def seconds(self, running: float, context: float) -> float:
        """Seconds of a token for each of `running` sequences whose caches hold `context` tokens, on
        average.

        With pg stages the sequences form pg groups that follow each other through the stages: every
        stage is passed pg times.
        """
        calibration = self.machine.calibration
        host = calibration.decode_step_overhead_s + calibration.decode_row_overhead_s * running
        return host + self.layout.pg * self._stage(running / self.layout.pg, context)

    def _stage(self, rows: float, context: float) -> float:
        model, layout, machine = self.model, self.layout, self.machine
        parts = (machine.kind, machine.calibration, machine.space)
        layers = model.longest_stage(layout.pg)
        layer = products_s(model, *parts, tokens=rows, attended=context, t=layout.tg, decoding=True)
        layer += elementwise_s(model, *parts, tokens=rows, t=layout.tg)
        message = machine.space.activation_bytes * model.hidden_size * rows
        layer += machine.calibration.decode_layer_overhead_s + 2 * self._fabric.all_reduce(
            message, layout.tg, 1
        )
        cache = self._kv_bytes * rows * context / machine.bandwidth
        passing = 0.0
        if layout.pg > 1:
            passing = self._fabric.send(message / layout.tg, layout.tg)
        head = head_s(model, *parts, scored_tokens=rows, t=layout.tg, decoding=True)
        return layers * layer + cache + head + passing


def _prefill_s(
    model: ModelSpec,
    layout: GenerationLayout,
    machine: Machine,
    tokens: float,
    attended: float,
    rows: float,
) -> float:
    """Seconds to read `tokens` of a replica's `rows`, each token attending to `attended`, in passes
    of at most `max_num_batched_tokens`; stages work on different passes at the same time."""
    passes = rounds(tokens, int(machine.space.max_num_batched_tokens))
    each = tokens / passes
    parts = (machine.kind, machine.calibration, machine.space)
    layer = products_s(model, *parts, tokens=each, attended=attended, t=layout.tg) + elementwise_s(
        model, *parts, tokens=each, t=layout.tg
    )
    fabric = Fabric(machine.kind, machine.calibration, layout.num_devices)
    message = machine.space.activation_bytes * model.hidden_size * each
    layer += machine.calibration.layer_overhead_s + 2 * fabric.all_reduce(message, layout.tg, 1)
    stage = model.longest_stage(layout.pg) * layer + head_s(
        model, *parts, scored_tokens=rows / passes, t=layout.tg
    )
    return (passes + layout.pg - 1) * (stage + machine.calibration.micro_batch_overhead_s)
