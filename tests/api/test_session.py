"""open_session in this process: functions passed as objects, steps, what is on disk, one
session after the other, and mistakes."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer

from hybridflow import LocalPool, PoolSpec, current_session, evaluate, open_session, run
from hybridflow.metrics import read_jsonl
from recipes.report.page import page
from recipes.report.run_record import RunRecord
from tests.tiny import make_data, make_model

ROOT = Path(__file__).parents[2]


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Settings as a dict, with a path, a bool and a number among the values."""
    directory = tmp_path_factory.mktemp("api")
    return {
        "runtime": "local",
        "model.path": make_model(directory / "a model", layers=1),
        "data.train": [make_data(directory / "prompts.jsonl", rows=8)],
        "data.batch_size": 2,
        "algorithm.samples_per_prompt": 2,
        "actor.generation.engine": "hf",
        "actor.generation.precision": "fp32",
        "actor.generation.sampling.max_response_tokens": 5,
        "actor.train.precision": "fp32",
        "actor.train.optimizer.learning_rate": 1e-3,
        "metrics.tensorboard": False,
    }


def test_a_custom_loop_with_a_closure_for_its_reward(tiny: dict[str, Any], tmp_path: Path) -> None:
    scored: list[str] = []

    def reward(*, response: str, **columns: object) -> float:
        scored.append(response)
        return float(len(response))

    settings = {**tiny, "output_dir": tmp_path / "run", "data.validation": tiny["data.train"]}
    with open_session("grpo", settings, reward=reward) as session:
        assert current_session() is session
        numbers = session.step()
        assert len(scored) == 4
        assert all(type(value) is float for value in numbers.values())
        assert numbers["seconds/step"] > numbers["seconds/actor.update_actor"] > 0
        prompts = next(session.prompts)
        batch = prompts | session.actor.generate_sequences(prompts)
        batch |= session.reward.compute_reward(batch)
        tokenizer = AutoTokenizer.from_pretrained(tiny["model.path"])
        texts = [
            tokenizer.decode(ids, skip_special_tokens=True)
            for ids in batch.ragged("response_ids").unbind()
        ]
        assert batch.tensor("rewards").tolist() == [float(len(text)) for text in texts]
        assert set(session.wait()) == {"actor.generate_sequences", "reward.compute_reward"}
        assert (
            "seconds/actor.generate_sequences" in session.step(prompts) and session.num_steps == 2
        )
        assert session.validate()["reward/mean"] > 0
        with pytest.raises(
            AttributeError, match=r"no 'critic'; the roles of this recipe are actor, reward$"
        ):
            session.critic  # noqa: B018
        with pytest.raises(
            AttributeError,
            match=r"^session: this run has no reference, which nothing asks for; set "
            r"actor\.loss\.kl_coefficient above 0$",
        ):
            session.reference  # noqa: B018
        session.save(tmp_path / "saved")
        saved = load_file(tmp_path / "saved" / "model.safetensors")
        started = load_file(tiny["model.path"] / "model.safetensors")
        assert any(not torch.equal(saved[name], started[name]) for name in started)
        session.checkpoint()
    rows = read_jsonl(tmp_path / "run" / "metrics.jsonl")
    assert [row["step"] for row in rows if row["split"] == "train"] == [1, 2]
    assert "test_a_custom_loop" in (tmp_path / "run" / "config.yaml").read_text(), (
        "the function's name"
    )
    assert current_session() is None
    with pytest.raises(ValueError, match="closed"):
        session.step()
    # The same settings go on where the checkpoint was written, with the weights that were saved.
    with open_session("grpo", settings, reward=reward) as again:
        assert again.num_steps == 2
        again.save(tmp_path / "again")
    assert all(
        torch.equal(value, saved[name])
        for name, value in load_file(tmp_path / "again" / "model.safetensors").items()
    )


def test_one_session_at_a_time_also_after_a_failed_one(
    tiny: dict[str, Any], tmp_path: Path
) -> None:
    arguments = [f"output_dir={tmp_path}", "loop.resume=never"]

    def broken(**columns: object) -> float:
        raise KeyError("no such column")

    settings = {**tiny, "output_dir": tmp_path}
    session = open_session("grpo", settings, reward=broken)
    with pytest.raises(ValueError, match=r"Session\(grpo: actor, reward\) is open in this process"):
        open_session("grpo", settings, reward=broken)
    used = session.loop.data.position
    with pytest.raises(RuntimeError, match="broken' raised KeyError"):
        session.step()
    assert session.loop.data.position == used, "its rows were given back"
    with pytest.raises(ValueError, match=r"takes a Batch of prompts .*, not a list"):
        session.step(["hello"])  # type: ignore[arg-type]
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"file is a file; name a directory"):
        session.save(tmp_path / "file")
    session.close()
    session.close()
    for use in (session.validate, session.__enter__, lambda: session.save(tmp_path / "late")):
        with pytest.raises(ValueError, match="the session is closed"):
            use()
    assert not (tmp_path / "late").exists()
    with open_session("grpo", settings, reward=lambda **columns: 1.0) as other:
        seconds = [name for name in other.step() if name.startswith("seconds/reward")]
        assert seconds == ["seconds/reward.compute_reward"]
    missing = [argument for argument in arguments if "model" in argument]
    with pytest.raises(ValueError, match=r"not set: .*model\.path"):
        open_session("grpo", missing)
    assert current_session() is None


def test_a_whole_run_and_an_evaluation(tiny: dict[str, Any], tmp_path: Path) -> None:
    settings = {
        **tiny,
        "output_dir": tmp_path / "run",
        "loop.num_steps": 2,
        "metrics.console": False,
    }
    outcome = run("grpo", settings, reward=lambda *, response, **columns: float("7" in response))
    assert outcome.num_steps == 2 and outcome.largest["actor/log_prob_gap_max"] < 1e-4
    record = RunRecord.read(tmp_path / "run")
    spans = [event["name"] for event in record.slices if event["ph"] == "X"]
    assert spans.count("actor.update_actor") == 2
    own = [name for name in spans if "." not in name and name != "snapshot"]
    assert own == ["step 1", "step 2", "checkpoint"]
    assert "python" in record.environment and "actor.update_actor" in page(record)
    asked = {
        name: value
        for name, value in tiny.items()
        if not name.startswith(("data.train", "algorithm"))
    }
    asked |= {"data.validation": tiny["data.train"], "output_dir": tmp_path / "evaluation"}
    numbers = evaluate(asked, reward="tests.recipes.rewards:plain")
    stored = json.loads((tmp_path / "evaluation" / "evaluation.json").read_text())
    assert numbers["reward/mean"] == stored["reward/mean"] and numbers["prompts"] == 8


def test_a_damaged_newest_checkpoint_takes_its_metrics_with_it(
    tiny: dict[str, Any], tmp_path: Path
) -> None:
    settings = {
        **tiny,
        "output_dir": tmp_path,
        "loop.num_steps": 2,
        "loop.checkpoint_every": 1,
        "recovery.snapshot_every": 0,
    }
    run("grpo", settings, reward="tests.recipes.rewards:plain")
    damaged = tmp_path / "checkpoints" / "step-00000002" / "actor"
    for path in damaged.rglob("*.safetensors"):
        path.write_bytes(path.read_bytes()[:-1])
    with open_session("grpo", settings, reward="tests.recipes.rewards:plain") as session:
        assert session.num_steps == 1
    rows = read_jsonl(tmp_path / "metrics.jsonl")
    assert [row["step"] for row in rows] == [1]
    lost = [row for path in (tmp_path / "lost").iterdir() for row in read_jsonl(path)]
    assert [row["step"] for row in lost] == [2]


@pytest.mark.parametrize(
    ("recipe", "settings", "message"),
    [
        ("grop", {}, "there is no recipe 'grop'"),
        ("grpo", {"actor.trian.tp": 1}, r"there is no setting 'actor\.trian\.tp'; did you mean"),
        ("grpo", ["seed"], "'seed' is not name=value"),
        ("grpo", "seed=1", r"give a list, \[\"seed=1\"\]"),
        ("grpo", {"seed": "one"}, "seed"),
        ("grpo", {"seed": object()}, "seed is an object; give text, a number"),
        ("grpo", {"dry_run": True}, r"call hybridflow\.dry_run"),
    ],
)
def test_mistakes_are_value_errors(
    recipe: str, settings: Any, message: str, tiny: dict[str, Any], nothing_is_open: None
) -> None:
    if isinstance(settings, dict):
        settings = {**tiny, **settings}
    with pytest.raises(ValueError, match=message):
        run(recipe, settings, reward=lambda **columns: 0.0)


@pytest.fixture
def nothing_is_open() -> Iterator[None]:
    yield
    assert current_session() is None


def test_a_closed_pool_says_so() -> None:
    pool = LocalPool(PoolSpec())
    pool.close()
    with pytest.raises(RuntimeError, match="'main' was stopped: closed"):
        pool.submit("actor", "step", [], [], 0)


def test_importing_the_package_loads_neither_torch_nor_ray() -> None:
    code = (
        "import sys, hybridflow, hybridflow.mapping.search.search; "
        "print(*sorted({'torch', 'ray', 'transformers', 'hydra'} & set(sys.modules)))"
    )
    found = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert found.stdout.strip() == ""
