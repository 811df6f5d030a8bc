"""Wrong settings end before anything starts, in one message with field, value and fix."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from controllers import ALGORITHMS, AlgorithmEntry
from controllers.ppo import PPOConfig  # noqa: F401  the config of Forgetful, by its name
from recipes.config import RunConfig
from recipes.run import run

pytestmark = pytest.mark.usefixtures("nothing_starts")


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
    "the algorithm of another recipe": (
        ["algorithm=grpo", "algorithm.name=ppo"],
        r"algorithm.name is 'ppo', but the settings are those of another recipe's algorithm "
        r"\(GRPOConfig\); run python -m recipes.ppo",
    ),
    "no devices": (["num_devices=0"], "num_devices is 0; use at least 1"),
    "custom without pools": (
        ["placement=custom"],
        "placement=custom needs pools, for example pools.policy.num_devices=2",
    ),
    "custom without pools in one process": (
        ["placement=custom", "runtime=local"],
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
        "exactly one pool; actor is in a and b$",
    ),
    "a role in no pool": (
        [*POOLS, "pools.b.roles=[reward]"],
        "exactly one pool; reference is in none$",
    ),
    "an unknown role": (
        [*POOLS, "pools.b.roles=[reference,reward,judge]"],
        r"\(actor, critic, reference, reward\) .* one pool; judge is none of them$",
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
    "CPUs for GPUs": (
        ["placement=auto", "device=cuda", "plan.cluster=8xcpu"],
        "plan.cluster is 4x2xcpu with device=cuda: .* set device=cpu$",
    ),
    "tp does not divide the critic's devices": (
        ["num_devices=4", "critic.train.tp=3"],
        r"^critic\.train: pp=1 x tp=3 .* one of \[1, 2, 4\]",
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
            "critic: train.tp is 2, but engine deepspeed is data parallel only; set tp=1, or "
            "engine to one with pipeline stages: threed"
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
    "a file elsewhere": (
        ["reward.function=/srv/my/rewards.py:f"],
        "names a file; put /srv/my on PYTHONPATH and name the module: rewards:f",
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
    "attention that nobody knows": (
        ["model.attention=foo"],
        "actor: model.attention is 'foo', which transformers does not have for a .*; use auto",
    ),
    "a token that the model can't draw": (
        ["actor.generation.sampling.stop_token_ids=[999999]"],
        r"actor: generation.sampling.stop_token_ids has 999999, and the model's tokens are 0 to \d+;",
    ),
    "an end that the model can't draw": (
        ["model.end_token_ids=[-1]"],
        "actor: model.end_token_ids has -1, and the model's tokens are 0 to",
    ),
    "a stop of validation that the model can't draw": (
        ["data.validation=${data.train}", "loop.validation_sampling.stop_token_ids=[999999]"],
        "^loop.validation_sampling.stop_token_ids has 999999",
    ),
    "draws of validation": (
        [
            "data.validation=${data.train}",
            "loop.validation_sampling.greedy=false",
            "loop.validation_sampling.temperature=-1",
        ],
        "^loop.validation_sampling.temperature=-1.0: use a value over 0",
    ),
    "Prometheus without Ray": (
        ["runtime=local", "metrics.prometheus=true"],
        "metrics.prometheus is true with runtime=local, which starts no Ray",
    ),
    "a revision of a directory": (
        ["model.revision=main"],
        "model.revision is 'main', which nothing reads with the directory",
    ),
    "a date that no template writes": (
        ["data.date=2026-11-01"],
        "data.date is '2026-11-01', which nothing reads: no chat template",
    ),
    "tools that no row has": (
        ["data.tools_column=functions"],
        "data.tools_column is 'functions', and no row of data.train has it; set it to the column of",
    ),
    "options of no template": (
        ["data.chat_template_options.enable_thinking=false"],
        "data.chat_template_options is .* which nothing reads without a chat template",
    ),
    "an actor that is never trained": (
        ["loop.num_steps=3", "actor.critic_warmup_steps=3"],
        "actor.critic_warmup_steps is 3 in a run of 3 steps, which would never train the actor",
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
