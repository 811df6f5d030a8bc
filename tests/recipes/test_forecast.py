"""dry_run and placement=auto: what a run would take on a cluster that is not there, and a
mapping that becomes settings."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from hybridflow.mapping.answer.device_mapping import DeviceMapping
from hybridflow.mapping.question.cluster import DEVICE_KINDS, Cluster, NodeGroup
from recipes.auto import choose, saved_mapping
from recipes.config import PlacementMode, RunConfig
from recipes.forecast import MAPPING
from recipes.mapping_settings import MapperInputs, apply_mapping, configured_mapping, setting_of
from recipes.placing import place
from recipes.preparation import check_dataflow, prepare
from recipes.run import run

pytestmark = pytest.mark.usefixtures("nothing_starts")
Settings = Callable[..., RunConfig]

LLAMA_70B = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "num_hidden_layers": 80,
    "hidden_size": 8192,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "intermediate_size": 28672,
    "vocab_size": 32000,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": False,
}


@pytest.fixture(scope="module")
def large(required: list[str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[str]]:
    """Llama 70B's configuration with the tiny model's tokenizer: all that a dry run reads."""
    directory = tmp_path_factory.mktemp("large")
    shutil.copytree(
        next(text for text in required if text.startswith("model.path=")).partition("=")[2],
        directory,
        dirs_exist_ok=True,
    )
    (directory / "config.json").write_text(json.dumps(LLAMA_70B))
    for weights in directory.glob("*.safetensors"):
        weights.unlink()
    threed = [f"{role}.train.engine=threed" for role in ("actor", "critic", "reference")]
    yield [
        f"model.path={directory}",
        *threed,
        "data.batch_size=1024",
        "actor.generation.sampling.max_response_tokens=1024",
        "algorithm.num_mini_batches=8",
    ]


def plan_of(config: RunConfig, prompts: object) -> MapperInputs:
    placement = place(config)
    return MapperInputs(
        config=config,
        dataflow=check_dataflow(placement),
        roles={role.name: role.config for role in placement.roles},
        prompts=prompts,
    )


def prompts_of(config: RunConfig) -> object:
    from controllers.data import PromptDataset, load_tokenizer

    return PromptDataset.load(config.data, config.data.train, load_tokenizer(config.model))


def test_a_thousand_devices_that_are_not_there(
    settings: Settings,
    large: list[str],
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level("INFO")
    started = time.process_time()
    config = settings(
        "ppo",
        *large,
        "device=cuda",
        "dry_run=true",
        "placement=auto",
        "plan.cluster=128x8xH100-80GB",
    )
    assert run(config) is None
    assert time.process_time() - started < 20
    printed = capsys.readouterr().out
    assert "ppo: 7 calls a step" in printed
    assert "ppo on 128x8xH100-80GB: " in printed
    assert "actor.update_actor" in printed
    assert "actor.update_actor" not in caplog.text, "once is enough"


def test_a_layout_that_is_too_large_says_what_would_do(
    settings: Settings, large: list[str]
) -> None:
    layout = [
        "actor.train.tp=8",
        "critic.train.tp=8",
        "reference.train.tp=8",
        "actor.generation.tp=8",
    ]
    on_16 = [
        *large,
        *layout,
        "device=cuda",
        "dry_run=true",
        "num_devices=16",
        "plan.cluster=2x8xA100-80GB",
    ]
    with pytest.raises(
        ValueError,
        match=(
            r"(?s)pool main: .* GB more than a device has.*critic \(.*needs at least .*smallest "
            r"cluster"
        ),
    ) as error:
        run(settings("ppo", *on_16))
    assert "does not fit on 2x8xA100-80GB" in str(error.value)
    assert "\n" not in str(error.value).partition("ppo does not fit")[0]
    on_128 = [
        text.replace("2x8x", "16x8x").replace("num_devices=16", "num_devices=128") for text in on_16
    ]
    with pytest.raises(ValueError, match="placement=auto fits on this cluster"):
        run(settings("ppo", *on_128, "actor.generation.max_num_seqs=1024"))


def test_settings_become_a_question_for_the_mapper(settings: Settings) -> None:
    config = settings(
        "ppo",
        "data.batch_size=6",
        "algorithm.num_mini_batches=2",
        "num_devices=4",
        "actor.train.tp=2",
    )
    prompts = prompts_of(config)
    plan = plan_of(config, prompts)
    setting = setting_of(plan)
    assert setting.models["reward"] is None
    assert setting.models["critic"].scalar_head
    assert (setting.workload.num_rows, setting.workload.num_mini_batches) == (6, 2)
    assert setting.workload.prompt.longest == prompts.lengths.max()
    assert setting.workload.response.quantiles == (8,)
    assert setting.space.old_log_prob_pass
    assert setting.cluster.num_devices == 4
    shorter = replace(plan, config=settings("ppo", "plan.response=uniform:2:8"))
    assert setting_of(shorter).workload.response.mean < 8
    given = configured_mapping(plan, place(config).pool_of, place(config).pool_sizes)
    assert (
        given.role("actor").layout.t,
        given.role("actor").layout.d,
        given.role("critic").layout.d,
    ) == (
        2,
        2,
        4,
    )


def test_a_mapping_becomes_settings_and_is_taken_again(settings: Settings, tmp_path: Path) -> None:
    config = settings("ppo", "placement=auto", "num_devices=2", f"output_dir={tmp_path}")
    prompts = prompts_of(config)
    plan = plan_of(config, prompts)
    mapping = choose(plan)
    settled = apply_mapping(plan, mapping)
    assert settled.placement is PlacementMode.custom
    assert sum(pool.num_devices for pool in settled.pools.values()) == mapping.num_devices <= 2
    assert sorted(role for pool in settled.pools.values() for role in pool.roles) == [
        "actor",
        "critic",
        "reference",
        "reward",
    ]
    layouts = {role.name: place(settled).layouts(role) for role in place(settled).roles}
    assert layouts["actor"]["generation"].axis_size("tp") == mapping.role("actor").generation.tg
    assert (
        settled.critic.train.micro_batch_tokens == mapping.role("critic").layout.micro_batch_tokens
    )

    mapping.save(tmp_path / MAPPING)
    assert saved_mapping(config) is None, "nothing to go on from yet"
    resumed = replace(
        config, loop=replace(config.loop, resume=str(tmp_path / "checkpoints" / "step-1"))
    )
    assert saved_mapping(resumed) == tmp_path / MAPPING
    assert choose(replace(plan, config=resumed)) == mapping
    more = replace(resumed, num_devices=4)
    assert choose(replace(plan, config=more)).cluster == "1x4xcpu", "other devices: chosen anew"
    again = replace(config, plan=replace(config.plan, mapping=str(tmp_path / MAPPING)))
    assert choose(replace(plan, config=again)).roles == mapping.roles
    assert choose(replace(plan, config=again)) == DeviceMapping.load(tmp_path / MAPPING)


def test_pools_ask_for_nodes_of_their_kind(settings: Settings, tmp_path: Path) -> None:
    """Two kinds of CPU nodes, and two kinds of GPU nodes, whose names Ray knows."""
    slow = replace(DEVICE_KINDS["cpu"], name="slow", devices_per_node=1)
    fast = replace(
        slow, name="fast", flops=2 * slow.flops, memory_bandwidth=2 * slow.memory_bandwidth
    )
    Cluster(groups=(NodeGroup(kind=slow, num_nodes=1), NodeGroup(kind=fast, num_nodes=1))).save(
        tmp_path / "cluster.json"
    )
    on_both = [
        "placement=auto",
        f"plan.cluster={tmp_path / 'cluster.json'}",
        f"output_dir={tmp_path}",
    ]
    config = settings("ppo", *on_both)
    plan = plan_of(config, prompts_of(config))
    with pytest.raises(
        ValueError,
        match=r"nothing says which of Ray's nodes have slow; .*plan.node_resources=\[slow:slow\]",
    ):
        choose(plan)
    plan = replace(
        plan, config=settings("ppo", *on_both, "plan.node_resources=[slow:old,fast:new]")
    )
    mapping = choose(plan)
    settled = apply_mapping(plan, mapping)
    assert {pool.kind for pool in mapping.pools} == {"slow", "fast"}
    marks = {"slow": "old", "fast": "new"}
    assert {name: pool.node_resource for name, pool in settled.pools.items()} == {
        pool.name: marks[pool.kind] for pool in mapping.pools
    }
    given = configured_mapping(
        replace(plan, config=settled), place(settled).pool_of, place(settled).pool_sizes
    )
    assert {pool.name: pool.group for pool in given.pools} == {
        pool.name: pool.group for pool in mapping.pools
    }

    gpus = settings(
        "ppo",
        "placement=auto",
        "device=cuda",
        "plan.cluster=1xH100-80GB+1xA100-80GB",
        f"output_dir={tmp_path}",
    )
    settled = apply_mapping(replace(plan, config=gpus), choose(replace(plan, config=gpus)))
    assert {pool.node_resource for pool in settled.pools.values()} <= {
        "accelerator_type:H100",
        "accelerator_type:A100",
    }


@pytest.mark.parametrize(
    ("recipe", "arguments"),
    [
        ("online_dpo", ["judge.yes=3", "judge.no=4"]),
        ("generative_reward", ["judge.yes=3", "judge.no=4"]),
        ("grpo", ["environment=recipes.agents.calculator:Calculator", "reward.function=null"]),
    ],
)
def test_roles_whose_workers_have_more_than_the_settings_are_placed(
    recipe: str, arguments: list[str], settings: Settings
) -> None:
    """A judge reads the policy's tokens, an actor in an environment has that: neither is a setting of
    the role, and the mapper's answer becomes settings."""
    config = settings(recipe, "placement=auto", "num_devices=2", *arguments)
    prepared = prepare(config)
    before = {role.name: role.config for role in place(config).roles}
    assert prepared.mapping is not None and before
    for role in prepared.placement.roles:
        assert type(role.config) is type(before[role.name])
        assert role.config.model == prepared.mapper_inputs.roles[role.name].model


def test_a_function_needs_no_pool_of_its_own(settings: Settings) -> None:
    config = settings("grpo", "placement=auto", "num_devices=2", "actor.loss.kl_coefficient=0")
    plan = plan_of(config, prompts_of(config))
    assert list(plan.roles) == ["actor", "reward"]
    settled = apply_mapping(plan, choose(plan))
    assert [pool.roles for pool in settled.pools.values()] == [["actor", "reference", "reward"]]
    assert [role.name for role in place(settled).roles] == ["actor", "reward"]
