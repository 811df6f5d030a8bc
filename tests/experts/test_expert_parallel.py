"""Expert parallelism on two and four gloo ranks against plain PyTorch in one process (SCALE.md 5.3
b): tokens travel to the experts, with uneven ranks and ranks without a row."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from tests.engines.threed_cases import TEMPERATURE
from tests.experts.divided import COEFFICIENT, Case, Result, batches, run
from tests.experts.engines import make_engine
from tests.experts.plain import EXPERTS, PlainStep, load_mixture, plain_steps
from tests.experts.test_routers import EXACT, compare
from tests.ranks import run_ranks
from workers.config import ModelConfig, TrainConfig
from workers.engines.base import Head
from workers.engines.fsdp.engine import FsdpEngine
from workers.engines.model.loading import model_config

RECOMPUTED = ("activation_checkpointing", True)
CASES = [
    Case(resumes_on=4),
    Case(ep=4, settings=(("tp", 2), RECOMPUTED)),
    Case(family="deepseek_v3", world=2, settings=(RECOMPUTED,)),
    Case(engine="threed", ep=4, resumes_on=2),
    Case(engine="threed", family="mixtral", settings=(("pp", 2),)),
    Case(family="ernie4_5_moe", world=2, settings=(("tp", 2),)),
]
MATRIX = [
    Case(ep=4, resumes_on=1),
    Case(settings=(("reshard_after_forward", True), RECOMPUTED)),
    Case(ep=4, settings=(("cp", 2),)),
    Case(settings=(("tp", 2),)),
    Case(family="mixtral", ep=4, settings=(("tp", 2),)),
    Case(family="olmoe", world=2),
    Case(family="gpt_oss", settings=(RECOMPUTED,)),
    Case(family="gpt_oss", ep=4),
    Case(engine="threed", family="gpt_oss", settings=(("pp", 2),)),
    Case(family="deepseek_v3", ep=4),
    Case(engine="threed", settings=(("tp", 2), RECOMPUTED)),
    Case(engine="threed", family="deepseek_v3", settings=(("pp", 2),)),
    Case(engine="threed", ep=4, family="mixtral", settings=(("cp", 2),)),
]


def spawn(root: Path, out: Path, cases: list[Case]) -> Path:
    run_ranks(run, (root, out, cases), max(case.world for case in cases))
    return out


@pytest.fixture(scope="module")
def spawned(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return spawn(root, tmp_path_factory.mktemp("divided"), CASES)


@pytest.fixture(scope="module")
def matrix(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return spawn(root, tmp_path_factory.mktemp("matrix"), MATRIX)


@pytest.fixture(scope="module")
def expected(root: Path) -> dict[str, list[PlainStep]]:
    steps = {}
    for family in {case.family for case in CASES + MATRIX}:
        steps[family] = plain_steps(load_mixture(root / family), batches(), COEFFICIENT)
    return steps


def results(out: Path, case: Case) -> list[Result]:
    paths = [out / f"{case.name}.{rank}.pt" for rank in range(case.world)]
    return [torch.load(path, weights_only=False) for path in paths]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_equals_one_process(
    spawned: Path, expected: dict[str, list[PlainStep]], case: Case
) -> None:
    """Loss, auxiliary loss, gradient norm and metrics of routers of three steps, and the weights
    after them; every rank reports the same (traps T34 and T40). A snapshot after the second is read
    with other sizes."""
    check(spawned, expected[case.family], case)


@pytest.mark.slow
@pytest.mark.parametrize("case", MATRIX, ids=lambda case: case.name)
def test_equals_one_process_with_every_layout(
    matrix: Path, expected: dict[str, list[PlainStep]], case: Case
) -> None:
    check(matrix, expected[case.family], case)


def check(out: Path, steps: list[PlainStep], case: Case) -> None:
    for result in results(out, case):
        for metrics, wanted in zip(result.metrics, steps, strict=True):
            compare(metrics, wanted)
        check_weights(result.parameters, steps[-1].parameters)
        assert result.replay_gap == 0.0
        if case.resumes_on:
            compare(result.resumed, steps[-1])
            check_weights(result.resumed_parameters, steps[-1].parameters)


def check_weights(weights: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    for name, value in wanted.items():
        assert_close(weights[name], value, rtol=0.0, atol=EXACT, msg=name)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_each_expert_is_in_one_place(spawned: Path, root: Path, case: Case) -> None:
    """A rank has experts of its own only, whole, and all ranks of the expert group have as many; over
    the group and the ranks that share them out nothing is held twice."""
    for name, shape in _stacks(root, case):
        of_ranks = [result.boxes[name] for result in results(spawned, case)]
        held: list[int] = []
        for boxes in of_ranks:
            for box in boxes:
                assert box.shape[1:] == shape[1:]
                held += range(box.start[0], box.start[0] + box.shape[0])
        assert sorted(held) == list(range(EXPERTS))


def _stacks(root: Path, case: Case) -> list[tuple[str, tuple[int, ...]]]:
    parameters = load_mixture(root / case.family).named_parameters()
    return [(name, tuple(value.shape)) for name, value in parameters if ".experts." in name]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_exports_are_read_bit_equal(spawned: Path, case: Case) -> None:
    """By transformers, under the names of files."""
    read = dict(load_mixture(spawned / f"{case.name}.hf").named_parameters())
    for name, value in results(spawned, case)[0].parameters.items():
        assert torch.equal(read[name], value), name


@pytest.mark.parametrize("case", CASES[:2], ids=lambda case: case.name)
def test_routes_are_those_of_one_process(
    spawned: Path, world: None, root: Path, case: Case
) -> None:
    batch = batches()[0]
    outputs = make_engine(root / case.family).forward(batch, temperature=TEMPERATURE, routes=True)
    assert outputs is not None
    assert outputs.routes is not None
    parts = outputs.routes.split(batch.lengths.tolist())
    for result in results(spawned, case):
        wanted = [parts[row] for row in result.rows.tolist()]
        assert torch.equal(result.routes, torch.cat([outputs.routes[:0], *wanted]))


@pytest.mark.parametrize(
    ("ep", "world_size", "settings", "message"),
    [
        (3, 6, {}, "train.ep is 3, which does not divide the 8 experts of qwen3_moe"),
        (4, 2, {}, "train.ep is 4, and the model has 2 devices, which .*; set ep to one of 1, 2"),
        (
            2,
            1,
            {},
            "train.ep is 2, and the model has 1 device, which it must divide; set ep to one of 1",
        ),
        (2, 8, {"tp": 4}, "train.ep is 2 with tp=4, which does not divide it"),
        (2, 4, {"cp": 2, "cp_by_length": True}, "train.ep is 2 with cp_by_length"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(
    root: Path, ep: int, world_size: int, settings: dict[str, int], message: str
) -> None:
    config = model_config(ModelConfig(path=str(root / "qwen3_moe")), Head.lm)
    with pytest.raises(ValueError, match=message):
        FsdpEngine.check(config, TrainConfig(ep=ep, **settings), Head.lm, world_size)
