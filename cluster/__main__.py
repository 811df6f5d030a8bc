"""Connects to Ray as a recipe would, checks every node, and prints what is there.

python -m cluster starts Ray in this process; RAY_ADDRESS=host:port names a running cluster.
"""

from __future__ import annotations

import argparse

from cluster.connect import connect


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m cluster",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.parse_args()
    with connect() as cluster:
        print(cluster.describe())


if __name__ == "__main__":
    main()
