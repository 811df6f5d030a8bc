"""page(): a RunRecord as HTML, everything inside one file: no script, no font, no URL."""

from __future__ import annotations

import math
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from statistics import median
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from hybridflow.metrics.samples import shorten
from recipes.report.charts import Point, Series, Slice, line_chart, number, timeline
from recipes.report.hosts import hosts
from recipes.report.run_record import RunRecord

HEADLINES = (
    "reward/mean",
    "gold/mean",
    "response_tokens/mean",
    "response_tokens/finished",
    "kl/reference",
    "actor/entropy",
    "actor/loss",
    "policy/loss",
    "actor/grad_norm",
    "critic/value_loss",
    "critic/explained_variance",
    "actor/log_prob_gap_max",
    "tokens_per_s",
    "seconds/step",
)
"""Metrics that are drawn large, where a run has them; the others are behind a fold."""
PHASE = "seconds/"
NO_PHASES = ("seconds/step", "seconds/validation")
STEPS_IN_TIMELINE = 3
NEXT_STEP = 1
FAILURE, RECOVERED, REPLAY_DIFFERS = "failure", "recovered", "replay_differs"
NOT_FINITE, REWOUND = "not_finite", "rewound"
"""Events of events.jsonl that the page shows."""
SECRET = re.compile(r"^(\s*[\w.-]*(?:^|_|\b)(?:token|api_key|secret|password))\s*:\s*\S.*$", re.M)
"""Settings whose value is no one's business."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Chart:
    metric: str
    svg: Markup
    first: str
    last: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Incident:
    """A failure, and the recovery from it where there was one."""

    title: str
    at: float
    cause: str
    then: str
    evidence: str
    recovery: str
    phases: Sequence[tuple[str, float]]
    """(phase, seconds) of the recovery."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Phase:
    """Median seconds of a call over the steps after the first."""

    name: str
    seconds: float
    share: float
    predicted: float | None


def page(record: RunRecord) -> str:
    """The whole page. Reads the record only: the same record gives the same page."""
    environment = Environment(
        loader=PackageLoader("recipes.report", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["number"] = number
    environment.filters["clock"] = clock
    environment.filters["short"] = lambda text: shorten(str(text), 600)
    headlines = [name for name in HEADLINES if name in record.metrics()]
    others = [name for name in record.metrics() if name not in headlines]
    groups = []
    for group, names in groupby(sorted(others), key=lambda name: name.partition("/")[0]):
        groups.append((group, list(_charts(record, list(names)))))
    return environment.get_template("page.html.jinja").render(
        record=record,
        name=record.directory.resolve().name,
        verdict=verdict(record),
        tiles=list(tiles(record)),
        charts=list(_charts(record, headlines)),
        groups=groups,
        phases=phases(record),
        timeline=_timeline(record),
        samples=list(_samples(record)),
        incidents=incidents(record),
        hosts=hosts(record.hosts),
        settings=SECRET.sub(r"\1: (hidden)", record.settings),
        lost_steps=len({(row["step"], row["split"]) for row in record.lost}),
    )


def verdict(record: RunRecord) -> str:
    """How far the run came, in one sentence."""
    steps = [row["step"] for row in record.of_split("train")]
    last = max(steps, default=0)
    if not record.summary:
        return f"Not finished: {last} steps so far, or stopped there."
    before, after = record.summary.get("reward_before"), record.summary.get("reward_after")
    text = f"Finished after {last} steps."
    if before is not None and after is not None:
        text += f" Mean reward of the validation: {number(before)} before, {number(after)} after."
    return text


def tiles(record: RunRecord) -> Iterator[tuple[str, str]]:
    """(name, value) of the numbers at the top."""
    train = record.of_split("train")
    yield "steps", str(max((row["step"] for row in train), default=0))
    rewards = record.values("validation", "reward/mean") or record.values("train", "reward/mean")
    if rewards:
        yield "reward", f"{number(rewards[0])} \N{RIGHTWARDS ARROW} {number(rewards[-1])}"
    seconds = record.values("train", "seconds/step")
    if seconds:
        yield "median step", f"{number(median(seconds))} s"
    speeds = record.values("train", "tokens_per_s")
    if speeds:
        yield "median tokens/s", number(median(speeds))
    ratio = effective_time(record)
    if ratio is not None:
        yield "time that counts", f"{100 * ratio:.0f} %"
    failures = [event for event in record.events if event.get("event") == FAILURE]
    if failures:
        yield "failures", str(len(failures))


def effective_time(record: RunRecord) -> float | None:
    """The share of the run's time, from the start of its first step to its last line, that went
    into steps and validations which the result holds: the effective training time ratio."""
    rows = sorted((*record.rows, *record.lost), key=lambda row: row["time_s"])
    spent = 0.0
    for row in record.rows:
        spent += row.get("seconds/step", 0.0) + row.get("seconds/validation", 0.0)
    if len(rows) < 2 or spent == 0:
        return None
    first = rows[0]
    start = first["time_s"] - first.get("seconds/step", first.get("seconds/validation", 0.0))
    whole = rows[-1]["time_s"] - start
    return min(spent / whole, 1.0) if whole > 0 else None


def phases(record: RunRecord) -> list[Phase]:
    """The calls of a step, longest first, beside what the mapper predicted."""
    predicted: dict[str, float] = {}
    for call in record.mapping.get("calls", ()):
        predicted[call["call"]] = call["end_s"] - call["start_s"]
    medians = {}
    for name in record.metrics():
        if name.startswith(PHASE) and name not in NO_PHASES:
            values = record.values("train", name)
            if values:
                medians[name.removeprefix(PHASE)] = median(values[1:] or values)
    whole = sum(medians.values()) or 1.0
    result = []
    for name, seconds in sorted(medians.items(), key=lambda item: -item[1]):
        result.append(
            Phase(
                name=name,
                seconds=seconds,
                share=seconds / whole,
                predicted=predicted.get(name),
            )
        )
    return result


def incidents(record: RunRecord) -> list[Incident]:
    """The failures in order, each with the recovery that follows it before the next one."""
    result: list[Incident] = []
    for event in record.events:
        kind = event.get("event")
        if kind == FAILURE:
            result.append(_failure(event))
        elif kind == RECOVERED and result:
            result[-1] = replace(
                result[-1],
                recovery=(
                    f"recovered in {number(event['total_s'])} s: pools "
                    f"{', '.join(event['pools'])} restarted, {event['lost_steps']} steps trained "
                    f"again from step {event['step']} on"
                ),
                phases=[
                    (name.removesuffix("_s"), event[name])
                    for name in ("quiesce_s", "rebuild_s", "restore_s")
                ],
            )
        elif kind == NOT_FINITE:
            result.append(_not_finite(event))
        elif kind == REWOUND and result:
            text = f"back to step {event['step']} in {number(event['total_s'])} s"
            result[-1] = replace(result[-1], recovery=text)
        elif kind == REPLAY_DIFFERS and result:
            text = f"{result[-1].then}; step {event['step']} replayed to other weights"
            result[-1] = replace(result[-1], then=text.lstrip("; "))
    return result


def _failure(event: Mapping[str, Any]) -> Incident:
    who = str(event["role"])
    if event["pool"]:
        who += f" rank {event['rank']} of pool {event['pool']}"
    if event["method"]:
        who += f" in {event['method']}"
    return Incident(
        title=f"step {event['step']}: {who} {event['kind'].replace('_', ' ')}",
        at=event["time_s"],
        cause=shorten(str(event["cause"]), 400),
        then=str(event.get("then") or event.get("gives_up") or ""),
        evidence=str(event["evidence"]),
        recovery="",
        phases=[],
    )


def _not_finite(event: Mapping[str, Any]) -> Incident:
    return Incident(
        title=f"step {event['step']}: the gradient of {', '.join(event['roles'])} is not finite",
        at=event["time_s"],
        cause=f"{len(set(event['uids']))} rows are passed over (bad/step-{event['step']:08d})",
        then="",
        evidence="",
        recovery="",
        phases=[],
    )


def _charts(record: RunRecord, names: Sequence[str]) -> Iterator[Chart]:
    for name in names:
        series = []
        for split, style in (("train", "train"), ("validation", "validation")):
            for stretch in _stretches(record.points(split, name, lost=True)):
                series.append(Series(label=f"lost {split}", points=stretch, style="lost"))
            points = record.points(split, name)
            if points:
                series.append(Series(label=split, points=points, style=style))
        svg = line_chart(series, description=f"{name} over the training step")
        if svg:
            drawn = series[-1].points
            yield Chart(metric=name, svg=svg, first=number(drawn[0][1]), last=number(drawn[-1][1]))


def _stretches(points: Sequence[Point]) -> list[list[Point]]:
    """The points of each failure by themselves: the steps of one that was taken back only grow."""
    stretches: list[list[Point]] = []
    for point in points:
        if not stretches or not 0 < point[0] - stretches[-1][-1][0] <= NEXT_STEP:
            stretches.append([])
        stretches[-1].append(point)
    return stretches


def _timeline(record: RunRecord) -> dict[str, Any]:
    """The last steps as lanes of ranks."""
    names: dict[int, str] = {}
    lanes: dict[tuple[int, int], str] = {}
    for event in record.slices:
        if event["ph"] == "M" and event["name"] == "process_name":
            names[event["pid"]] = event["args"]["name"]
        if event["ph"] == "M" and event["name"] == "thread_name":
            lanes[event["pid"], event["tid"]] = event["args"]["name"]
    slices = []
    for event in record.slices:
        if event["ph"] == "X":
            lane = lanes[event["pid"], event["tid"]]
            slices.append(
                Slice(
                    lane=f"{names[event['pid']]} {lane}",
                    name=event["name"],
                    start_s=event["ts"] / 1e6,
                    end_s=(event["ts"] + event["dur"]) / 1e6,
                )
            )
    steps = [part for part in slices if part.name.startswith("step ")]
    if not steps:
        return {"svg": Markup(""), "names": []}
    begin = steps[-STEPS_IN_TIMELINE:][0].start_s
    last = [part for part in slices if part.end_s > begin]
    styles = list(dict.fromkeys(part.name for part in last if "." in part.name))
    return {"svg": timeline(last, styles, description="calls of the last steps"), "names": styles}


def _samples(record: RunRecord) -> Iterator[tuple[str, list[Mapping[str, Any]]]]:
    """(title, samples): of the first and the last validation, or of training steps."""
    split = "validation" if any(row["split"] == "validation" for row in record.samples) else "train"
    rows = [row for row in record.samples if row["split"] == split]
    if not rows:
        return
    first, last = rows[0]["step"], rows[-1]["step"]
    for step in dict.fromkeys((last, first)):
        of_step = [row for row in rows if row["step"] == step]
        yield f"{split}, step {step}", sorted(of_step, key=_best_first)


def _best_first(sample: Mapping[str, Any]) -> float:
    """Samples without a reward, or with one that is no number, come last."""
    reward = sample.get("reward", math.nan)
    return math.inf if math.isnan(reward) else -reward


def clock(seconds: float) -> str:
    """Unix seconds as a date and time, UTC."""
    return time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime(seconds))
