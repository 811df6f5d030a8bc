"""The paper's findings about placements, generation and transitions (docs/paper.md section 6),
computed with one set of constants."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from hybridflow.dataflow import CallKind
from hybridflow.mapping.answer.auto import smallest_cluster
from hybridflow.mapping.question.cluster import Cluster
from hybridflow.mapping.question.layouts import GenerationLayout, ModelLayout
from hybridflow.mapping.question.model import ModelSpec
from hybridflow.mapping.question.workload import Lengths, Workload
from hybridflow.mapping.question.zoo import MODELS
from hybridflow.mapping.search.branch import Solution
from hybridflow.mapping.search.options import call_footprint, generation_options
from hybridflow.mapping.search.search import Search, search
from hybridflow.mapping.search.setting import Setting
from hybridflow.mapping.simulate.footprint import resident_footprint
from hybridflow.mapping.simulate.passes import Machine
from hybridflow.mapping.simulate.transition import transition_time
from recipes.dataflows import PAPER
from recipes.plan import SCALAR_ROLES

PAPER_WORKLOAD = Workload(
    batch_size=1024, prompt=Lengths.fixed(1024), response=Lengths.fixed(1024), num_mini_batches=8
)
"""docs/paper.md section 6."""
SIZES = (8, 16, 32, 48, 64, 96, 128)
SMALLEST = {"llama-7b": 8, "llama-13b": 16, "llama-34b": 32, "llama-70b": 64}
COLOCATED = (("actor", "critic", "reference", "reward"),)
APART = (("actor",), ("critic",), ("reference",), ("reward",))


@dataclass(frozen=True, slots=True)
class Row:
    """A finding: the paper's value, the value here, whether they are the same, and the reason
    if not."""

    finding: str
    paper: str
    ours: str
    agrees: bool
    why: str = ""


def paper_setting(
    model: str,
    num_devices: int,
    *,
    algorithm: str = "ppo",
    scorer: str | None = None,
    **changes: Any,
) -> Setting:
    """An algorithm on the paper's testbed; `scorer` is the model of critic, reward and cost if
    it is another."""
    policy, scalar = MODELS[model], MODELS[scorer or model].with_scalar_head()
    dataflow = changes.pop("dataflow", None) or PAPER[algorithm]
    models: dict[str, ModelSpec | None] = dict.fromkeys(dataflow.roles, policy)
    for role in SCALAR_ROLES:
        if role in models:
            models[role] = scalar
    setting = Setting(
        dataflow=dataflow,
        models=models,
        cluster=Cluster.parse(f"{num_devices}xA100-80GB"),
        workload=PAPER_WORKLOAD,
    )
    return replace(setting, **changes)


def named(solution: Solution) -> str:
    """actor+reference 64 | critic 64"""
    pools = zip(solution.placement, solution.allocation, strict=True)
    return " | ".join(f"{'+'.join(roles)} {size}" for roles, (_, size) in pools)


def num_pools(solution: Solution) -> int:
    return len(solution.placement)


def smallest_rows() -> list[Row]:
    """Device counts of the paper's figures (powers of two of machines) on which PPO fits."""
    rows = []
    for model, paper in SMALLEST.items():
        ours = next(
            size
            for size in (8, 16, 32, 64, 128)
            if search(paper_setting(model, size)).best is not None
        )
        exact = smallest_cluster(paper_setting(model, 8))
        why = ""
        if ours != paper:
            resident = 40 * MODELS[model].num_parameters / ours / 1e9
            why = (
                f"parameters, gradients and Adam states of four models are {resident:.0f} GB a "
                f"device on {ours}: it fits, with a KV cache so small that generation takes many "
                "waves; the paper shows no run that small"
            )
        rows.append(
            Row(
                f"fewest devices for PPO, {model}",
                str(paper),
                f"{ours} (in whole machines {8 * (exact or 0)})",
                ours == paper,
                why,
            )
        )
    return rows


def placement_rows() -> list[Row]:
    """Which kind of placement is best on how many devices."""
    rows = []
    for model, smallest in SMALLEST.items():
        others = []
        for size in SIZES:
            if smallest <= size <= 64:
                best = search(paper_setting(model, size)).best
                if best is not None and num_pools(best) > 1:
                    others.append(f"{size}: {named(best)}")
        rows.append(
            Row(
                f"best placement to 64 devices, {model}",
                "all colocated",
                "; ".join(others) or "all colocated",
                not others,
            )
        )
    rows += [
        _two_pools(model, size)
        for model, size in (("llama-34b", 96), ("llama-34b", 128), ("llama-13b", 96))
    ]
    return [*rows, _all_apart("llama-13b", 128)]


def _two_pools(model: str, size: int) -> Row:
    searching = Search(paper_setting(model, size))
    best, together = searching.run().best, searching.best_of(COLOCATED)
    even = searching.best_of((("actor", "reference"), ("critic", "reward")))
    assert best is not None and together is not None and even is not None
    ours = f"{named(best)}: {best.step_s:.1f} s; colocated {together.step_s:.1f} s"
    ours += f"; {named(even)} {even.step_s:.1f} s"
    gap = even.step_s / together.step_s - 1
    sizes = {devices for _, devices in best.allocation}
    agrees = num_pools(best) == 2 and len(sizes) == 1
    why = "" if agrees else f"two pools take {gap:+.1%}; {_cheap_gradients()}"
    return Row(f"best placement, {model} on {size}", "an even split in two", ours, agrees, why)


def _all_apart(model: str, size: int) -> Row:
    searching = Search(paper_setting(model, size))
    best, apart = searching.run().best, searching.best_of(APART)
    assert best is not None and apart is not None
    sizes = [devices for _, devices in apart.allocation]
    ours = f"{named(best)}: {best.step_s:.1f} s; all apart {sizes}: {apart.step_s:.1f} s"
    why = (
        "the sizes of the separate pools "
        f"{'are the same' if sizes == [64, 32, 16, 16] else 'differ'}, but they idle while others "
        f"work: all apart takes {apart.step_s / best.step_s - 1:+.0%}; {_cheap_gradients()}"
    )
    return Row(
        f"best placement, {model} on {size}",
        "all apart, 64/32/16/16",
        ours,
        num_pools(best) == 4,
        why,
    )


def _cheap_gradients() -> str:
    return (
        "colocation scales further here because pipelines of up to 8 stages keep the gradient "
        "reduction small; with at most 2 stages two pools win from 96 devices on (docs/mapping.md)"
    )


def mixed_rows() -> list[Row]:
    """13B actor and reference with 70B critic and reward."""
    rows = []
    for size, paper in (
        (32, "colocated"),
        (64, "colocated"),
        (128, "actor+reference+reward 64 | critic 64"),
    ):
        searching = Search(paper_setting("llama-13b", size, scorer="llama-70b"))
        best = searching.run().best
        split = searching.best_of((("actor", "reference", "reward"), ("critic",)))
        if best is None:
            rows.append(
                Row(f"13B with 70B critic and reward on {size}", paper, "does not fit", False)
            )
            continue
        agrees = num_pools(best) == 1 if paper == "colocated" else named(best) == paper
        ours, why = f"{named(best)}: {best.step_s:.1f} s", ""
        if split is not None and best != split:
            ours += f"; {named(split)} {split.step_s:.1f} s"
        if split is not None and not agrees:
            why = (
                f"the paper's split takes {split.step_s / best.step_s - 1:+.1%}; "
                f"{_cheap_gradients()}"
            )
        rows.append(Row(f"13B with 70B critic and reward on {size}", paper, ours, agrees, why))
    return rows


def generation_rows() -> list[Row]:
    """Generation by tg on 16 devices, training 1-8-2."""
    rows = []
    for model, best_tg, cut in (("llama-7b", 2, 60.3), ("llama-13b", 4, 36.4)):
        seconds = generation_by_tg(model)
        ours = min(seconds, key=lambda tg: seconds[tg])
        saved = 100 * (1 - seconds[best_tg] / seconds[8])
        rows.append(
            Row(
                f"best generation tensor size, {model} on 16, training 1-8-2",
                str(best_tg),
                str(ours),
                ours == best_tg,
            )
        )
        rows.append(
            Row(
                f"generation time that tg={best_tg} saves against tg=8, {model}",
                f"{cut:.1f} %",
                f"{saved:.1f} %",
                abs(saved - cut) < 10,
                "the direction is the same, the gain smaller: here the bytes of the KV cache per "
                "device do not depend on tg, so that only weights, collectives and the host's "
                "work per sequence differ; the paper's engine lost more at tg=8",
            )
        )
    return rows


def generation_by_tg(model: str) -> dict[int, float]:
    """Seconds of the actor's generation (with transition) for every tg at its best number of
    running sequences; the actor's training states stay on the devices."""
    setting = paper_setting(model, 16)
    layout = ModelLayout(p=1, t=8, d=2, zero=1, recompute=True, micro_batch_tokens=2048)

    resident = resident_footprint(setting.model("actor"), layout, setting.space, trained=True).total
    best: dict[int, float] = {}
    for option in generation_options(setting, "actor", 0, 16):
        need = call_footprint(setting, "actor", CallKind.generation, layout, option.layout).total
        if resident + need <= setting.capacity(0):
            seconds = option.seconds + transition_time(
                setting.model("actor"), layout, option.layout, setting.machine(0)
            )
            best[option.layout.tg] = min(seconds, best.get(option.layout.tg, seconds))
    return best


def transition_rows() -> list[Row]:
    """Seconds from training to generation at 70B, ours against gathering the whole model on
    every rank."""
    setting = paper_setting("llama-70b", 64)
    machine, model = setting.machine(0), MODELS["llama-70b"]
    layout = ModelLayout(p=8, t=8, d=1, zero=1)
    narrow = transition_time(model, layout, GenerationLayout(pg=1, tg=8, replicas=8), machine)
    whole = gather_everything_s(model, machine, 64)
    return [
        Row(
            "transition, 70B on 64, training 8-8-1 to tg=8",
            "9.6 s (87.8 s less 78.2 s)",
            f"{narrow:.1f} s",
            0.5 < narrow / 9.6 < 2,
        ),
        Row(
            "transition, 70B on 64, every rank gathers the whole model",
            "87.8 s",
            f"{whole:.1f} s",
            0.5 < whole / 87.8 < 2,
            "here one large all-gather at the links' speed; DeepSpeed-Chat gathers layer by layer "
            "and keeps to neither",
        ),
    ]


def gather_everything_s(model: ModelSpec, machine: Machine, num_devices: int) -> float:
    """DeepSpeed-Chat's way (docs/paper.md section 3): (tpd - 1)/(tpd) M on every rank, every
    node's link shared by its 8 ranks."""
    num_bytes = (
        machine.space.parameter_bytes * model.num_parameters * (num_devices - 1) / num_devices
    )
    per_node = machine.kind.devices_per_node
    far = (num_devices - per_node) / (num_devices - 1)
    return (
        per_node
        * num_bytes
        * far
        / (machine.kind.inter_bandwidth * machine.calibration.link_efficiency)
    )
