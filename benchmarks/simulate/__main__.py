"""python -m benchmarks.simulate: as the package's docstring says."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections import Counter
from pathlib import Path

from tests.recovery.simulation.faults import draw
from tests.recovery.simulation.simulation import Outcome, shrunk, simulate


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.simulate", description=__doc__)
    parser.add_argument("--seeds", type=int, default=10_000, help="how many")
    parser.add_argument("--first", type=int, default=0, help="the first seed")
    parser.add_argument("--json", type=Path, help="file for the result")
    arguments = parser.parse_args()
    started, cpu_started = time.perf_counter(), time.process_time()
    broken: list[Outcome] = []
    faults, statuses = Counter[str](), Counter[str]()
    restores = attempts = 0
    virtual_s = 0.0
    for seed in range(arguments.first, arguments.first + arguments.seeds):
        outcome = simulate(seed)
        faults.update(fault.what for fault in draw(seed).faults)
        statuses[str(outcome.status)] += 1
        restores += len(outcome.restores)
        attempts += outcome.attempts
        virtual_s += outcome.seconds
        if outcome.broken:
            broken.append(shrunk(outcome))
            print(broken[-1], flush=True)
    result = {
        "seeds": arguments.seeds,
        "broken": len(broken),
        "faults": dict(sorted(faults.items())),
        "exits": dict(sorted(statuses.items())),
        "restores": restores,
        "attempts": attempts,
        "virtual_hours": round(virtual_s / 3600, 1),
        "seconds": round(time.perf_counter() - started, 1),
        "cpu_seconds": round(time.process_time() - cpu_started, 1),
    }
    print(json.dumps(result, indent=1))
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(result, indent=1) + "\n")
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
