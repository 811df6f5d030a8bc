"""Predictions for a run whose responses are drawn ahead, against the run's own scheduling in virtual
time and against sums by hand."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from benchmarks.asynchronous import virtual
from hybridflow.mapping.answer.auto import mapping_of
from hybridflow.mapping.question.cluster import Cluster
from hybridflow.mapping.question.layouts import GenerationLayout
from hybridflow.mapping.question.workload import Asynchrony, Lengths, Workload
from hybridflow.mapping.question.zoo import model_spec
from hybridflow.mapping.search.search import search
from hybridflow.mapping.search.setting import GENERATION, Setting, split_generation
from hybridflow.mapping.simulate.ahead import continuous_profile
from hybridflow.mapping.simulate.generation import generation_time
from hybridflow.mapping.simulate.schedule import Schedule
from recipes.dataflows import PAPER

TAIL = Lengths.parse("lognormal:1000:8192:1.0")


@pytest.mark.parametrize(
    ("staleness", "look_ahead"),
    [
        (1, 1.0),
        pytest.param(2, 1.0, marks=pytest.mark.slow),
        pytest.param(1, 0.0, marks=pytest.mark.slow),
    ],
)
def test_the_generator_takes_as_long_as_in_virtual_time(staleness: int, look_ahead: float) -> None:
    """The table of docs/asynchronous.md comes from the scheduling of a run (Window); the mapper's
    own scheduling gives its seconds within 15 %, where training takes no time."""
    draws = np.random.default_rng(0).lognormal(-0.5, 1, 20_000)
    lengths = (virtual.MEAN_TOKENS * np.minimum(6, draws)).astype(int).tolist()
    workload = Workload(
        batch_size=virtual.BATCH,
        samples_per_prompt=virtual.SAMPLES,
        prompt=Lengths.fixed(0),
        response=Lengths.observed(lengths),
        asynchrony=Asynchrony(staleness=staleness, look_ahead=look_ahead),
    )
    predicted = 0.0
    for part in continuous_profile(workload, virtual.REPLICAS, max_running=1024):
        predicted += part.steps * (virtual.FIXED_S + virtual.ROW_S * part.running)
    measured = virtual.measure(staleness, look_ahead, False, 0.0)["step_s"]
    assert predicted == pytest.approx(measured, rel=0.15)


def test_every_token_is_decoded_once() -> None:
    """In the steady state a step decodes as many tokens as a step takes, on average: 2 % of the
    draw's spread remains."""
    workload = Workload(
        batch_size=64,
        samples_per_prompt=4,
        prompt=Lengths.fixed(8),
        response=Lengths.fixed(100),
        asynchrony=Asynchrony(staleness=1),
    )
    for most in (8, 64, 1024):
        profile = continuous_profile(workload, replicas=2, max_running=most)
        tokens = sum(part.steps * part.running for part in profile)
        assert tokens == pytest.approx(64 * 4 * 100 / 2, rel=0.02)
        assert max(part.running for part in profile) <= most


def split_setting(asynchrony: Asynchrony | None) -> Setting:
    dataflow = split_generation(PAPER["grpo"])
    models = dict.fromkeys(dataflow.roles, model_spec("qwen2.5-7b"))
    return Setting(
        dataflow=dataflow,
        models={**models, "reward": None},
        cluster=Cluster.parse("2x8xH100-80GB"),
        workload=Workload(
            batch_size=128,
            samples_per_prompt=8,
            prompt=Lengths.fixed(256),
            response=TAIL,
            asynchrony=asynchrony,
        ),
        weights_from={GENERATION: "actor"},
    )


def test_a_step_is_the_longer_of_the_two_pools() -> None:
    """Two pools side by side, by hand: generation 10 s, and 3 + 4 s of the others."""
    dataflow = split_generation(PAPER["grpo"])
    names = [call.name for call in dataflow.calls]
    seconds = []
    for name in names:
        seconds.append(
            {"generation.generate_sequences": 10.0, "actor.update_actor": 4.0}.get(name, 0.0)
        )
    seconds[names.index("reference.compute_ref_log_prob")] = 3.0
    pool_of = {"actor": "a", "reference": "a", "reward": "a", GENERATION: "b"}
    ahead = Schedule(dataflow, pool_of, {}, "generation.generate_sequences")
    assert Schedule(dataflow, pool_of, {}).makespan(seconds) == 17.0
    assert ahead.makespan(seconds) == 10.0
    shared = Schedule(dataflow, {**pool_of, "reference": "b"}, {}, "generation.generate_sequences")
    assert shared.makespan(seconds) == 13.0, "the reference's seconds are the generator's too"
    several = shared.makespans([np.array([value, 2 * value]) for value in seconds])
    assert several.tolist() == [13.0, 26.0]
    assert ahead.critical_path(seconds) == ("generation.generate_sequences",)


def test_the_search_gives_an_asynchronous_run_its_two_pools() -> None:
    """With one step ahead the fastest mapping has two pools, whose seconds are about equal, and is
    faster than the fastest synchronous one."""
    synchronous, asynchronous = split_setting(None), split_setting(Asynchrony(staleness=1))
    best, before = search(asynchronous).best, search(synchronous).best
    assert best is not None and before is not None
    mapping = mapping_of(asynchronous, best)
    assert mapping.role("actor").pool != mapping.role(GENERATION).pool
    busy = {}
    for pool in mapping.pools:
        busy[pool.name] = sum(call.seconds for call in mapping.calls_in(pool.name))
    assert mapping.step_s == pytest.approx(max(busy.values()), rel=0.02)
    assert min(busy.values()) > 0.6 * max(busy.values()), "devices are where the work is"
    assert best.step_s < 0.8 * before.step_s


def test_new_weights_cost_what_is_read_again() -> None:
    """in_flight=recompute reads the tokens of the responses that are being drawn once a step; keep
    does not, and drain waits for the longest response as a synchronous step does."""
    layout = GenerationLayout(tg=1, replicas=8, max_running=256)
    seconds = {}
    for name, asynchrony in {
        "recompute": Asynchrony(staleness=1),
        "keep": Asynchrony(staleness=1, rereads=False),
        "drain": Asynchrony(staleness=1, drains=True),
    }.items():
        setting = split_setting(asynchrony)
        model = setting.model("actor")
        seconds[name] = generation_time(model, layout, setting.machine(0), ahead=True)
    synchronous = split_setting(None)
    waits = generation_time(synchronous.model("actor"), layout, synchronous.machine(0))
    assert seconds["drain"] == waits
    assert seconds["keep"] == replace(seconds["recompute"], reread=0.0)
    assert 0 < seconds["recompute"].reread < seconds["recompute"].decode < waits.decode
