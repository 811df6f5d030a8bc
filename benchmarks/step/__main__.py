"""GRPO steps of the real recipe, and of TRL's GRPOTrainer where it is importable: seconds per phase,
tokens/s, peak memory.

python -m benchmarks.step --json FILE [--trl-python PYTHON]

32 prompts x 8 samples, 8 + 64 tokens (fixed; and 8 to 64, drawn per response), random Qwen2 models of 3 and
32 million parameters, bf16. This system: 2 processes of 1 thread. TRL: one process with all cores, at several
settings, of which the fastest counts. Every run has a process of its own, one after the other, and all of
them are gone through `--repeats` times; medians over all measured steps. docs/performance.md says where the
time goes.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.step.case import PHASES, SHAPES, Case, prepare

OURS, TRL = "hybridflow", "trl"
TRL_SETTINGS: dict[str, list[dict[str, str]]] = {
    "3m": [
        {"precision": "bf16", "attention": "eager", "generation": "vllm", "micro_batch": "32"},
        {"precision": "fp32", "attention": "sdpa", "generation": "transformers", "micro_batch": "32"},
    ],
    "30m": [
        {"precision": "bf16", "attention": "eager", "generation": "vllm", "micro_batch": "32"},
        {"precision": "bf16", "attention": "sdpa", "generation": "vllm", "micro_batch": "32"},
    ],
}
"""What came out fastest among precision x attention x generation x micro-batch (docs/performance.md)."""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, help="write the rows here")
    parser.add_argument(
        "--trl-python", default=sys.executable, help="interpreter that has trl; this one by default"
    )
    parser.add_argument("--models", nargs="+", choices=sorted(SHAPES), default=sorted(SHAPES))
    parser.add_argument("--lengths", nargs="+", choices=("fixed", "drawn"), default=["fixed", "drawn"])
    parser.add_argument("--systems", nargs="+", choices=(OURS, TRL), default=[OURS, TRL])
    parser.add_argument(
        "--steps", type=int, default=5, help="measured steps of a run, after two that warm up"
    )
    parser.add_argument("--repeats", type=int, default=2, help="times that everything is run")
    parser.add_argument(
        "--set", nargs="*", default=[], metavar="NAME=VALUE", help="settings of recipes.grpo for this system"
    )
    arguments = parser.parse_args()
    systems = [system for system in arguments.systems if system != TRL or has_trl(arguments.trl_python)]
    results: dict[str, tuple[dict[str, str], list[dict[str, Any]]]] = {}
    with tempfile.TemporaryDirectory() as directory:
        prepare(Path(directory), arguments.models)
        for _ in range(arguments.repeats):
            for model in arguments.models:
                for lengths in arguments.lengths:
                    case = Case(
                        model=model, lengths=lengths, directory=directory, warm_up=2, steps=arguments.steps
                    )
                    for system, settings in runs(
                        systems, model, dict(pair.split("=", 1) for pair in arguments.set)
                    ):
                        name = {
                            "system": system,
                            "model": model,
                            "lengths": lengths,
                            **({"settings": settings} if settings else {}),
                        }
                        made = run(system, replace(case, settings=settings), arguments.trl_python)
                        results.setdefault(json.dumps(name), (name, []))[1].append(made)
                        step_s = statistics.median(step["step_s"] for step in made["steps"])
                        print(f"{system:>10} {model:>4} {lengths:>5} {step_s:6.2f} s {settings}", flush=True)
    rows = [row(name, made) for name, made in results.values()]
    print(table(rows))
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=1) + "\n")


def has_trl(python: str) -> bool:
    """Whether that interpreter imports trl; found out in it."""
    found = subprocess.run([python, "-c", "import trl"], capture_output=True, check=False).returncode == 0
    if not found:
        print(f"{python} has no trl: this system is measured alone")
    return found


def runs(systems: list[str], model: str, own: dict[str, str]) -> Iterator[tuple[str, dict[str, str]]]:
    for system in systems:
        for settings in TRL_SETTINGS[model] if system == TRL else [own]:
            yield system, settings


def run(system: str, case: Case, trl_python: str) -> dict[str, Any]:
    """One run in a process of its own: {"steps": [...], "peak_bytes": ...}."""
    module, python = (
        ("benchmarks.step.trl_side", trl_python)
        if system == TRL
        else ("benchmarks.step.hybridflow_side", sys.executable)
    )
    with tempfile.TemporaryDirectory() as directory:
        output = Path(directory) / "result.json"
        finished = subprocess.run(
            [python, "-m", module, case.to_json(), str(output)],
            capture_output=True,
            text=True,
            check=False,
            cwd=Path(__file__).resolve().parents[1],
            env={**os.environ, "PYTHONWARNINGS": "ignore"},
        )
        if finished.returncode:
            raise RuntimeError(f"{module} failed:\n{finished.stdout[-2000:]}\n{finished.stderr[-4000:]}")
        result: dict[str, Any] = json.loads(output.read_text())
    return result


def row(name: dict[str, Any], made: list[dict[str, Any]]) -> dict[str, Any]:
    """Medians over the steps of all repeats of one run."""
    steps = [step for one in made for step in one["steps"]]
    return {
        **name,
        "step_s": statistics.median(step["step_s"] for step in steps),
        "step_s_min": min(step["step_s"] for step in steps),
        "step_s_max": max(step["step_s"] for step in steps),
        "cpu_s": statistics.median(step["cpu_s"] for step in steps),
        "phases": {phase: statistics.median(step["phases"][phase] for step in steps) for phase in PHASES},
        "tokens_per_s": statistics.median(step["tokens"] / step["step_s"] for step in steps),
        "peak_bytes": max(one["peak_bytes"] for one in made),
        "num_steps": len(steps),
    }


def table(rows: list[dict[str, Any]]) -> str:
    """One line a row, and how many times faster this system is than the fastest settings of the other."""
    lines = [
        f"{'system':>10} {'model':>5} {'lengths':>7} {'step s':>7} {'CPU s':>6} {'tokens/s':>9} "
        f"{'peak MB':>8}  seconds per phase"
    ]
    for one in rows:
        parts = "  ".join(f"{phase} {seconds:.2f}" for phase, seconds in one["phases"].items())
        lines.append(
            f"{one['system']:>10} {one['model']:>5} {one['lengths']:>7} {one['step_s']:7.2f} "
            f"{one['cpu_s']:6.2f} "
            f"{one['tokens_per_s']:9.0f} {one['peak_bytes'] / 1e6:8.0f}  {parts}"
        )
    for ours in (one for one in rows if one["system"] == OURS):
        rivals = [
            one
            for one in rows
            if one["system"] == TRL and all(one[key] == ours[key] for key in ("model", "lengths"))
        ]
        if rivals:
            wall, cpu = (
                min(one["step_s"] for one in rivals) / ours["step_s"],
                min(one["cpu_s"] for one in rivals) / ours["cpu_s"],
            )
            lines.append(
                f"{ours['model']} {ours['lengths']}: {wall:.2f}x faster than TRL ({cpu:.2f}x by CPU seconds)"
            )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
