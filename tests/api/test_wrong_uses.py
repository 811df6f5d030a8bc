"""Wrong uses of the Python API: each ends in one line that names what was passed and what to do, and
leaves nothing open."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from hybridflow import (
    DP,
    ActorConfig,
    ActorWorker,
    Batch,
    FunctionRewardWorker,
    LocalPool,
    ModelConfig,
    Ragged,
    RankContext,
    Session,
    Worker,
    current_session,
    dry_run,
    load_tokenizer,
    open_session,
    remote,
    spawn,
)
from recipes.path_settings import make_directory
from tests.tiny import by_length, tiny_grpo
from workers.role_config import ScorerConfig

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> dict[str, object]:
    directory = tmp_path_factory.mktemp("wrong")
    return tiny_grpo(directory) | {"output_dir": directory / "run"}


@pytest.fixture(scope="module")
def session(tiny: dict[str, object]) -> Iterator[Session]:
    with open_session("grpo", tiny, reward=by_length) as session:
        yield session


class Scorer:
    """Callable once it is an object."""

    def __call__(self, *, response: str, **columns: object) -> float:
        return float(len(response))


def generator(**columns: object) -> Iterator[float]:
    yield 1.0


BEFORE_A_MODEL: dict[str, tuple[dict[str, Any], str]] = {
    "no recipe": ({"recipe": None}, r'^recipe is None; give a recipe\'s name, such as "grpo"'),
    "no settings": ({"settings": None}, r'^settings are None; give \{"name": value\}'),
    "a number for a name": ({"settings": {1: 2}}, "^settings: the name 1 is an int, not text"),
    "a pair": ({"settings": [("seed", 1)]}, r"\('seed', 1\) is not name=value"),
    "bytes": ({"settings": {"model.path": b"/m"}}, "model.path is a bytes; give text"),
    "a set": ({"settings": {"data.train": {"a"}}}, "data.train is a set; give text"),
    "a number for a reward": (
        {"reward": 3},
        "^reward.function=3 is an int, not a function; give one",
    ),
    "a class for a reward": ({"reward": Scorer}, ":Scorer' is a class; give an instance of it"),
    "a reward of lists": (
        {"reward": lambda prompts, responses: [0.0]},
        r"takes no prompt, response, finish_reason; let it end in \*\*columns$",
    ),
    "a cost that nothing reads": (
        {"cost": by_length},
        r"^cost=tests.tiny:by_length: nothing reads it, grpo has no cost \(its models: actor, .*; "
        "leave it out$",
    ),
    "gold without rows to measure": (
        {"gold": by_length},
        "^gold=tests.tiny:by_length: nothing reads it, .* set data.validation, or leave it out$",
    ),
    "a reward for a recipe without one": (
        {"recipe": "sft", "settings": {"model.path": "m", "data.train": "d.jsonl"}},
        r"^reward=tests.tiny:by_length: nothing reads it, sft has no reward \(its models: policy\)",
    ),
    "an environment that is none": ({"environment": 3}, "is an int; name an async function of"),
    "no path": ({"settings": {"model.path": "/no/such/model"}}, "; there is no such directory$"),
}


@pytest.mark.parametrize("case", BEFORE_A_MODEL)
def test_a_wrong_argument_ends_before_a_model_is_loaded(case: str, tiny: dict[str, object]) -> None:
    arguments, message = BEFORE_A_MODEL[case]
    chosen: dict[str, Any] = {"recipe": "grpo", "reward": by_length, "settings": {}} | arguments
    if isinstance(chosen["settings"], dict):
        settings = tiny if chosen["recipe"] == "grpo" else {}
        chosen["settings"] = settings | chosen["settings"]
    with pytest.raises(ValueError, match=message) as error:
        dry_run(**chosen)
    assert "\n" not in str(error.value)


def test_numbers_of_numpy_are_numbers(tiny: dict[str, object]) -> None:
    sizes = {"data.batch_size": np.int64(2), "actor.train.optimizer.learning_rate": np.float32(0.5)}
    assert dry_run("grpo", tiny | sizes, reward=by_length).startswith("grpo: 4 calls a step")


REWARDS: dict[str, tuple[Callable[..., Any], str]] = {
    "None": (lambda **columns: None, "returned reward=None on prompt .* return finite numbers"),
    "text": (lambda **columns: "good", "returned reward='good' on prompt"),
    "not a number": (lambda **columns: float("nan"), "returned reward=nan on prompt"),
    "a list": (lambda **columns: [1.0, 2.0], r"returned reward=\[1.0, 2.0\] on prompt"),
    "a tensor of two": (lambda **columns: torch.ones(2), r"returned reward=tensor\(\[1., 1.\]\)"),
    "another dict": (lambda **columns: {"score": 1.0}, r"a dict without 'reward' \(\['score'\]\)"),
    "a generator": (generator, "returned reward=<generator object"),
}


@pytest.mark.parametrize("case", REWARDS)
def test_what_a_reward_returns_is_checked_with_the_row(case: str, tiny: dict[str, Any]) -> None:
    function, message = REWARDS[case]
    policy = ModelConfig(path=str(tiny["model.path"]))
    worker = FunctionRewardWorker(ScorerConfig(function=function, policy=policy), RankContext())
    batch = Batch.of(
        prompt_ids=Ragged.of([[5]]), response_ids=Ragged.of([[6, 7]]), finish_reason=["stop"]
    )
    with pytest.raises(ValueError, match=message):
        worker.compute_reward(batch)


SESSION: dict[str, tuple[Callable[[Session], object], str]] = {
    "a cell run again": (
        lambda session: open_session("grpo", session_settings(session), reward=by_length),
        r"is open in this process; close it first: session.close\(\), or "
        r"hybridflow.current_session\(\).close\(\)$",
    ),
    "text for a batch": (
        lambda session: session.actor.generate_sequences("hello"),  # type: ignore[arg-type]
        "^actor.generate_sequences takes a Batch with the columns prompt_ids, uid; it was called "
        "with str$",
    ),
    "rows as of a list": (
        lambda session: next(session.prompts)[:2],  # type: ignore[index]
        r"slice\(None, 2, None\) is no column's name; batch.rows\(\[0, 1\]\) takes rows",
    ),
    "no rows": (
        lambda session: session.step(next(session.prompts).rows([])),
        "^session.step: the batch of prompts has no rows$",
    ),
    "a step on rows without prompts": (
        lambda session: session.step(Batch.of(uid=torch.arange(3))),
        r"^actor.generate_sequences reads \['prompt_ids'\], which the batch lacks; it has uid$",
    ),
    "a reward before a response": (
        lambda session: session.reward.compute_reward(next(session.prompts)),
        r"^reward.compute_reward reads \['response_ids', 'finish_reason'\], which the batch lacks",
    ),
    "an update before advantages": (
        lambda session: session.actor.update_actor(answered(session)),
        r"^actor.update_actor reads \['advantages'\], which the batch lacks",
    ),
    "a prompt without tokens": (
        lambda session: session.actor.generate_sequences(
            Batch.of(prompt_ids=Ragged.of([[5], []]), uid=torch.arange(2), extras=[{}] * 2)
        ),
        "row 1",
    ),
    "a directory that can't be": (
        lambda session: session.save("/proc/x/y"),
        "^session.save: /proc/x/y can't be made or used .*; name another directory$",
    ),
    "no directory": (
        lambda session: session.save(""),
        "^session.save: '' names no directory; give one$",
    ),
    "None for a directory": (
        lambda session: session.save(None),  # type: ignore[arg-type]
        "^session.save: None names no directory; give one$",
    ),
    "validation without rows": (lambda session: session.validate(), "data.validation is not set"),
}


def session_settings(session: Session) -> dict[str, object]:
    return {
        "runtime": "local",
        "model.path": session.config.model.path,
        "data.train": session.config.data.train,
        "actor.generation.engine": "hf",
        "actor.generation.sampling.max_response_tokens": 5,
    }


def answered(session: Session) -> Batch:
    prompts = next(session.prompts)
    return prompts | session.actor.generate_sequences(prompts)


@pytest.mark.parametrize("case", SESSION)
def test_a_wrong_call_of_a_session_is_one_line(case: str, session: Session) -> None:
    """And the session goes on: the same session serves every case."""
    use, message = SESSION[case]
    with pytest.raises(ValueError, match=message) as error:
        use(session)
    assert "\n" not in str(error.value)
    assert current_session() is session


def test_a_directory_that_cannot_be_written_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the tests run as root, nothing is read-only to them; the answer of the system is."""
    monkeypatch.setattr("os.access", lambda path, mode: False)
    with pytest.raises(ValueError, match=r"^output_dir: .* \(it can't be written to\)"):
        make_directory(tmp_path, "output_dir")


class Short(Worker):
    """A worker whose methods return what they must not."""

    @remote(DP, reads=("uid",), writes=("rewards",))
    def fewer(self, batch: Batch) -> Batch:
        return Batch.of(rewards=torch.zeros(1))

    @remote(DP, reads=("uid",), writes=("rewards",))
    def nothing(self, batch: Batch) -> Batch:
        return None  # type: ignore[return-value]

    @remote(DP, reads=("uid",), writes=("rewards",))
    def other(self, batch: Batch) -> Batch:
        return Batch.of(rewardz=torch.zeros(len(batch)))

    def undeclared(self) -> None:
        """Without @remote."""


class Silent(Worker):
    """A worker without a declared method."""

    def speak(self) -> None:
        """Without @remote."""


def test_wrong_uses_of_pools_and_workers() -> None:
    rows = Batch.of(uid=torch.arange(3))
    with LocalPool() as pool:
        short = spawn(Short, pool, None, role="short")
        with pytest.raises(ValueError, match=r"^short.fewer got 3 rows and returned 1; it must"):
            short.fewer(rows)
        with pytest.raises(ValueError, match=r"^short.nothing declares .* but returned NoneType"):
            short.nothing(rows)
        with pytest.raises(ValueError, match=r"'rewardz' is not declared; .* Did you mean rewards"):
            short.other(rows)
        with pytest.raises(
            ValueError, match=r"'main' has a role 'short' already; give this one another name"
        ):
            spawn(Short, pool, None, role="short")
        with pytest.raises(AttributeError, match="it has none; mark its methods with @remote"):
            spawn(Silent, pool, None, role="silent").speak()
        for config, passed in (
            (ModelConfig(), "ModelConfig"),
            (None, "NoneType"),
            (ActorConfig, "the class ActorConfig"),
        ):
            with pytest.raises(
                ValueError, match=f"takes settings of class ActorConfig, not {passed}"
            ):
                spawn(ActorWorker, pool, config, role="actor")  # type: ignore[misc]
        with pytest.raises(
            ValueError, match=r"model\.path is not set; give a Hugging Face directory"
        ):
            spawn(ActorWorker, pool, ActorConfig(), role="actor")
        pool.clear()
        spawn(Short, pool, None, role="short")
    with pytest.raises(ValueError, match="is no pool; give the one of `with LocalPool"):
        spawn(Short, LocalPool, None, role="short")  # type: ignore[arg-type]


def test_wrong_columns_are_named() -> None:
    with pytest.raises(ValueError, match=r"'rewards' .* give a tensor, .* not str"):
        Batch.of(rewards="good")
    with pytest.raises(ValueError, match=r"'rewards' .*: 3.0 has no rows; give one value for each"):
        Batch.of(rewards=3.0)
    with pytest.raises(ValueError, match=r"'finish_reason' .*: give a list, not str"):
        Batch.of(finish_reason="stop")
    with pytest.raises(ValueError, match=r"repeat\(0\); give 1 or more"):
        Batch.of(uid=torch.arange(3)).repeat(0)
    with pytest.raises(ValueError, match=r"split\(0\); give 1 or more parts"):
        Batch.of(uid=torch.arange(3)).split(0)
    assert Ragged.of([[5], []]).values.dtype is torch.int64
    with pytest.raises(ValueError, match=r"model\.path is not set"):
        load_tokenizer(ModelConfig())
