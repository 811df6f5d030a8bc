"""A real pretrained model learns a real task by GRPO, in this system and in TRL: held-out accuracy,
seconds of a step, and peak memory beside the bytes that the mapper predicts.

python -m benchmarks.real_model --json FILE [--trl-python PYTHON]

SmolLM2-135M-Instruct on sums of two digits: 8 prompts x 8 samples a step, 24 new tokens, fp32, 12
steps, learning rate 1e-5, greedy answers to 64 held-out prompts before and after. This system: 2
processes. TRL's GRPOTrainer: one process with all cores, with micro-batches of 16 rows and of 64.
Installs nothing: it says what to install.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.apart import HYBRIDFLOW, TRL, has_trl, run_apart
from benchmarks.real_model.task import INSTALL, Task, missing_packages, prepare
from benchmarks.step.case import PHASES

SIDES = {
    HYBRIDFLOW: "benchmarks.real_model.hybridflow_side",
    TRL: "benchmarks.real_model.trl_side",
}
TRL_MICRO_BATCHES = ("16", "64")


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.real_model",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--json", type=Path, help="write the rows here")
    parser.add_argument(
        "--trl-python", default=sys.executable, help="interpreter that has trl; this one by default"
    )
    parser.add_argument("--systems", nargs="+", choices=tuple(SIDES), default=list(SIDES))
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument(
        "--directory", type=Path, help="where model and rows are kept; a temporary one by default"
    )
    parser.add_argument(
        "--set",
        nargs="*",
        default=[],
        metavar="NAME=VALUE",
        help="settings of recipes.grpo for this system",
    )
    arguments = parser.parse_args()
    if missing := missing_packages():
        raise SystemExit(f"error: {', '.join(missing)} not installed; {INSTALL}")
    rows = []
    with tempfile.TemporaryDirectory() as temporary:
        directory = arguments.directory or Path(temporary)
        directory.mkdir(parents=True, exist_ok=True)
        prepare(directory)
        overrides = dict(pair.split("=", 1) for pair in arguments.set)
        for system, settings in runs(arguments.systems, arguments.trl_python, overrides):
            task = Task(
                directory=str(directory.absolute()), steps=arguments.steps, settings=settings
            )
            result = run_apart(system, SIDES[system], task.to_json(), arguments.trl_python)
            rows.append(row(system, settings, result))
            print(line(rows[-1]), flush=True)
    for text in comparison(rows):
        print(text)
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=1) + "\n")


def runs(
    systems: list[str], trl_python: str, overrides: dict[str, str]
) -> list[tuple[str, dict[str, str]]]:
    """Every system with each of its settings."""
    chosen: list[tuple[str, dict[str, str]]] = []
    if HYBRIDFLOW in systems:
        chosen.append((HYBRIDFLOW, overrides))
    if TRL in systems and has_trl(trl_python):
        chosen.extend((TRL, {"micro_batch": size}) for size in TRL_MICRO_BATCHES)
    return chosen


def row(system: str, settings: dict[str, str], result: dict[str, Any]) -> dict[str, Any]:
    """Medians over the measured steps, and what the run says of itself."""
    steps = result.pop("steps")
    phases = {}
    for phase in PHASES:
        phases[phase] = statistics.median(step["phases"][phase] for step in steps)
    return {
        "system": system,
        "settings": settings,
        "step_s": statistics.median(step["step_s"] for step in steps),
        "cpu_s": statistics.median(step["cpu_s"] for step in steps),
        "phases": phases,
        **result,
    }


def line(row: dict[str, Any]) -> str:
    phases = "  ".join(f"{phase} {seconds:.2f}" for phase, seconds in row["phases"].items())
    text = (
        f"{row['system']:>10} {row['step_s']:6.1f} s  {row['peak_bytes'] / 1e9:5.2f} GB  "
        f"accuracy {row['accuracy_before']:.1%} -> {row['accuracy_after']:.1%}  {phases}"
    )
    if "predicted_bytes" in row:
        measured, predicted = row["peak_bytes_per_host"], row["predicted_bytes"]
        text += (
            f"  a host {measured / 1e9:.2f} GB, predicted {predicted / 1e9:.2f} "
            f"({predicted / measured - 1:+.0%})"
        )
    return f"{text}  {row['settings'] or ''}".rstrip()


def comparison(rows: list[dict[str, Any]]) -> list[str]:
    """How this system stands to each setting of the other."""
    own = [row for row in rows if row["system"] == HYBRIDFLOW]
    texts = []
    for other in rows:
        for this in own if other["system"] == TRL else ():
            texts.append(
                f"against TRL with micro-batches of {other['settings']['micro_batch']}: "
                f"{other['step_s'] / this['step_s']:.2f}x faster, "
                f"{this['peak_bytes'] / other['peak_bytes']:.2f}x its memory"
            )
    return texts


if __name__ == "__main__":
    main()
