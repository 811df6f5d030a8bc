"""The mapper's answers for the paper's testbed, beside the paper's; how long the search takes;
predicted against measured.

    python -m benchmarks.mapping --json FILE [--measured FILE | --computed] [--pictures docs/images]

All rows of the paper are computed with the same constants, the defaults of question/calibration.py.
The rows of predictions are of this machine: recipes.calibrate, then the runs of
benchmarks.mapping.measured (eight minutes in all, on a machine that does nothing else).
`--measured` takes runs that were measured before, `--computed` leaves measuring out.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, replace
from itertools import product
from pathlib import Path
from typing import Any

from benchmarks.mapping.paper import (
    APART,
    COLOCATED,
    PAPER_WORKLOAD,
    SMALLEST,
    Row,
    generation_rows,
    mixed_rows,
    named,
    paper_setting,
    placement_rows,
    smallest_rows,
    transition_rows,
)
from hybridflow.dataflow import Dataflow
from hybridflow.mapping.answer.auto import mapping_of
from hybridflow.mapping.answer.explain import table
from hybridflow.mapping.calibrate.compare import (
    Comparison,
    Run,
    compare,
    load_runs,
    order_agrees,
    side_by_side,
    within,
)
from hybridflow.mapping.question.space import SearchSpace
from hybridflow.mapping.search.branch import Solution
from hybridflow.mapping.search.search import Search, search
from recipes.dataflows import dataflow_of, planned


def scaling_rows() -> tuple[list[Row], list[dict[str, Any]]]:
    """Throughput of every algorithm on 8 to 1,024 devices, and the strong-scaling efficiency of
    PPO at 128. Algorithms with the same calls are searched once."""
    throughput: list[dict[str, Any]] = []
    searched: dict[tuple[object, ...], Solution | None] = {}
    ppo: dict[tuple[str, int], float] = {}
    for algorithm, model, size in product(
        planned(), SMALLEST, (8, 16, 32, 64, 128, 256, 512, 1024)
    ):
        dataflow = dataflow_of(algorithm)
        key = (timing(dataflow), model, size)
        if key not in searched:
            searched[key] = search(paper_setting(model, size, dataflow=dataflow)).best
        best = searched[key]
        row: dict[str, Any] = {"algorithm": algorithm, "model": model, "devices": size}
        row |= {"tokens_per_s": None, "placement": None}
        if best is not None:
            row |= {
                "tokens_per_s": PAPER_WORKLOAD.num_tokens / best.step_s,
                "placement": named(best),
            }
        throughput.append(row)
        if algorithm == "ppo" and best is not None:
            ppo[model, size] = row["tokens_per_s"]
    each = {
        model: ppo[model, 128] / ppo[model, size] / (128 / size) for model, size in SMALLEST.items()
    }
    mean = sum(each.values()) / len(each)
    detail = ", ".join(f"{model} {value:.0%}" for model, value in each.items())
    name, agrees = "strong-scaling efficiency of PPO at 128", abs(mean - 0.668) < 0.1
    return [Row(name, "66.8 %", f"{mean:.1%} ({detail})", agrees)], throughput


def timing(dataflow: Dataflow) -> tuple[object, ...]:
    """A key of everything that a prediction depends on: which role makes which kind of call
    after which others, and how many columns go between them."""
    position = {call.name: number for number, call in enumerate(dataflow.calls)}
    calls = []
    for call in dataflow.calls:
        inputs = []
        for name in call.depends_on:
            columns = {*dataflow.call(name).writes} & {*call.reads}
            inputs.append((position[name], len(columns)))
        calls.append((call.role, call.kind, tuple(inputs)))
    return tuple(calls)


def search_seconds() -> dict[str, float]:
    """Processor seconds of one core: 128 devices and 4 models; 1,024 devices and 5 models
    (Safe-RLHF); the best plan of every placement."""
    large = replace(PAPER_WORKLOAD, batch_size=8192)
    settings = {
        "128": paper_setting("llama-13b", 128),
        "1024": paper_setting("llama-13b", 1024, algorithm="safe_rlhf", workload=large),
    }
    result = {}
    for name, setting in settings.items():
        started = time.process_time()
        assert search(setting, every_placement=True).best is not None
        result[name] = time.process_time() - started
    return result


def sensitivity() -> list[dict[str, Any]]:
    """The best placement by the longest pipeline that is allowed, which decides between
    colocating and splitting."""
    rows = []
    for stages in (1, 2, 4, 8, 16):
        for model, size in product(("llama-13b", "llama-34b"), (64, 96, 128)):
            best = search(paper_setting(model, size, space=SearchSpace(max_pipeline=stages))).best
            assert best is not None
            rows.append(
                {
                    "max_pipeline": stages,
                    "model": model,
                    "devices": size,
                    "placement": named(best),
                    "step_s": best.step_s,
                }
            )
    return rows


def draw(directory: Path, throughput: list[dict[str, Any]]) -> None:
    """The pictures of docs/mapping.md."""
    from benchmarks.mapping.pictures import draw_scaling, draw_search_times
    from hybridflow.mapping.answer.timeline import draw_timelines

    searching = Search(paper_setting("llama-34b", 128))
    best = searching.run().best
    together = searching.best_of(COLOCATED)
    apart = searching.best_of(APART)
    assert best is not None and together is not None and apart is not None
    solutions = {"chosen": best, "all colocated": together, "all apart": apart}
    mappings = {
        name: mapping_of(searching.setting, solution) for name, solution in solutions.items()
    }
    draw_timelines(mappings, directory / "mapping_timeline.png")
    draw_scaling(throughput, directory / "mapping_scaling.png")
    seconds = {size: _search_s(model, size) for model, size in PAPER_SEARCHES}
    draw_search_times(seconds, directory / "mapping_search.png")


PAPER_SEARCHES = (
    ("llama-7b", 8),
    ("llama-7b", 16),
    ("llama-13b", 24),
    ("llama-13b", 32),
    ("llama-34b", 48),
    ("llama-34b", 64),
    ("llama-70b", 96),
    ("llama-70b", 128),
)
"""The paper's figure 16 (docs/paper.md section 4)."""


def _search_s(model: str, size: int) -> float:
    started = time.process_time()
    search(paper_setting(model, size))
    return time.process_time() - started


def measured_runs() -> list[Run]:
    """Calibrates this machine and measures the runs, each in a process of its own."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with tempfile.TemporaryDirectory() as directory:
        calibration, runs = f"{directory}/calibration", f"{directory}/runs.json"
        for command in (
            ["recipes.calibrate", f"output={calibration}"],
            ["benchmarks.mapping.measured", calibration, runs],
        ):
            subprocess.run([sys.executable, "-m", *command], env=environment, check=True)
        return load_runs(Path(runs))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path)
    parser.add_argument(
        "--measured",
        type=Path,
        help="what benchmarks.mapping.measured wrote, in place of measuring",
    )
    parser.add_argument("--computed", action="store_true", help="measure nothing")
    parser.add_argument("--pictures", type=Path, help="also draw the pictures into this folder")
    arguments = parser.parse_args()
    seconds = search_seconds()
    scaling, throughput = scaling_rows()
    rows = [
        *smallest_rows(),
        *placement_rows(),
        *mixed_rows(),
        *generation_rows(),
        *transition_rows(),
        *scaling,
    ]
    runs: list[Run] = []
    if arguments.measured:
        runs = load_runs(arguments.measured)
    elif not arguments.computed:
        runs = measured_runs()
    comparisons: list[Comparison] = []
    for run in runs:
        comparisons += compare(run)
    cells = [(row.finding, row.paper, row.ours, ("no", "yes")[row.agrees]) for row in rows]
    print(table(("finding", "paper", "ours", "same"), cells))
    print("\n" + "\n".join(f"{row.finding}: {row.why}" for row in rows if not row.agrees))
    print(f"\n{sum(row.agrees for row in rows)} of {len(rows)} agree")
    for run in runs:
        print(f"\n{run.configuration}\n{side_by_side(run)}")
    if runs:
        close, order = within(comparisons, 0.3), order_agrees(runs)
        print(f"\nall predictions within 30 %: {close}; placements in the measured order: {order}")
    print(f"search: 128 devices {seconds['128']:.2f} s, 1,024 devices {seconds['1024']:.2f} s")
    if arguments.pictures:
        draw(arguments.pictures, throughput)
    if arguments.json:
        content = {
            "search_seconds": seconds,
            "paper": [asdict(row) for row in rows],
            "prediction": [asdict(row) for row in comparisons],
            "placement_order_agrees": order_agrees(runs) if runs else None,
            "throughput": throughput,
            "sensitivity": sensitivity(),
        }
        arguments.json.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
