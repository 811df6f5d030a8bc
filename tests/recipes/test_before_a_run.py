"""What ends before a run starts: dry runs, graphs, the command with a mistake, and where a
resumed run begins."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from hybridflow.checkpoint import CheckpointStore
from recipes.config import RunConfig
from recipes.main import recipe
from recipes.run import run
from recipes.session import start_step
from recipes.unread import check_unread

pytestmark = pytest.mark.usefixtures("nothing_starts")
ROOT = Path(__file__).parents[2]


def test_a_dry_run_says_what_would_run_where(
    settings: Callable[..., RunConfig], capsys: pytest.CaptureFixture[str]
) -> None:
    assert (
        run(
            settings(
                "ppo", "dry_run=true", "num_devices=4", "actor.train.tp=2", "actor.generation.tp=4"
            )
        )
        is None
    )
    out = capsys.readouterr().out
    assert "ppo: 7 calls a step" in out
    assert (
        "actor      pool main (4 devices): train dp2 x tp2, generation tp4" in out
        and "critic     pool main (4 devices): train dp4" in out
    )


def test_a_dry_run_of_what_the_mapper_does_not_plan_says_so(
    settings: Callable[..., RunConfig], capsys: pytest.CaptureFixture[str]
) -> None:
    run(settings("sft", "dry_run=true", "data.response_column=answer"))
    assert capsys.readouterr().out.splitlines()[-1] == (
        "seconds and memory: not predicted; the mapper plans training steps that answer prompts, "
        "not sft"
    )


def test_the_graph_needs_no_model_and_no_data(
    settings: Callable[..., RunConfig], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(settings("ppo", "graph=true", "model.path=/no/such", "data.train=/no/such")) is None
    assert capsys.readouterr().out.startswith("flowchart LR")


def test_metrics_go_on_at_the_step_of_the_checkpoint(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, keep_last=9)
    assert start_step("auto", store) == -1
    for step in (2, 4):
        (store.begin(step) / "weights").touch()
        store.commit(step, {})
    assert [
        start_step(resume, store) for resume in ("auto", "never", str(tmp_path / "step-00000002"))
    ] == [
        4,
        -1,
        2,
    ]


def test_the_command_in_this_process(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["recipes.ppo", "nonsense.setting=1"])
    with pytest.raises(SystemExit) as exit:
        recipe("ppo")()
    assert exit.value.code == 2
    assert capsys.readouterr().err == (
        "error: nonsense.setting=1: there is no setting 'nonsense.setting'; --settings lists "
        "them all\n"
    )


def test_the_command_for_real(required: list[str], tmp_path: Path) -> None:
    """One message on stderr, no stack, status 2, nothing left behind."""
    arguments = [*required, "reward.function=no.such:f", f"output_dir={tmp_path}/run"]
    command = [sys.executable, "-m", "recipes.grpo", *arguments]
    finished = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=400)
    errors = [line for line in finished.stderr.splitlines() if line.startswith("error: ")]
    assert finished.returncode == 2 and "Traceback" not in finished.stderr, finished.stderr
    assert len(errors) == 1 and errors[0].startswith(
        "error: reward.function='no.such:f': module 'no.such' can't be imported"
    )
    assert not (tmp_path / "run").exists()


COSINE = "actor.train.optimizer.schedule=cosine"
UNREAD: dict[str, tuple[str, list[str], list[str], str]] = {
    "look ahead of nothing": (
        "grpo",
        ["asynchrony.look_ahead=0.5"],
        ["asynchrony.staleness=1"],
        "asynchrony.look_ahead is 0.5, which nothing reads with asynchrony.staleness=0; set "
        "asynchrony.staleness=1, or leave it out",
    ),
    "rows in flight of nothing": (
        "grpo",
        ["asynchrony.in_flight=keep"],
        ["asynchrony.staleness=1"],
        "asynchrony.in_flight is 'keep', which nothing reads with asynchrony.staleness=0",
    ),
    "a reward that is never measured": (
        "grpo",
        ["loop.stop_at_reward=0.5"],
        ["data.validation=held-out.jsonl"],
        "loop.stop_at_reward is 0.5, which nothing reads without data.validation",
    ),
    "validations of no data": (
        "sft",
        ["loop.validate_every=2"],
        ["data.validation=held-out.jsonl"],
        "loop.validate_every is 2, which nothing reads without data.validation",
    ),
    "draws of a greedy validation": (
        "grpo",
        ["data.validation=held-out.jsonl", "loop.validation_sampling.top_p=0.5"],
        ["loop.validation_sampling.greedy=false"],
        "loop.validation_sampling.top_p is 0.5, which nothing reads with "
        "loop.validation_sampling.greedy=true; set loop.validation_sampling.greedy=false",
    ),
    "draws of a greedy evaluation": (
        "evaluate",
        ["actor.generation.sampling.temperature=0.5"],
        ["actor.generation.sampling.greedy=false"],
        "actor.generation.sampling.temperature is 0.5, which nothing reads with "
        "actor.generation.sampling.greedy=true",
    ),
    "another length in validation": (
        "grpo",
        ["data.validation=held-out.jsonl", "loop.validation_sampling.max_response_tokens=4"],
        ["actor.generation.sampling.max_response_tokens=4"],
        "loop.validation_sampling.max_response_tokens is 4, which nothing reads beside that of",
    ),
    "the end of no schedule": (
        "grpo",
        ["actor.train.optimizer.total_steps=9"],
        [COSINE],
        "actor.train.optimizer.total_steps is 9, which nothing reads with "
        "actor.train.optimizer.schedule=constant",
    ),
    "a setting of another engine": (
        "ppo",
        ["critic.train.zero_stage=3"],
        ["critic.train.engine=deepspeed"],
        "critic.train.zero_stage is 3, which nothing reads with critic.train.engine=fsdp; set "
        "critic.train.engine=deepspeed",
    ),
    "a layout of a function": (
        "grpo",
        ["reward.train.tp=2"],
        ["reward.function=null", "reward.model.path=${model.path}"],
        "reward.train.tp is 2, which nothing reads with reward.function; set reward.model.path",
    ),
    "a judge that does not write": (
        "generative_reward",
        ["judge.generation.max_num_seqs=2"],
        ["judge.verdict=written"],
        "judge.generation.max_num_seqs is 2, which nothing reads with judge.verdict=probability",
    ),
    "prompts that are not answered": (
        "generate",
        ["data.validation=held-out.jsonl"],
        ["data.validation=null", "data.train=held-out.jsonl"],
        "data.validation is 'held-out.jsonl', which nothing reads in generate, which answers data.train",
    ),
    "samples of what nothing generates": (
        "dpo",
        ["algorithm.samples_per_prompt=4"],
        ["algorithm=grpo"],
        "algorithm.samples_per_prompt is 4, which nothing reads in dpo, which generates nothing",
    ),
    "a plan that nobody asks for": (
        "grpo",
        ["plan.split_generation=true"],
        ["placement=auto"],
        "plan.split_generation is True, which nothing reads with placement=colocated",
    ),
    "a constant that divides nothing": (
        "ppo",
        ["critic.loss.aggregation_constant=9"],
        ["critic.loss.aggregation=constant"],
        "critic.loss.aggregation_constant is 9, which nothing reads with "
        "critic.loss.aggregation=token_mean",
    ),
}
"""(recipe, a setting without a reader, settings that give it one, the message)"""


@pytest.mark.parametrize("case", UNREAD)
def test_a_setting_that_nothing_reads_is_refused(
    case: str, settings: Callable[..., RunConfig]
) -> None:
    recipe, unread, readers, message = UNREAD[case]
    with pytest.raises(ValueError, match=re.escape(message)):
        check_unread(settings(recipe, *unread))
    check_unread(settings(recipe, *unread, *readers))


def test_a_dry_run_tells_of_what_would_change_speed_alone(
    settings: Callable[..., RunConfig], caplog: pytest.LogCaptureFixture
) -> None:
    hf = ["actor.generation.engine=hf", "actor.generation.block_size=16"]
    with pytest.raises(ValueError, match=r"asynchrony\.look_ahead is 0\.5, which nothing reads"):
        run(
            settings(
                "grpo", "dry_run=true", "asynchrony.slice_steps=4", "asynchrony.look_ahead=0.5", *hf
            )
        )
    run(settings("grpo", "dry_run=true", "asynchrony.slice_steps=4", *hf))
    told = [line for line in caplog.messages if "nothing reads" in line]
    assert told == [
        "asynchrony.slice_steps is 4, which nothing reads with asynchrony.staleness=0; set "
        "asynchrony.staleness=1, or leave it out",
        "actor.generation.block_size is 16, which nothing reads with actor.generation.engine=hf; set "
        "actor.generation.engine=vllm, or leave it out",
    ]
