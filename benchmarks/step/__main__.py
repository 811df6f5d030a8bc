"""GRPO steps of the real recipe, and of TRL's GRPOTrainer where it is importable: seconds per
phase, tokens/s, peak memory.

python -m benchmarks.step --json FILE [--trl-python PYTHON]

32 prompts x 8 samples, 8 + 64 tokens (fixed; and 8 to 64, drawn per response), random Qwen2 models
of 3 and 32 million parameters, in bf16 where the machine computes it natively and fp32 elsewhere.
This system: 2 processes of 1 thread. TRL: one process with all cores, at several settings, of which
the fastest counts. Every run has a process of its own, one after the other, and all of them are
gone through `--repeats` times; medians over all measured steps. docs/performance.md says where the
time goes.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from collections.abc import Iterator
from itertools import chain, product
from pathlib import Path
from typing import Any

from benchmarks.apart import HYBRIDFLOW, TRL, has_trl, run_apart
from benchmarks.step.case import PHASES, SHAPES, Case, prepare
from workers.precision import computes_bf16

SIDES = {HYBRIDFLOW: "benchmarks.step.hybridflow_side", TRL: "benchmarks.step.trl_side"}


def trl_settings() -> dict[str, list[dict[str, str]]]:
    """The fastest combinations of precision, attention, generation and micro-batch for each model
    (docs/performance.md); half precision where this machine computes it natively."""
    half = "bf16" if computes_bf16("cpu") else "fp32"
    vllm = {"precision": half, "generation": "vllm", "micro_batch": "32"}
    plain = {"precision": "fp32", "generation": "transformers", "micro_batch": "32"}
    eager, fused = {"attention": "eager"}, {"attention": "sdpa"}
    return {"3m": [vllm | eager, plain | fused], "30m": [vllm | eager, vllm | fused]}


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.step",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--json", type=Path, help="write the rows here")
    parser.add_argument(
        "--trl-python", default=sys.executable, help="interpreter that has trl; this one by default"
    )
    parser.add_argument("--models", nargs="+", choices=sorted(SHAPES), default=sorted(SHAPES))
    parser.add_argument(
        "--lengths", nargs="+", choices=("fixed", "drawn"), default=["fixed", "drawn"]
    )
    parser.add_argument(
        "--systems", nargs="+", choices=(HYBRIDFLOW, TRL), default=[HYBRIDFLOW, TRL]
    )
    parser.add_argument(
        "--steps", type=int, default=5, help="measured steps of a run, after two that warm up"
    )
    parser.add_argument("--repeats", type=int, default=2, help="times that everything is run")
    parser.add_argument(
        "--set",
        nargs="*",
        default=[],
        metavar="NAME=VALUE",
        help="settings of recipes.grpo for this system",
    )
    arguments = parser.parse_args()
    systems = [
        system for system in arguments.systems if system != TRL or has_trl(arguments.trl_python)
    ]
    results: dict[str, tuple[dict[str, Any], list[dict[str, Any]]]] = {}
    with tempfile.TemporaryDirectory() as directory:
        prepare(Path(directory), arguments.models)
        overrides = dict(pair.split("=", 1) for pair in arguments.set)
        for _, model, lengths in product(
            range(arguments.repeats), arguments.models, arguments.lengths
        ):
            for system, settings in runs(systems, model, overrides):
                case = Case(
                    model=model,
                    lengths=lengths,
                    directory=directory,
                    warm_up=2,
                    steps=arguments.steps,
                    settings=settings,
                )
                name: dict[str, Any] = {"system": system, "model": model, "lengths": lengths}
                if settings:
                    name["settings"] = settings
                result = run(system, case, arguments.trl_python)
                results.setdefault(json.dumps(name), (name, []))[1].append(result)
                step_s = statistics.median(step["step_s"] for step in result["steps"])
                print(
                    f"{system:>10} {model:>4} {lengths:>5} {step_s:6.2f} s {settings}", flush=True
                )
    rows = [row(name, repeats) for name, repeats in results.values()]
    print(table(rows))
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=1) + "\n")


def runs(
    systems: list[str], model: str, overrides: dict[str, str]
) -> Iterator[tuple[str, dict[str, str]]]:
    """Every system with each of its settings; `overrides` are this system's."""
    for system in systems:
        if system == TRL:
            for settings in trl_settings()[model]:
                yield system, settings
        else:
            yield system, overrides


def run(system: str, case: Case, trl_python: str) -> dict[str, Any]:
    """One run in a process of its own: {"steps": [...], "peak_bytes": ...}."""
    return run_apart(system, SIDES[system], case.to_json(), trl_python)


def row(name: dict[str, Any], repeats: list[dict[str, Any]]) -> dict[str, Any]:
    """Medians over the steps of all repeats of one run."""
    steps = list(chain.from_iterable(repeat["steps"] for repeat in repeats))
    times = [step["step_s"] for step in steps]
    phases = {}
    for phase in PHASES:
        phases[phase] = statistics.median(step["phases"][phase] for step in steps)
    return {
        **name,
        "step_s": statistics.median(times),
        "step_s_min": min(times),
        "step_s_max": max(times),
        "cpu_s": statistics.median(step["cpu_s"] for step in steps),
        "phases": phases,
        "tokens_per_s": statistics.median(step["tokens"] / step["step_s"] for step in steps),
        "peak_bytes": max(repeat["peak_bytes"] for repeat in repeats),
        "num_steps": len(steps),
    }


def table(rows: list[dict[str, Any]]) -> str:
    """One line a row, and how many times faster this system is than the fastest settings of the
    other."""
    lines = [
        f"{'system':>10} {'model':>5} {'lengths':>7} {'step s':>7} {'CPU s':>6} {'tokens/s':>9} "
        f"{'peak MB':>8}  seconds per phase"
    ]
    by_case: dict[tuple[str, str], dict[str, list[dict[str, Any]]]] = {}
    for row in rows:
        case = by_case.setdefault((row["model"], row["lengths"]), {HYBRIDFLOW: [], TRL: []})
        case[row["system"]].append(row)
        parts = "  ".join(f"{phase} {seconds:.2f}" for phase, seconds in row["phases"].items())
        lines.append(
            f"{row['system']:>10} {row['model']:>5} {row['lengths']:>7} {row['step_s']:7.2f} "
            f"{row['cpu_s']:6.2f} {row['tokens_per_s']:9.0f} {row['peak_bytes'] / 1e6:8.0f}  "
            f"{parts}"
        )
    for (model, lengths), systems in by_case.items():
        for row in systems[HYBRIDFLOW] if systems[TRL] else []:
            wall = min(trl["step_s"] for trl in systems[TRL]) / row["step_s"]
            cpu = min(trl["cpu_s"] for trl in systems[TRL]) / row["cpu_s"]
            lines.append(
                f"{model} {lengths}: {wall:.2f}x faster than TRL ({cpu:.2f}x by CPU seconds)"
            )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
