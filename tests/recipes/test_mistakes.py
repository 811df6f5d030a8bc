"""Wrong settings end before anything starts, in one message with field, value and fix."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from hydra.errors import HydraException
from omegaconf import DictConfig
from transformers import AutoConfig

from controllers import ALGORITHMS, AlgorithmEntry
from hybridflow.checkpoint import CheckpointStore
from recipes.config import RunConfig
from recipes.main import check_names, recipe, to_settings, unused_settings
from recipes.run import run
from recipes.session import start_step
from workers.config import ModelConfig
from workers.engines.base import Head
from workers.engines.model.loading import UNLIMITED, position_limit

pytestmark = pytest.mark.usefixtures("nothing_starts")
ROOT = Path(__file__).parents[2]

BF16 = [f"{role}.train.precision=bf16" for role in ("actor", "critic", "reference")]
POOLS = ["placement=custom", "pools.a.roles=[actor,critic]"]
JUDGED = [
    "algorithm=generative_reward",
    "judge.model.path=${model.path}",
    "judge.verdict=written",
    "judge.generation.sampling.max_response_tokens=8",
]
MISTAKES: dict[str, tuple[list[str], str]] = {
    "two processes in one": (
        ["runtime=local", "num_devices=2"],
        "num_devices=2 with runtime=local, .* use runtime=ray",
    ),
    "no devices": (["num_devices=0"], "num_devices is 0; use at least 1"),
    "custom without pools": (
        ["placement=custom"],
        "placement=custom needs pools, for example pools.policy.num_devices=2",
    ),
    "pools without custom": (
        ["pools.a.roles=[actor]"],
        r"pools \(a\) are set with placement=colocated; set placement=custom",
    ),
    "devices and pools": (
        [*POOLS, "pools.b.roles=[reference,reward]", "num_devices=4"],
        "num_devices=4 with placement=custom",
    ),
    "an empty pool": (
        [*POOLS, "pools.b.roles=[reference,reward]", "pools.b.num_devices=0"],
        "pools.b.num_devices is 0",
    ),
    "a role in two pools": (
        [*POOLS, "pools.b.roles=[actor,reference,reward]"],
        r"exactly one pool; .* \{'actor': \['a', 'b'\]\}",
    ),
    "a role in no pool": ([*POOLS, "pools.b.roles=[reward]"], r"\{'reference': \[\]\}"),
    "an unknown role": (
        [*POOLS, "pools.b.roles=[reference,reward,judge]"],
        r"unknown roles \['judge'\]",
    ),
    "nothing to place": (
        ["placement=auto", "runtime=local"],
        "one process: there is nothing to place",
    ),
    "pools with auto": (
        ["placement=auto", "pools.a.roles=[actor]"],
        r"pools \(a\) are set with placement=auto",
    ),
    "engines that differ": (
        ["placement=auto", "critic.train.engine=threed", *BF16],
        "one training engine and precision for all roles: actor fsdp bf16, critic threed bf16",
    ),
    "no mapping": (
        ["placement=auto", "plan.mapping=/no/such.json"],
        "plan.mapping is '/no/such.json', which is no file",
    ),
    "no cluster": (
        ["placement=auto", "plan.cluster=8xB1000"],
        "unknown device kind 'B1000'; known: A100-80GB",
    ),
    "kinds that nothing tells apart": (
        ["placement=auto", "device=cuda", "plan.cluster=8xA100-80GB+8xA100-40GB"],
        "accelerator_type:A100.* does not tell the kinds of .* apart",
    ),
    "a kind that is not there": (
        [
            "placement=auto",
            "device=cuda",
            "plan.cluster=8xH100-80GB+8xA100-40GB",
            "plan.node_resources=[B200:big]",
        ],
        r"\['B200'\], which are no kinds of",
    ),
    "no resource": (
        [
            "placement=auto",
            "device=cuda",
            "plan.cluster=8xH100-80GB+8xA100-40GB",
            "plan.node_resources=[big]",
        ],
        r"\['big'\]; each is KIND:RESOURCE",
    ),
    "CPUs beside GPUs": (
        ["placement=auto", "device=cuda", "plan.cluster=8xH100-80GB+2xcpu"],
        "all GPUs or all CPU processes",
    ),
    "tp does not divide the devices": (
        ["num_devices=4", "actor.train.tp=3"],
        r"actor.train: pp=1 x tp=3 .* one of \[1, 2, 4\]",
    ),
    "generation does not divide": (
        ["num_devices=4", "actor.generation.tp=3"],
        r"actor.generation: pp=1 x tp=3 .* one of \[1, 2, 4\]",
    ),
    "tp does not divide the heads": (
        ["num_devices=8", "critic.train.tp=8"],
        "critic: tp=8 does not fit qwen2: .* fit: 1, 2, 4",
    ),
    "generation's heads": (
        ["num_devices=8", "actor.generation.tp=8"],
        r"actor: generation.tp is 8, .* 4 attention heads; use one of \[1, 2, 4\]",
    ),
    "fsdp has no pipeline": (
        ["num_devices=2", "actor.train.pp=2"],
        "actor: train.pp is 2, but engine fsdp has no pipeline",
    ),
    "deepspeed has no tensors": (
        ["num_devices=2", "critic.train.engine=deepspeed", "critic.train.tp=2"],
        (
            "critic: train.tp is 2, but engine deepspeed is data parallel only; set tp=1 or "
            "engine=threed"
        ),
    ),
    "no such stage": (
        ["actor.train.engine=deepspeed", "actor.train.zero_stage=4"],
        "actor: train.zero_stage is 4; use 1 ",
    ),
    "more stages than layers": (
        ["num_devices=4", "actor.train.engine=threed", "actor.train.pp=4"],
        "actor: pp=4 .* but the model has 2 layers; on 4 devices fit: ",
    ),
    "axes": (
        ["actor.train.rank_order=[dp,tp]"],
        r"actor.train.rank_order is \['dp', 'tp'\]; it must name each of dp, pp, cp, tp",
    ),
    "a mask over a packed row": (
        ["model.attention=eager"],
        r"model.attention is 'eager', .* or actor.train.packing=false",
    ),
    "no engine": (
        ["critic.train.engine=megatron"],
        "critic.train.engine is 'megatron'; known: fsdp, threed, deepspeed",
    ),
    "no generation engine": (
        ["actor.generation.engine=sglang"],
        "actor.generation.engine is 'sglang'; known: vllm, hf",
    ),
    "hf in parallel": (
        ["num_devices=2", "actor.generation.engine=hf", "actor.generation.tp=2"],
        "actor.generation: tp=2 pp=1, but engine hf has no parallelism",
    ),
    "no algorithm": (["algorithm.name=sarsa"], "algorithm.name is 'sarsa'; known: ppo, safe_rlhf"),
    "no loss": (["actor.loss.name=hinge"], "actor.loss.name is 'hinge'; known: ppo_clip, "),
    "a loss without its column": (
        ["actor.loss.name=clip_cov"],
        "covariance_selected, and ppo does not write it; run python -m recipes.clip",
    ),
    "another loss": (
        ["algorithm=gspo"],
        (
            "actor.loss.name is 'ppo_clip', but gspo is trained with gspo; set "
            "actor.loss.name=gspo, or run"
        ),
    ),
    "a bound that nothing reads": (
        ["actor.loss.dual_clip=3", "actor.loss.name=gspo"],
        "actor.loss.dual_clip is 3.0, which nothing reads",
    ),
    "a clip that nothing reads": (
        ["actor.loss.clip_high=0.3", "actor.loss.name=policy_gradient"],
        "actor.loss.clip_high is 0.3, which nothing reads; set actor.loss.name to one of "
        "ppo_clip, gspo, cispo, clip_cov, or leave it out",
    ),
    "text's weight without text": (
        ["actor.loss.pretraining_coefficient=2"],
        "actor.loss.pretraining_coefficient is 2.0, which nothing reads; set data.pretraining",
    ),
    "more mini-batches than rows": (
        ["algorithm.num_mini_batches=9", "data.batch_size=4"],
        (
            r"algorithm.num_mini_batches is 9, but a step has 4 rows \(data.batch_size x "
            r"algorithm.samples_per_prompt\); lower it"
        ),
    ),
    "a bound below 1": (
        ["actor.loss.dual_clip=0.5"],
        "actor.loss.dual_clip is 0.5; it bounds the ratio from above, so choose more than 1",
    ),
    "a clip beyond 1": (
        ["actor.loss.clip_low=2"],
        "actor.loss.clip_low is 2.0; the ratio is clipped to 1 - clip_low, so choose 0",
    ),
    "a constant without its aggregation": (
        ["actor.loss.aggregation_constant=9"],
        "aggregation_constant is 9, which nothing reads; set act",
    ),
    "an aggregation without its constant": (
        ["actor.loss.aggregation=constant"],
        "actor.loss.aggregation_constant is 0; aggregation 'const",
    ),
    "a correction's bound without one": (
        ["actor.loss.rollout_correction.max_ratio=3"],
        "actor.loss.rollout_correction.max_ratio is 3.0, which nothing reads; set "
        "actor.loss.rollout_correction.correction=truncate",
    ),
    "bounds that miss 1": (
        ["actor.loss.rollout_correction.max_ratio=0.9"],
        "actor.loss.rollout_correction: .* must enclose 1",
    ),
    "a KL without a reference": (
        ["algorithm=dapo", "actor.loss.kl_coefficient=0.1"],
        "kl_coefficient is 0.1, but dapo has no reference",
    ),
    "critic warm-up without a critic": (
        ["algorithm=grpo", "actor.critic_warmup_steps=3"],
        "critic_warmup_steps is 3, but grpo has no crit",
    ),
    "a negative warm-up": (
        ["actor.critic_warmup_steps=-1"],
        "actor.critic_warmup_steps is -1; use 0 or more",
    ),
    "text that nobody trains on": (
        ["data.pretraining=x.parquet"],
        "data.pretraining is 'x.parquet', but ppo trains on no text; .* safe_rlhf",
    ),
    "a group of one": (
        ["algorithm=grpo", "algorithm.samples_per_prompt=1"],
        "algorithm.samples_per_prompt is 1; use at least 2: grpo",
    ),
    "k over the group": (
        ["algorithm=pass_at_k", "algorithm.k=9"],
        r"algorithm.k is 9; choose 1 to algorithm.samples_per_prompt \(8\)",
    ),
    "a target without a coefficient": (
        ["algorithm.kl.target=6", "algorithm.kl.coefficient=0"],
        "algorithm.kl.target is 6.0, but algorithm.kl.coefficient is 0 and would stay 0",
    ),
    "a discount over 1": (["algorithm.lam=1.5"], "algorithm.lam is 1.5; choose 0 to 1"),
    "an overlong buffer without a limit": (
        ["algorithm=dapo", "algorithm.overlong_buffer_tokens=4"],
        r"algorithm.overlong_buffer_tokens is 4; choose 1 to algorithm.max_response_tokens \(0\)",
    ),
    "two ways to generate in one process": (
        [*JUDGED, "num_devices=2", "judge.generation.tp=2"],
        r"judge.generation: judge \(tp2\) and actor \(dp2\) generate in pool main, in groups of "
        r"other ranks; set tp and pp of judge.generation to those of actor.generation, or give "
        r"judge a pool",
    ),
    "a judge's heads": (
        [
            *JUDGED,
            "placement=custom",
            "pools.a.roles=[actor,reference]",
            "pools.b.roles=[judge]",
            "pools.b.num_devices=8",
            "judge.generation.tp=8",
        ],
        r"judge: generation.tp is 8, .* 4 attention heads; use one of \[1, 2, 4\]",
    ),
    "a judge asked for what is not there": (
        [*JUDGED, "judge.template='{prompt} {response} {hint}'"],
        "judge.template asks for hint, and a row has prompt, response, answer; correct the "
        "template, or data.answer_column",
    ),
    "a judge that writes, placed by the mapper": (
        [*JUDGED, "placement=auto", "num_devices=2"],
        (
            r"the mapper plans steps that answer prompts, not a judge that writes "
            r"\(judge.verdict=written\); use colocated or custom"
        ),
    ),
    "two engines that fill a GPU": (
        [*JUDGED, "device=cuda"],
        "pool main: actor.generation.gpu_memory_fraction=0.5, "
        "judge.generation.gpu_memory_fraction=0.5 take all memory of a GPU; lower",
    ),
    "a judge that is put to sleep": (
        [*JUDGED, "judge.generation.release_during_training=true"],
        "judge.generation.release_during_training is true, which nothing reads",
    ),
    "no cost": (
        ["algorithm=safe_rlhf", "cost.function=null"],
        "cost: neither function nor model is set; set cost.function=package",
    ),
    "no micro-batch": (
        ["actor.train.micro_batch_tokens=-1"],
        "actor.train.micro_batch_tokens is -1; use at least 1, or 0, which chooses",
    ),
    "a schedule without end": (
        ["actor.train.optimizer.schedule=cosine", "actor.train.optimizer.warmup_steps=100"],
        r"actor.train.optimizer.total_steps is 100 with schedule cosine and warmup_steps 100",
    ),
    "temperature": (
        ["actor.generation.sampling.temperature=0"],
        "actor.generation.sampling.temperature=0.0: use a value over 0",
    ),
    "responses longer than the model": (
        ["actor.generation.sampling.max_response_tokens=256"],
        (
            "max_response_tokens is 256, which leaves no room for a prompt in 256 tokens .the "
            "limit of the model"
        ),
    ),
    "prompts longer than the engine": (
        ["actor.generation.max_model_len=9", "actor.generation.sampling.max_response_tokens=8"],
        (
            r"data.train: its longest prompt has \d+ tokens, and beside .*=8 there is room for 1 "
            r"in 9 tokens .actor.generation.max_model_len"
        ),
    ),
    "no pass over the batch": (["actor.num_epochs=0"], "actor.num_epochs is 0; use at least 1"),
    "steps and epochs": (
        ["loop.num_steps=5", "loop.num_epochs=2"],
        "loop.num_steps is 5 and loop.num_epochs is 2; set one of them, and the other to null",
    ),
    "no epoch": (["loop.num_epochs=0"], "loop.num_epochs is 0; use at least 1"),
    "no checkpoint": (
        ["loop.resume=/no/such"],
        "loop.resume is '/no/such', which is no checkpoint",
    ),
    "reward twice": (
        ["reward.model.path=x"],
        "reward: both function='tests.recipes.rewards:plain' and a model are set; choose one",
    ),
    "no reward": (
        ["reward.function=null"],
        "neither function nor model is set; set reward.function=package.module:name or",
    ),
    "a language model for a reward model": (
        ["reward.function=null", "reward.model.path=${model.path}"],
        "reward: model.path is '.*': a language model without a score head, .* train one from it "
        "with python -m recipes.reward_model",
    ),
    "a negative learning rate": (
        ["critic.train.optimizer.learning_rate=-1"],
        "critic.train.optimizer.learning_rate is -1.0; use 0 or more",
    ),
    "an output that is a file": (
        [f"output_dir={__file__}"],
        r"output_dir is '.*', but .*test_mistakes.py is a file; choose another",
    ),
    "a file for a module": (
        ["reward.function=./my/rewards.py:f"],
        "names a file; name the module: my.rewards:f",
    ),
    "a module that is broken": (
        ["reward.function=tests.recipes.broken_rewards:f"],
        r"can't be imported \(NameError: name 'undefined' is not",
    ),
    "a reward that asks for what is not there": (
        ["reward.function=tests.recipes.rewards:of_a_hint"],
        (
            r"does not fit the data \(missing a required argument: 'hint'\): it is called by "
            r"keyword with prompt, response,"
        ),
    ),
    "no such module": (
        ["reward.function=no.such:f"],
        "reward.function='no.such:f': module 'no.such' can't be imported",
    ),
    "no **columns": (
        ["reward.function=tests.recipes.rewards:no_columns"],
        r"takes no finish_reason; let it end in \*\*columns",
    ),
    "no model": (
        ["model.path=/no/such"],
        "actor: model.path is '/no/such': neither a directory with a Hugging Face config.json",
    ),
    "no data": (["data.train=/no/such.parquet"], "there is no such file"),
    "no tokens": (["data.batch_size=0"], "data.batch_size is 0; use at least 1"),
    "a wrong column": (
        ["data.prompt_column=question"],
        "no column 'question', it has 'prompt', 'answer'; set data.prompt_column",
    ),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_told_with_field_value_and_fix(
    name: str, settings: Callable[..., RunConfig]
) -> None:
    """No dry run: what is not found before the start would start here, and fail the fixture's
    check."""
    arguments, message = MISTAKES[name]
    with pytest.raises(ValueError, match=message):
        run(settings("ppo", *arguments))


def test_a_model_of_another_vocabulary_is_found_before_the_start(
    settings: Callable[..., RunConfig], tmp_path: Path
) -> None:
    """Its tokens mean something else by the same numbers: it would score noise."""
    config = settings("distillation")
    shutil.copytree(config.model.path, tmp_path / "other")
    file = tmp_path / "other" / "tokenizer.json"
    words = json.loads(file.read_text())
    vocabulary = words["model"]["vocab"]
    vocabulary["5"], vocabulary["6"] = vocabulary["6"], vocabulary["5"]
    file.write_text(json.dumps(words))
    with pytest.raises(
        ValueError,
        match=(
            r"teacher.model.path is '.*other', of another vocabulary than .*: '[56]' is token "
            r"[56] there and token [56] here"
        ),
    ):
        run(settings("distillation", f"teacher.model.path={tmp_path}/other"))


def test_a_model_with_less_room_than_the_policys_is_found_before_the_start(
    settings: Callable[..., RunConfig], tmp_path: Path
) -> None:
    shutil.copytree(settings("distillation").model.path, tmp_path / "other")
    file = tmp_path / "other" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"max_position_embeddings": 12}))
    message = (
        r"teacher.model.path is '.*other', whose limit is 12 tokens; the longest prompt of "
        r"data.train has \d+ beside .*_tokens=8; lower"
    )
    with pytest.raises(ValueError, match=message):
        run(settings("distillation", f"teacher.model.path={tmp_path}/other"))


def test_rows_longer_than_the_model_are_found_before_the_start(
    settings: Callable[..., RunConfig], tmp_path: Path
) -> None:
    row = {"prompt": "3 " * 200, "response": "4 " * 100, "chosen": "4 " * 100, "rejected": "4"}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n")
    for recipe_name in ("sft", "dpo", "reward_model"):
        with pytest.raises(
            ValueError,
            match=(
                r"data.train: its longest row has 301 tokens, and the model's limit is 256; set "
                r"data.max_tokens=256"
            ),
        ):
            run(settings(recipe_name, f"data.train={tmp_path}/rows.jsonl"))


def test_evaluation_asks_for_the_data_that_it_is_named_after(
    composed: Callable[..., DictConfig],
) -> None:
    with pytest.raises(ValueError, match=r"^not set: data\.validation; give each as name=value$"):
        to_settings(composed("evaluate", ["model.path=x"]))


def test_settings_of_a_model_that_the_recipe_has_not_are_told(
    settings: Callable[..., RunConfig],
) -> None:
    arguments = ["actor.train.tp=1", "policy.train.tp=1", "seed=1", "critic.seed=3"]
    told = list(unused_settings(arguments, settings("sft")))
    assert told == [
        f"{name}: nothing reads it, sft has no {name.partition('.')[0]} (its models: policy)"
        for name in (arguments[0], arguments[3])
    ]
    assert (
        list(unused_settings(["actor.generation.tp=1", "reward.function=x"], settings("evaluate")))
        == []
    )


def test_everything_mandatory_that_is_missing_is_named_at_once(
    composed: Callable[..., DictConfig],
) -> None:
    with pytest.raises(
        ValueError, match=r"^not set: data\.train, model\.path; give each as name=value$"
    ):
        to_settings(composed("ppo", []))


@pytest.mark.parametrize(
    ("argument", "advice"),
    [
        ("actor.train.learning_rate=1e-5", "did you mean actor.train.optimizer.learning_rate"),
        ("num_device=2", "did you mean num_devices"),
        ("loop.epochs=2", "did you mean loop.num_epochs"),
        ("algorithm.lambda=0.9", "did you mean algorithm.lam"),
        ("xyzzy=1", "--settings lists them all"),
    ],
)
def test_an_unknown_setting_is_answered_with_the_nearest(argument: str, advice: str) -> None:
    with pytest.raises(
        ValueError,
        match=f"^{argument}: there is no setting '{argument.partition('=')[0]}'; {advice}",
    ):
        check_names(["seed=1", argument])


def test_what_is_a_setting_passes() -> None:
    check_names(
        [
            "--cfg",
            "job",
            "algorithm=grpo",
            "hydra.verbose=true",
            "data.chat_template_options.x=1",
            "model.path=a=b",
            "-m",
        ]
    )


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("num_devices=two", "Value 'two' of type 'str' could not be converted to Integer"),
        ("runtime=lokal", "Invalid value 'lokal', expected one of .*ray, local"),
        ("actor.train.precision=fp16", "Invalid value 'fp16', expected one of .*fp32, bf16"),
        ("pools.a.size=2", "Key 'size' not in 'PoolConfig'"),
    ],
)
def test_a_value_of_the_wrong_type_is_told(
    argument: str, message: str, composed: Callable[..., DictConfig]
) -> None:
    """Hydra prints the cause below its own line."""
    with pytest.raises(HydraException) as caught:
        composed("ppo", [argument])
    with pytest.raises(Exception, match=message):
        assert caught.value.__cause__ is not None
        raise caught.value.__cause__


class Forgetful:
    """An algorithm whose step reads a column that nobody writes."""

    def __init__(self, *, actor, critic, reference, reward, config) -> None:
        self.actor, self.critic, self.config = actor, critic, config

    def step(self, prompts):
        batch = prompts | self.actor.generate_sequences(prompts)
        return self.critic.update_critic(batch)


def test_a_step_that_cannot_work_ends_before_its_models_are_loaded(
    settings: Callable[..., RunConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = AlgorithmEntry(__name__, "Forgetful", "PPOConfig", ALGORITHMS["ppo"].roles)
    config = settings("ppo", "model.path=/is/not/even/looked/at")
    monkeypatch.setitem(ALGORITHMS, "ppo", broken)
    with pytest.raises(
        ValueError, match=r"critic\.update_critic reads returns, which no earlier call wrote"
    ):
        run(config)


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


def test_the_graph_needs_no_model_and_no_data(
    settings: Callable[..., RunConfig], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(settings("ppo", "graph=true", "model.path=/no/such", "data.train=/no/such")) is None
    assert capsys.readouterr().out.startswith("flowchart LR")


def test_metrics_go_on_at_the_step_of_the_checkpoint(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, keep_last=9)
    assert start_step("auto", store) == 0
    for step in (2, 4):
        (store.begin(step) / "weights").touch()
        store.commit(step, {})
    assert [
        start_step(resume, store) for resume in ("auto", "never", str(tmp_path / "step-00000002"))
    ] == [
        4,
        0,
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
    finished = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    errors = [line for line in finished.stderr.splitlines() if line.startswith("error: ")]
    assert finished.returncode == 2 and "Traceback" not in finished.stderr, finished.stderr
    assert len(errors) == 1 and errors[0].startswith(
        "error: reward.function='no.such:f': module 'no.such' can't be imported"
    )
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("model_type", "limit"), [("gpt2", 77), ("bloom", UNLIMITED)])
def test_the_longest_row_of_a_model_is_read_under_its_own_name(
    model_type: str, limit: int, tmp_path: Path
) -> None:
    """gpt2 calls it n_positions; bloom, with ALiBi, has none."""
    sizes = {"n_positions": 77} if model_type == "gpt2" else {}
    AutoConfig.for_model(model_type, **sizes).save_pretrained(tmp_path)
    assert position_limit(ModelConfig(path=str(tmp_path)), Head.lm) == limit
