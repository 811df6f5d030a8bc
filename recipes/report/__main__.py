"""python -m recipes.report RUN: what happened in a run, as one HTML page.

RUN is the output_dir of a run, finished, killed or under way. The page needs no network and no
server: curves (steps that a failure took back in grey), failures, where the time of a step goes,
the last steps of every rank, samples, settings. It is written to RUN/report.html.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from hybridflow.whole_file import whole_file
from recipes.errors import plain_errors
from recipes.report.page import page
from recipes.report.run_record import RunRecord


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m recipes.report",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("run", type=Path, metavar="RUN", help="the output_dir of a run")
    parser.add_argument("--output", type=Path, default=None, help="default: RUN/report.html")
    arguments = parser.parse_args()
    with plain_errors():
        print(report(arguments.run, arguments.output or arguments.run / "report.html"))


def report(run: Path, output: Path) -> Path:
    """Writes the page and returns its path; a ValueError where `run` holds no run."""
    text = page(RunRecord.read(run))
    with whole_file(output) as path:
        path.write_text(text)
    return output


if __name__ == "__main__":
    main()
