"""What python -m benchmarks.gpu measures by itself, on a hollow GPU: every line of it runs, its numbers
mean nothing.

    python -m benchmarks.rehearsal.gpu_script DIRECTORY CASE [CASE ...]

Prints a JSON list of the machine's facts and a row for each case of benchmarks.gpu.training.
"""

from __future__ import annotations

# isort: off
from benchmarks.rehearsal.hollow import Hollow, become_gpu
# isort: on

import argparse
import json
import logging
import warnings
from dataclasses import replace
from pathlib import Path

import torch.distributed as dist
import torch.distributed._tools.fake_collectives  # noqa: F401  (registers its operators)
from torch.testing._internal.distributed.fake_pg import FakeStore

from benchmarks.gpu import runs, training


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("directory", type=Path)
    parser.add_argument("cases", nargs="+", choices=list(training.CASES))
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    become_gpu()
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=1)
    with Hollow():
        rows = [runs.machine("cuda")]
        for name in arguments.cases:
            # Its own sizes take minutes here.
            training.CASES[name] = replace(training.CASES[name], tiny=True)
            rows.append(training.measure(arguments.directory, name, "cuda"))
    print(json.dumps(rows))


if __name__ == "__main__":
    main()
