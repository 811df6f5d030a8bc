"""Recovery's control plane in virtual time: seeds, faults, and the rules that must hold.

    python -m benchmarks.simulate --seeds 10000 [--first 0] [--json FILE]

The simulation itself is in tests/recovery/simulation; this runs it for many seeds. A seed that
breaks a rule is printed with the fewest of its faults that still break it.
"""
