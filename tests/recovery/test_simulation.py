"""hybridflow.recovery.machine under thousands of faults in virtual time (FAULTS C6, D)."""

from __future__ import annotations

from dataclasses import fields

import pytest

from hybridflow.recovery.actions import Exit
from tests.recovery.simulation.bugs import Bugs
from tests.recovery.simulation.faults import Fault, What, draw
from tests.recovery.simulation.simulation import shrunk, simulate

NUM_SEEDS = 1000
OLD_FAILURES: dict[str, tuple[int, tuple[Fault, ...]]] = {
    "a rank dies while the last step is exported, before its flush began": (
        180,
        (Fault(What.kill_rank, 21.7, 16, 1.0),),
    ),
    "the last snapshot is damaged in memory before it is on disk": (
        187,
        (Fault(What.flip_in_memory, 34.27, 10, 1.0),),
    ),
    "a node takes the last snapshot with it": (55, (Fault(What.lose_node_for_good, 25.97, 39, 1),)),
    "the power fails after a commit: its ledger lines must be on disk": (
        41,
        (Fault(What.power_cut, 29.48, 50, 1.0),),
    ),
    "the power fails soon after the first commit": (49, (Fault(What.power_cut, 14.91, 52, 1.0),)),
    "a line of the ledger comes back with a wrong bit": (
        2006,
        (Fault(What.power_cut, 24.66, 103, 20.9),),
    ),
    "a death between a new directory and the sync of its name": (
        3821,
        (Fault(What.kill_at_file_operation, 15.23, 12, 1), Fault(What.power_cut, 16.4, 22, 1)),
    ),
    "the only commit is with a node that leaves during its restore": (
        3936,
        (
            Fault(What.kill_controller, 7.16, 30, 1),
            Fault(What.kill_controller, 17.51, 83, 1),
            Fault(What.lose_node_for_good, 24.63, 81, 1),
        ),
    ),
    "ranks die twice while the only commit is restored": (
        5833,
        (
            Fault(What.raise_in_rank, 14.08, 40, 1),
            Fault(What.lose_node, 20.41, 18, 10),
            Fault(What.kill_at_file_operation, 29.42, 17, 1),
        ),
    ),
}
"""Faults that broke a rule once, in runs without exports."""
OLD_FAILURES_OF_EXPORTS: dict[str, tuple[int, tuple[Fault, ...]]] = {
    "a notice between the last commit and its answer: a second one would be without the model": (
        7583,
        (Fault(What.drain, 38.57, 32, 16.4),),
    ),
    "the same, on other pools": (2583, (Fault(What.drain, 27.86, 62, 18.5),)),
    "a notice while a full disk refuses the last export: the next controller writes it": (
        1952,
        (Fault(What.disk_full, 15.97, 91, 19.7), Fault(What.drain, 29.74, 17, 17.8)),
    ),
    "a notice while the last export is written again: half of it is no model": (
        3816,
        (Fault(What.disk_full, 16.37, 1, 9.1), Fault(What.drain, 26.2, 103, 24.8)),
    ),
    "a notice before the ledger is rewound: its lines must be on disk with the commit": (
        17465,
        (
            Fault(What.power_cut, 13.04, 103, 11.6),
            Fault(What.second_controller, 37.03, 30, 6.9),
            Fault(What.drain, 41.54, 97, 18.7),
            Fault(What.power_cut, 47.97, 25, 13.3),
        ),
    ),
    "the restored last step is damaged in memory: it is staged again, with its rows": (
        3042,
        (
            Fault(What.disk_full, 28.76, 1, 57.3),
            Fault(What.kill_rank, 32.21, 53, 1),
            Fault(What.flip_in_memory, 39.36, 81, 15.6),
        ),
    ),
    "the same, with two steps": (
        6386,
        (
            Fault(What.disk_full, 19.14, 1, 38.7),
            Fault(What.kill_rank, 24.03, 72, 1),
            Fault(What.flip_in_memory, 33.87, 27, 3.3),
        ),
    ),
}
"""Faults that broke a rule once, in runs with exports."""


def test_no_fault_is_no_recovery() -> None:
    for seed in range(20):
        outcome = simulate(seed, faults=())
        assert (outcome.broken, outcome.attempts, len(outcome.restores)) == ((), 1, 1), outcome


@pytest.mark.parametrize("what", OLD_FAILURES)
def test_old_failures(what: str) -> None:
    seed, faults = OLD_FAILURES[what]
    outcome = simulate(seed, faults=faults, exports=False)
    assert not outcome.broken, outcome


@pytest.mark.parametrize("what", OLD_FAILURES_OF_EXPORTS)
def test_old_failures_of_exports(what: str) -> None:
    """Each run ends with its last step on disk, with the model, and in the ledger."""
    seed, faults = OLD_FAILURES_OF_EXPORTS[what]
    outcome = simulate(seed, faults=faults)
    assert not outcome.broken and outcome.status == Exit.done, outcome


def test_a_thousand_seeds() -> None:
    """Fixed seeds, so that a failure of today is one of tomorrow; benchmarks.simulate takes more
    and others."""
    restores = 0
    for seed in range(NUM_SEEDS):
        outcome = simulate(seed)
        if outcome.broken:
            pytest.fail(str(shrunk(outcome)))
        restores += len(outcome.restores)
    assert restores > 1.5 * NUM_SEEDS  # the faults hit something


@pytest.mark.parametrize("name", [field.name for field in fields(Bugs)])
def test_planted_bugs_are_found(name: str) -> None:
    """Each mistake breaks a rule within 300 seeds, and with few of the seed's faults."""
    bugs = Bugs(**{name: True})
    for seed in range(300):
        outcome = simulate(seed, bugs=bugs)
        if outcome.broken:
            fewest = shrunk(outcome, bugs)
            assert 0 < len(fewest.faults) <= 3 and fewest.broken, fewest
            assert not simulate(seed, faults=fewest.faults).broken
            return
    pytest.fail(f"{name} was not found")


def test_the_same_seed_is_the_same_run() -> None:
    for seed in range(30):
        assert simulate(seed) == simulate(seed)
        assert draw(seed) == draw(seed)
