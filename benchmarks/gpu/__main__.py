"""The first hour on a GPU: speeds, memory and log-prob gaps that no rehearsal can know (docs/gpu.md).

    python -m benchmarks.gpu --json FILE --minutes 9        # on a GPU; again, until nothing is left
    python -m benchmarks.gpu --device cpu --steps 1         # the same code on a CPU, tiny

With torch, transformers, hydra-core and pyarrow alone it trains models of full width (training.py) and
runs runtime=local with engines fsdp and threed and the hf generator; DeepSpeed and vLLM take part
where they are installed for the device. The first line says which packages are missing, and what it
runs without them. A case that fails is a row with its error, and the next one starts. With --minutes
no case starts that could not end in time, and a later call with the same FILE goes on from there.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from benchmarks.gpu.installed import check_needed


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, default=None, help="write the rows here too")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--minutes", type=float, default=0.0, help="0: as long as it takes")
    parser.add_argument("--only", default="", help="only cases whose name has this text")
    arguments = parser.parse_args()
    if arguments.steps < 1 or arguments.minutes < 0:
        parser.error("--steps must be at least 1, and --minutes at least 0")
    check_needed()
    # It imports what check_needed looks for.
    from benchmarks.gpu.runs import run_all

    run_all(
        arguments.device,
        arguments.steps,
        arguments.only,
        arguments.json,
        60 * arguments.minutes or float("inf"),
    )


if __name__ == "__main__":
    main()
