"""The whole mapper: what it answers, how it explains, judges, saves and refuses."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hybridflow.mapping.answer.auto import choose_placement, mapping_of, shortage, smallest_cluster
from hybridflow.mapping.answer.device_mapping import DeviceMapping, Pool, RolePlan
from hybridflow.mapping.answer.explain import mapping_report, rivals
from hybridflow.mapping.answer.judge import judge
from hybridflow.mapping.answer.predict import predict
from hybridflow.mapping.answer.timeline import draw_timelines
from hybridflow.mapping.calibrate.compare import (
    Run,
    compare,
    load_runs,
    order_agrees,
    save_runs,
    side_by_side,
)
from hybridflow.mapping.question.calibration import CPU
from hybridflow.mapping.question.cluster import DEVICE_KINDS, Cluster, NodeGroup
from hybridflow.mapping.question.layouts import GenerationLayout, ModelLayout
from hybridflow.mapping.question.zoo import MODELS
from hybridflow.mapping.search.search import Search, search
from recipes.dataflows import PAPER
from workers.engines.threed.layout import stage_layers

ROLES = ("actor", "critic", "reference", "reward")


def test_prediction_is_what_the_search_minimised_and_it_fits(paper_setting):
    for model, size in (("llama-7b", 8), ("llama-70b", 64)):
        setting = paper_setting(model, size)
        result = search(setting, every_placement=True)
        for entry in result.placements:
            if entry.solution is not None:
                mapping = mapping_of(setting, entry.solution)
                assert mapping.step_s == pytest.approx(entry.solution.step_s, rel=1e-12)
                assert mapping.fits
                assert sum(pool.num_devices for pool in mapping.pools) <= size
                for call in mapping.calls:
                    assert sum(call.causes_s.values()) == pytest.approx(call.seconds)


def test_pools_run_their_calls_one_at_a_time(paper_setting):
    setting = paper_setting("llama-7b", 32)
    mapping = mapping_of(
        setting, Search(setting).best_of((("actor", "reference"), ("critic", "reward")))
    )
    for pool in mapping.pools:
        calls = [call for call in mapping.calls if call.pool == pool.name]
        assert all(later.start_s >= earlier.end_s for earlier, later in pairwise(calls))


def test_more_devices_and_more_memory_are_never_worse(paper_setting):
    steps = [search(paper_setting("llama-7b", size)).best.step_s for size in (8, 16, 24)]
    assert steps == sorted(steps, reverse=True)
    setting = paper_setting("llama-13b", 16)
    larger = replace(DEVICE_KINDS["A100-80GB"], memory_bytes=160e9)
    roomy = replace(setting, cluster=Cluster(groups=(NodeGroup(kind=larger, num_nodes=2),)))
    assert search(roomy).best.step_s <= search(setting).best.step_s


def test_two_kinds_of_devices_are_used_together(paper_setting):
    setting = paper_setting("llama-7b", 8)
    one = search(setting).best
    both = search(replace(setting, cluster=Cluster.parse("1x8xA100-80GB+1x8xH100-80GB"))).best
    assert both.step_s < one.step_s
    assert {group for group, _ in both.allocation} >= {1}


def test_same_question_same_answer_and_it_survives_json(paper_setting, tmp_path):
    setting = paper_setting("llama-7b", 16)
    first, second = (
        choose_placement(setting.dataflow, setting.models, setting.cluster, setting.workload)
        for _ in range(2)
    )
    assert first == second
    first.save(tmp_path / "mapping.json")
    assert DeviceMapping.load(tmp_path / "mapping.json") == first
    again = judge(setting, DeviceMapping.load(tmp_path / "mapping.json"))
    assert again.fits
    assert again.mapping.step_s == pytest.approx(first.step_s)


def test_a_function_needs_no_devices(paper_setting):
    setting = paper_setting("llama-7b", 8, "grpo")
    mapping = choose_placement(
        setting.dataflow, {**setting.models, "reward": None}, setting.cluster, setting.workload
    )
    assert {plan.role for plan in mapping.roles} == {"actor", "reference"}
    assert next(call for call in mapping.calls if call.role == "reward").pool == "controller"


def test_impossible_requests_say_what_would_do(paper_setting):
    setting = paper_setting("llama-70b", 16)
    text = shortage(setting)
    assert "critic (llama-70b" in text
    assert "does not fit even alone" in text
    first, *roles, _ = text.splitlines()
    assert first.endswith(":") and all(line.endswith(";") for line in roles), "one line, too"
    nodes = smallest_cluster(setting)
    assert f"{nodes}x8xA100-80GB" in text
    assert search(replace(setting, cluster=setting.cluster.with_nodes(nodes))).best is not None
    assert search(replace(setting, cluster=setting.cluster.with_nodes(nodes - 1))).best is None
    with pytest.raises(ValueError, match="smallest cluster that would do"):
        choose_placement(setting.dataflow, setting.models, setting.cluster, setting.workload)


def colocated(layout: ModelLayout, generation: GenerationLayout, devices: int) -> DeviceMapping:
    return DeviceMapping(
        algorithm="ppo",
        cluster="",
        pools=(Pool(name="all", num_devices=devices, roles=ROLES),),
        roles=tuple(
            RolePlan(
                role=role,
                pool="all",
                layout=layout,
                generation=generation if role == "actor" else None,
            )
            for role in ROLES
        ),
        capacity_bytes={},
    )


def test_judge_names_the_worst_call_and_changes_that_help(paper_setting):
    setting = paper_setting("llama-7b", 16)
    layout = ModelLayout(p=1, t=2, d=8, zero=1, micro_batch_tokens=2048)
    judgement = judge(
        setting, colocated(layout, GenerationLayout(tg=2, replicas=8, max_running=256), 16)
    )
    assert not judgement.fits
    assert judgement.overfull[0][:2] == ("all", "actor.generate_sequences")
    change = next(text for _, text in judgement.changes if "sequences at once" in text)
    running = int(change.split("at most ")[1].split()[0])
    assert judge(
        setting, colocated(layout, GenerationLayout(tg=2, replicas=8, max_running=running), 16)
    ).fits
    assert not judge(
        setting, colocated(layout, GenerationLayout(tg=2, replicas=8, max_running=running * 2), 16)
    ).fits
    assert "fit together from" in judgement.report()


def test_a_cluster_that_is_too_small_for_any_layout_is_no_change_that_helps(paper_setting):
    layout = ModelLayout(p=1, t=8, d=1, zero=1, micro_batch_tokens=2048)
    generation = GenerationLayout(tg=8, replicas=1, max_running=1)
    judgement = judge(paper_setting("llama-70b", 8), colocated(layout, generation, 8))
    assert not judgement.fits and not judgement.changes
    assert judgement.report().endswith("no single change makes it fit")


def test_each_pool_that_is_too_full_gets_its_changes(paper_setting):
    pools = (
        Pool(name="policy", num_devices=8, roles=("actor", "reference")),
        Pool(name="values", num_devices=8, roles=("critic", "reward")),
    )
    generation = GenerationLayout(tg=2, replicas=4, max_running=64)
    roles = tuple(
        RolePlan(
            role=role,
            pool=pool.name,
            layout=ModelLayout(d=8),
            generation=generation if role == "actor" else None,
        )
        for pool in pools
        for role in pool.roles
    )
    judgement = judge(
        paper_setting("llama-7b", 16),
        DeviceMapping(algorithm="ppo", cluster="", pools=pools, roles=roles, capacity_bytes={}),
    )
    assert (
        {pool for pool, _, _ in judgement.overfull}
        == {pool for pool, _ in judgement.changes}
        == {"policy", "values"}
    )


def test_an_engine_that_keeps_its_memory_takes_it_from_other_calls(paper_setting):
    setting = paper_setting("llama-7b", 16)
    layout = ModelLayout(p=1, t=8, d=2, zero=1, micro_batch_tokens=2048)
    released, kept = (
        judge(
            setting,
            colocated(layout, GenerationLayout(tg=8, replicas=2, max_running=64, kept=keeps), 16),
        ).mapping
        for keeps in (False, True)
    )
    bytes_of = [
        {call.call: call.total_bytes for call in mapping.calls} for mapping in (released, kept)
    ]
    cache = next(call.bytes["kv_cache"] for call in released.calls if call.kind == "generation")
    assert bytes_of[1]["actor.generate_sequences"] == pytest.approx(
        bytes_of[0]["actor.generate_sequences"]
    )
    assert bytes_of[1]["critic.update_critic"] >= bytes_of[0]["critic.update_critic"] + cache


def test_judge_fills_in_layouts_for_given_pools(paper_setting):
    setting = paper_setting("llama-7b", 32)
    pools = (
        Pool(name="a", num_devices=16, roles=("actor", "reference")),
        Pool(name="b", num_devices=16, roles=("critic", "reward")),
    )
    empty = DeviceMapping(algorithm="", cluster="", pools=pools, roles=(), capacity_bytes={})
    judgement = judge(setting, empty)
    best = Search(setting).best_of((("actor", "reference"), ("critic", "reward")))
    assert judgement.fits
    assert judgement.mapping.step_s >= best.step_s * (1 - 1e-9)
    assert judgement.mapping.role("critic").pool == "b"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"pools": (Pool(name="all", num_devices=16, roles=ROLES[:3]),)},
            "role reward is in pools",
        ),
        (
            {"pools": (Pool(name="all", num_devices=99, roles=ROLES),)},
            "do not fit on .*at most 16 devices here; change its num_devices",
        ),
        (
            {"roles": (RolePlan(role="actor", pool="all", layout=ModelLayout(t=3, d=5)),)},
            "have no plan",
        ),
    ],
)
def test_judge_refuses_nonsense(paper_setting, change, message):
    mapping = replace(
        colocated(ModelLayout(t=8, d=2), GenerationLayout(tg=8, replicas=2), 16), **change
    )
    with pytest.raises(ValueError, match=message):
        judge(paper_setting("llama-7b", 16), mapping)


@pytest.mark.parametrize(
    ("layout", "message"),
    [
        (ModelLayout(t=8, d=1), "pool all has 16"),
        (ModelLayout(p=16, t=1, d=1), None),
        (ModelLayout(t=16, d=1), "a node has 8 devices"),
    ],
)
def test_judge_checks_layouts(paper_setting, layout, message):
    mapping = colocated(layout, GenerationLayout(tg=8, replicas=2), 16)
    if message is None:
        assert judge(paper_setting("llama-7b", 16), mapping).mapping.step_s > 0
    else:
        with pytest.raises(ValueError, match=message):
            judge(paper_setting("llama-7b", 16), mapping)


def test_explanations_and_picture(paper_setting, tmp_path):
    setting = paper_setting("llama-13b", 32)
    result = search(setting, every_placement=True)
    mapping = mapping_of(setting, result.best)
    text = mapping_report(mapping)
    assert all(call.name in text for call in setting.dataflow.calls)
    lines = rivals(setting, result).splitlines()
    assert len(lines) == 2 + 15
    assert "chosen" in lines[2]
    assert all("%" in line or "does not fit" in line for line in lines[2:])
    draw_timelines({"chosen": mapping}, tmp_path / "timeline.png")
    assert (tmp_path / "timeline.png").stat().st_size > 10_000


def test_search_time():
    """128 devices and 4 models; the 1,024-device figure is in benchmarks.mapping. Processor
    seconds: others share this machine."""
    from benchmarks.mapping.paper import paper_setting

    started = time.process_time()
    assert search(paper_setting("llama-13b", 128), every_placement=True).best is not None
    assert time.process_time() - started < 5


def test_predicted_and_measured_side_by_side(paper_setting, tmp_path):
    setting = paper_setting("llama-7b", 8)
    mapping = mapping_of(setting, search(setting).best)
    measured = {
        call.call: call.seconds * 1.1 for call in mapping.calls if call.pool != "controller"
    }
    run = Run(
        configuration="seven", mapping=mapping, measured_s=measured, step_s=mapping.step_s * 1.1
    )
    assert all(row.ratio == pytest.approx(1 / 1.1) for row in compare(run))
    assert "-9%" in side_by_side(run)
    slower = replace(
        run,
        configuration="slow",
        mapping=replace(mapping, step_s=2 * mapping.step_s),
        step_s=3 * mapping.step_s,
    )
    assert order_agrees([run, slower])
    assert not order_agrees([run, replace(slower, step_s=mapping.step_s / 2)])
    save_runs([run, slower], tmp_path / "runs.json")
    assert load_runs(tmp_path / "runs.json") == [run, slower]
    with pytest.raises(ValueError, match=r"actor\.dance"):
        compare(replace(run, measured_s={"actor.dance": 1.0}))


def test_command_line(tmp_path):
    """One process: no engine and no Ray is started; JSON comes out; a mapping written is a
    mapping read."""
    code = (
        "import sys; from recipes import plan; sys.argv = ['plan', *sys.argv[1:]]; plan.main(); "
        "loaded = {'ray', 'vllm', 'deepspeed'} & set(sys.modules); assert not loaded, loaded"
    )
    saved, data = tmp_path / "mapping.json", tmp_path / "plan.json"
    arguments = [
        "algorithm=ppo",
        "model=llama-7b",
        "cluster=64xA100-80GB",
        "every_placement=false",
        f"save={saved}",
        "--json",
        str(data),
    ]
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        capture_output=True,
        text=True,
        timeout=400,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "tokens/s" in done.stdout
    content = json.loads(data.read_text())
    assert DeviceMapping.from_json(content["mapping"]) == DeviceMapping.load(saved)
    assert len(content["placements"]) == 15


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["model=llama-7b"], "cluster"),
        (["modle=llama-7b"], "modle"),
        (
            ["algorithm=dpo", "model=llama-7b", "cluster=8xA100-80GB"],
            "answers no prompts .* known: ppo",
        ),
        (["algorithm=sarsa", "model=llama-7b", "cluster=8xA100-80GB"], "known: ppo"),
        (
            ["model=llama-7b", "cluster=8xA100-80GB", "models.critic=function"],
            "models.critic=function",
        ),
        (["model=llama-7b", "cluster=8xA100-80GB", "models.judge=llama-7b"], "judge"),
        (["model=llama-7b", "cluster=8xA100-80GB", "batch_size=many"], "batch_size"),
        (
            ["model=llama-7b", "cluster=8xA100-80GB", "batch_size=4", "num_mini_batches=8"],
            "num_mini_batches is 8, the step has 4 rows",
        ),
        (["model=llama-7b", "cluster=8xA100-80GB", "max_num_seqs=0"], "max_num_seqs is 0"),
        (["num_prompts=4"], "num_prompts is now batch_size"),
        (["updates=8"], "updates is now num_mini_batches"),
        (["epochs=2"], "epochs is now num_epochs"),
        (["fp32=true"], "fp32 is now precision"),
        (["max_running=0"], "max_running is now max_num_seqs"),
        (["plan.cluster=8xA100-80GB"], r"no setting 'plan.cluster'; did you mean cluster\?"),
        (["respnse=64"], r"no setting 'respnse'; did you mean response"),
        (["precision=fp16"], "precision=fp16: 'fp16' is none of its values; .*fp32, bf16"),
        (["model=llama-7b", "cluster=8xA100-80GB", "prompt=uniform:a:b"], "lengths 'uniform:a:b'"),
        (
            ["model=llama-7b", "cluster=8xA100-80GB", "engine=megatron"],
            "engine is 'megatron'; known: fsdp",
        ),
        (
            ["model=llama-7b", "cluster=8xA100-80GB", "calibration=/no/such.json"],
            "calibration file /no/such.json is not there",
        ),
        (["model=llama-7b", "cluster=/no/such.json"], "cluster file /no/such.json is not there"),
        (["llama-7b"], "name=value"),
        (["models={critic"], "models is '{critic', which is no YAML"),
    ],
)
def test_wrong_arguments_are_named(arguments, message):
    from recipes.mapping_question import to_setting
    from recipes.plan import to_config, to_question

    with pytest.raises(ValueError, match=message):
        to_setting(to_question(to_config(arguments)))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "mapping file .* is no JSON"),
        ("[]", "holds a list"),
        ('{"pools": []}', "no list 'roles'"),
        (
            '{"pools": [{"name": "all", "roles": ["actor"]}], "roles": []}',
            r"pools\[0\]: missing num_devices; its fields are name",
        ),
        (
            '{"pools": [{"name": "all", "num_devices": 8, "roles": "actor"}], "roles": []}',
            "roles is 'actor'; it must be a list",
        ),
        ('{"pools": [], "roles": ["actor"]}', r"roles\[0\] is 'actor'"),
        (
            '{"pools": [], "roles": [{"role": "actor", "pool": "all", "layout": {"tp": 8}}]}',
            r"roles\[0\].layout: unknown tp; .* p, t, d",
        ),
    ],
)
def test_mistakes_in_a_mapping_file_are_named(tmp_path, text, message):
    file = tmp_path / "mine.json"
    file.write_text(text)
    with pytest.raises(ValueError, match=message):
        DeviceMapping.load(file)


@pytest.mark.parametrize("algorithm", list(PAPER))
def test_every_algorithm_has_an_answer(paper_setting, algorithm):
    setting = paper_setting("llama-7b", 16, algorithm)
    assert search(setting).best is not None


def test_settings_take_the_mappings_layouts(paper_setting):
    from recipes.mapping_settings import generation_settings, train_settings
    from workers.config import TrainConfig
    from workers.generation.config import GenerationConfig

    setting = paper_setting("llama-7b", 16)
    mapping = mapping_of(setting, search(setting).best)
    plan = mapping.role("actor")
    train = train_settings(mapping, "actor", TrainConfig(engine="threed"))
    assert (train.pp, train.tp, train.engine) == (plan.layout.p, plan.layout.t, "threed")
    assert train.micro_batch_tokens == plan.layout.micro_batch_tokens
    generation = generation_settings(mapping, "actor", GenerationConfig())
    assert (generation.tp, generation.max_num_seqs) == (
        plan.generation.tg,
        plan.generation.max_running,
    )
    assert generation.kv_cache_bytes > 1e9
    with pytest.raises(ValueError, match="critic has no generation layout"):
        generation_settings(mapping, "critic", GenerationConfig())


def test_stages_need_not_divide_the_layers(paper_setting):
    """An engine runs 31 layers on 16 stages; the longest stage counts (REALITY A: odd layers)."""
    setting = paper_setting("llama-7b", 16)
    odd = {}
    for role, model in setting.models.items():
        odd[role] = replace(model, num_layers=31)
    mapping = colocated(ModelLayout(p=16, t=1, d=1), GenerationLayout(tg=8, replicas=2), 16)
    even = judge(setting, mapping).mapping.step_s
    uneven = judge(replace(setting, models=odd), mapping).mapping.step_s
    assert 0.9 * even < uneven <= even


@settings(deadline=None)
@given(st.integers(1, 80), st.data())
def test_the_longest_stage_is_that_of_the_training_engine(num_layers, data):
    num_stages = data.draw(st.integers(1, num_layers))
    model = replace(MODELS["llama-7b"], num_layers=num_layers)
    longest = max(len(stage) for stage in stage_layers(num_layers, num_stages))
    assert model.longest_stage(num_stages) == longest


def test_a_cpu_process_is_its_calls_bytes_and_its_own(paper_setting):
    """A9: what dry_run promises of a host is what the system counts, not tensors alone."""
    setting = paper_setting("llama-7b", 8)
    roles = colocated(ModelLayout(d=8), GenerationLayout(tg=1, replicas=8, max_running=8), 8).roles
    pools = (Pool(name="all", num_devices=8, roles=tuple(plan.role for plan in roles)),)
    assert predict(setting, pools, roles).process_bytes == {}
    cpus = replace(setting, calibration=CPU)
    mapping = predict(cpus, pools, roles)
    without = CPU.process_bytes + (1 + CPU.allocator_overhead) * mapping.peak_bytes("all")
    assert mapping.process_bytes == {"all": pytest.approx(without + CPU.library_bytes)}
    own = replace(cpus, space=replace(cpus.space, generation_library=False))
    assert predict(own, pools, roles).process_bytes == {"all": pytest.approx(without)}
    preloaded = replace(own, space=replace(own.space, preloaded_allocator=True))
    less = (CPU.allocator_overhead - CPU.preloaded_overhead) * mapping.peak_bytes("all")
    assert predict(preloaded, pools, roles).process_bytes == {"all": pytest.approx(without - less)}
    assert "a process of pool all: " in mapping_report(mapping)
    assert DeviceMapping.from_json(json.loads(json.dumps(mapping.to_json()))) == mapping
