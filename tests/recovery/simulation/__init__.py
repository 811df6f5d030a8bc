"""The control plane of recovery, run in virtual time against every kind of fault.

    crash_files.py   files that forget, tear, or flip what was not synced when the power fails
    cluster.py       nodes, pools, ranks, and the weights, whose every update is a hash of the last
    calls.py         what a controller knows, and its calls, one small wait at a time
    commits.py       snapshots in memory, the ledger, exports and commits on disk
    controller.py    the driver that carries out the machine's actions
    bugs.py          mistakes to plant
    faults.py        a seed's faults, and the search for the fewest that still break something
    simulation.py    simulate(seed) -> Outcome, with the rules that no fault may break

Real: hybridflow/recovery (machine, budget, attempts) and the commits, pruning, and reading of
hybridflow/checkpoint.py. Modelled: the driver of controllers/recovery.py, the pools, the snapshots
in memory, and the supervisor.
"""
