"""Moving weights from training to generation: our plans against gathering everything, on 8 gloo
processes of this machine.

python -m benchmarks.reshard --json FILE

Each row is one pair of layouts, timed in turns in the same processes: our plan (the grouping with
the fewest bytes); the golden executor, in which every rank gathers the full model as DeepSpeed-Chat
and FSDP trainers do; HybridFlow-V's way, a gather inside the training model-parallel group under
its grouping. All three work in buckets of the same size, cast before they send, and are attested
once. Beside them the paper's prediction (its table 2) for our received bytes. Then the whole sync
in the actor, with its real engines, in one pool and across two (actor.py), and how long the plan of
a 70B model on 512 ranks takes to compile. Ratios count; seconds depend on the machine.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch.multiprocessing as mp

from benchmarks.reshard import actor, transfers
from hybridflow.layout import Layout
from hybridflow.resharding import compile, verify
from hybridflow.resharding.analytic import decoder_rules, generation, threed
from hybridflow.resharding.grouping import zero_redundancy


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, help="write the rows here")
    parser.add_argument(
        "--repeats", type=int, default=5, help="measurements of each number; medians are reported"
    )
    parser.add_argument("--only", help="a single training layout, such as 1-4-2 or fsdp-8")
    parser.add_argument("--bucket-mb", type=int, default=16)
    parser.add_argument("--dtype", default="bfloat16", help="of the generation weights")
    parser.add_argument(
        "--source-dtype", help="of the training weights; the cast is then part of the transfer"
    )
    arguments = parser.parse_args()
    known = sorted({source for source, _, _ in transfers.CASES})
    if arguments.only not in (None, *known):
        parser.error(f"--only is {arguments.only!r}; known: {', '.join(known)}")
    os.environ["OMP_NUM_THREADS"] = "1"
    with tempfile.TemporaryDirectory() as directory:
        mp.spawn(transfers.worker, (directory, arguments), nprocs=transfers.NUM_RANKS)
        rows = json.loads((Path(directory) / "rows.json").read_text())
        print(table(rows), flush=True)
        synchronisations = actor.run(Path(directory))
    compile_s = seconds_to_compile_70b()
    print(
        actor.table(synchronisations),
        f"70B, 8-8-8 to tg 8: compiled and verified in {compile_s:.1f} processor seconds",
        sep="\n\n",
    )
    for aim, misses in aims(rows, compile_s).items():
        print(f"{aim}: {'yes' if not misses else 'no, ' + ', '.join(misses)}")
    if arguments.json:
        arguments.json.write_text(
            json.dumps(
                {"rows": rows, "actor": synchronisations, "compile_70b_s": compile_s}, indent=1
            )
        )


def seconds_to_compile_70b() -> float:
    """Llama 70B, training 8-8-8 on 64 machines of 8 to generation tg = 8: processor seconds."""
    rules = decoder_rules(
        num_layers=80, hidden=8192, intermediate=28672, num_heads=64, num_kv_heads=8, vocab=32000
    )
    layout = Layout.of(pp=8, tp=8, dp=8)
    source, target = threed(rules, layout), generation(rules, zero_redundancy(layout, tp=8))
    start = time.process_time()
    verify(
        compile(
            source, target, bucket_bytes=256 << 20, nodes=[rank // 8 for rank in range(layout.size)]
        )
    )
    return time.process_time() - start


def aims(rows: list[dict[str, Any]], compile_s: float) -> dict[str, list[str]]:
    """What the plans are meant to reach, and the rows that miss it."""

    def missing(reached: Callable[[dict[str, Any]], bool]) -> list[str]:
        return [f"{row['source']} to {row['target']}" for row in rows if not reached(row)]

    return {
        "received bytes equal the bound": missing(
            lambda row: (
                (row["received_max"], row["received_total"])
                == (row["bound_max"], row["bound_total"])
            )
        ),
        "never slower than the other two": missing(
            lambda row: row["seconds"] <= min(row["seconds_golden"], row["seconds_vanilla"])
        ),
        "2x faster than gathering all where the bound is under half": missing(
            lambda row: (
                2 * row["bound_max"] >= row["model_bytes"]
                or 2 * row["seconds"] <= row["seconds_golden"]
            )
        ),
        "extra memory under two buckets": missing(
            lambda row: row["extra_peak_bytes"] < 2 * row["bucket_bytes"]
        ),
        "70B in under 20 s": [] if compile_s < 20 else [f"{compile_s:.1f} s"],
    }


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown."""
    lines = [
        "| training | generation pg-tg | received at most, MB | bound | paper | extra, MB | "
        "seconds | gather all | V | attest |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        paper = (
            f"{row['paper_received_max'] / 1e6:.1f}"
            if row["paper_received_max"] is not None
            else "-"
        )
        lines.append(
            f"| {row['source']} | {row['target']} | {row['received_max'] / 1e6:.1f} | "
            f"{row['bound_max'] / 1e6:.1f} | {paper} | {row['extra_peak_bytes'] / 1e6:.1f} | "
            f"{row['seconds']:.3f} | {row['seconds_golden']:.3f} | {row['seconds_vanilla']:.3f} | "
            f"{row['seconds_attest']:.3f} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
