"""Plan a run without starting it: which models share devices, every layout, time and memory per call, and why
the rivals lose.

    python -m recipes.plan algorithm=ppo model=llama-7b cluster=2x8xA100-80GB
    python -m recipes.plan algorithm=ppo model=llama-13b models.critic=llama-70b models.reward=function cluster=128xH100-80GB
    python -m recipes.plan ... mapping=mine.json        # judge a mapping of your own
    python -m recipes.plan ... --json plan.json         # the answer as plain data ("-" or nothing: to the screen)

Needs no accelerator and starts nothing; the algorithm is any entry of ALGORITHMS, traced. Settings are the
fields of PlanConfig.
"""

from __future__ import annotations

import json
import sys
import time
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import Any, cast

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from hybridflow.dataflow import CallKind, Dataflow
from hybridflow.mapping.answer.auto import mapping_of, shortage
from hybridflow.mapping.answer.device_mapping import DeviceMapping
from hybridflow.mapping.answer.explain import mapping_report, rivals
from hybridflow.mapping.answer.judge import Judgement, judge
from hybridflow.mapping.question.calibration import Calibration, usual_constants
from hybridflow.mapping.question.cluster import Cluster
from hybridflow.mapping.question.model import ModelSpec
from hybridflow.mapping.question.space import SearchSpace
from hybridflow.mapping.question.workload import Lengths, Workload
from hybridflow.mapping.question.zoo import model_spec
from hybridflow.mapping.search.search import SearchResult, search
from hybridflow.mapping.search.setting import GENERATION, Setting, split_generation
from recipes.dataflows import dataflow_of, without
from workers.engines import engine_class

FUNCTION, NONE = "function", "none"
SCALAR_ROLES = ("critic", "cost_critic", "reward", "cost")


@dataclass(kw_only=True)
class PlanConfig:
    """Every setting of `python -m recipes.plan`."""

    algorithm: str = "ppo"
    model: str = "???"
    """Of all roles: a known shape (llama-7b, qwen2.5-7b, mixtral-8x7b, ...) or a Hugging Face directory."""
    models: dict[str, str] = field(default_factory=dict)
    """Role -> another model, `function` for a Python function that needs no devices, or `none` for a role
    that the run does without (the reference, where no KL coefficient asks for one)."""
    cluster: str = "???"
    """NODESxDEVICESxKIND or DEVICESxKIND, joined by +, or a JSON file."""
    num_prompts: int = 1024
    samples_per_prompt: int = 1
    prompt: str = "1024"
    """Tokens: a number, uniform:LOW:HIGH or lognormal:MEAN:MAX."""
    response: str = "1024"
    updates: int = 8
    """Optimizer updates per epoch."""
    epochs: int = 1
    fp32: bool = False
    """Train and generate in float32 (16 bytes a parameter) in place of bf16 with float32 master weights (18
    bytes)."""
    offload: bool = False
    """Also try keeping optimizer states (and the parameters of models that are not trained) in host memory
    between calls."""
    shared_generation_weights: bool = True
    """Generation computes on the training shards where they suffice; false: the engine keeps its own copy
    (vLLM)."""
    engine: str = ""
    """Only what this training engine can do (fsdp, threed, deepspeed); empty: every layout."""
    max_running: int = 256
    split_generation: bool = False
    """Also try generation in a pool of its own (role `generation`), with the weights sent over every step."""
    calibration: str = ""
    """JSON file of recipes.calibrate; the defaults are for A100 nodes, and for CPU processes where the
    cluster's kind is cpu."""
    mapping: str = ""
    """JSON file of a mapping to judge in place of searching; without layouts the best ones for its pools are
    filled in."""
    every_placement: bool = True
    """The best plan of every placement for the table; false stops at the proof that a placement loses."""
    timeline: str = ""
    """Where to draw the timeline (.png, .svg, .pdf)."""
    save: str = ""
    """Where to write the chosen mapping (JSON), for placement and for `mapping=`."""


def main() -> None:
    arguments, json_target = _take_json(sys.argv[1:])
    if {"-h", "--help"} & {*arguments}:
        print(usage())
        return
    try:
        plan(to_config(arguments), json_target)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None


def usage() -> str:
    settings = [
        f"  {entry.name}={'' if entry.default in (MISSING, '???') else entry.default}"
        for entry in fields(PlanConfig)
    ]
    return "\n".join(
        [
            str(__doc__),
            "Settings with their defaults (what they mean: PlanConfig in recipes/plan.py):",
            *settings,
        ]
    )


def to_config(arguments: list[str]) -> PlanConfig:
    """key=value arguments over the defaults; a wrong key or type is a ValueError with its name."""
    for argument in arguments:
        if "=" not in argument:
            raise ValueError(
                f"argument {argument!r} is not of the form key=value; keys are the fields of PlanConfig in "
                "recipes/plan.py"
            )
    try:
        config = OmegaConf.merge(OmegaConf.structured(PlanConfig), OmegaConf.from_dotlist(arguments))
        missing = sorted(OmegaConf.missing_keys(config))
        if missing:
            raise ValueError(f"not set: {', '.join(missing)}; give each as name=value")
        return cast(PlanConfig, OmegaConf.to_object(config))
    except OmegaConfBaseException as error:
        raise ValueError(
            str(error).split("\n")[0] + f"; known: {', '.join(PlanConfig.__dataclass_fields__)}"
        ) from None


def to_setting(config: PlanConfig) -> Setting:
    """What the mapper computes from."""
    dataflow = dataflow_of(config.algorithm)
    for role in (role for role, name in config.models.items() if name == NONE):
        dataflow = without(dataflow, role)
    weights_from = {}
    if config.split_generation:
        dataflow, weights_from = split_generation(dataflow), {GENERATION: "actor"}
    cluster = Cluster.parse(config.cluster)
    return Setting(
        dataflow=dataflow,
        models=role_models(config, dataflow),
        cluster=cluster,
        workload=Workload(
            num_prompts=config.num_prompts,
            samples_per_prompt=config.samples_per_prompt,
            prompt=Lengths.parse(config.prompt),
            response=Lengths.parse(config.response),
            updates=config.updates,
            epochs=config.epochs,
        ),
        calibration=Calibration.load(Path(config.calibration))
        if config.calibration
        else usual_constants(cluster.groups[0].kind.name),
        space=search_space(config),
        weights_from=weights_from,
    )


def role_models(config: PlanConfig, dataflow: Dataflow) -> dict[str, ModelSpec | None]:
    """Every role's model; critic, reward and cost get a scalar head."""
    unknown = sorted(
        role for role, name in config.models.items() if name != NONE and role not in dataflow.roles
    )
    if unknown:
        raise ValueError(
            f"models: {unknown} are no roles of {dataflow.algorithm}; it has {', '.join(dataflow.roles)}"
        )
    result: dict[str, ModelSpec | None] = {}
    for role in dataflow.roles:
        name = config.models.get(
            role, config.models.get("actor", config.model) if role == GENERATION else config.model
        )
        kinds = {call.kind for call in dataflow.calls if call.role == role}
        if name == FUNCTION and kinds & {CallKind.training, CallKind.generation}:
            raise ValueError(f"models.{role}=function: {role} trains or generates; give it a model")
        spec = None if name == FUNCTION else model_spec(name)
        result[role] = spec.with_scalar_head() if spec is not None and role in SCALAR_ROLES else spec
    return result


def search_space(config: PlanConfig) -> SearchSpace:
    space = SearchSpace(
        parameter_bytes=4.0 if config.fp32 else 2.0,
        optimizer_bytes=8.0 if config.fp32 else 12.0,
        activation_bytes=4.0 if config.fp32 else 2.0,
        offload=(False, True) if config.offload else (False,),
        max_running=config.max_running,
        shared_generation_weights=config.shared_generation_weights,
        old_log_prob_pass=bool(config.engine),
    )
    return engine_class(config.engine).limit(space) if config.engine else space


def plan(config: PlanConfig, json_target: str | None = None) -> DeviceMapping:
    """Search or judge, print, draw, save; returns the mapping."""
    setting = to_setting(config)
    started = time.perf_counter()
    judgement, result = None, None
    if config.mapping:
        judgement = judge(setting, DeviceMapping.load(Path(config.mapping)))
        mapping = judgement.mapping
    else:
        result = search(setting, every_placement=config.every_placement)
        if result.best is None:
            raise ValueError(shortage(setting))
        mapping = mapping_of(setting, result.best)
    seconds = time.perf_counter() - started
    if json_target != "-":
        print(_text(setting, mapping, judgement, result, seconds))
    if config.timeline:
        from hybridflow.mapping.answer.timeline import draw_timelines

        draw_timelines({"yours" if judgement else "chosen": mapping}, _into(config.timeline))
    if config.save:
        mapping.save(_into(config.save))
    if json_target is not None:
        _write_json(_as_json(setting, mapping, judgement, result, seconds), json_target)
    return mapping


def _text(
    setting: Setting,
    mapping: DeviceMapping,
    judgement: Judgement | None,
    result: SearchResult | None,
    seconds: float,
) -> str:
    parts = [mapping_report(mapping)]
    if judgement is not None:
        parts.append(judgement.report())
    if result is not None:
        parts += [rivals(setting, result), f"{len(result.placements)} placements searched in {seconds:.2f} s"]
    return "\n\n".join(parts)


def _as_json(
    setting: Setting,
    mapping: DeviceMapping,
    judgement: Judgement | None,
    result: SearchResult | None,
    seconds: float,
) -> dict[str, Any]:
    content: dict[str, Any] = {"mapping": mapping.to_json(), "seconds": seconds}
    if judgement is not None:
        content |= {"fits": judgement.fits, "overfull": judgement.overfull, "changes": judgement.changes}
    if result is not None:
        content["placements"] = [
            {
                "placement": entry.placement,
                "devices": None
                if entry.solution is None
                else [size for _, size in entry.solution.allocation],
                "step_s": None if entry.solution is None else entry.solution.step_s,
                "at_least_s": None if entry.bound_s == float("inf") else entry.bound_s,
                "fits": entry.bound_s != float("inf"),
            }
            for entry in result.placements
        ]
    return content


def _write_json(content: dict[str, Any], target: str) -> None:
    text = json.dumps(content, indent=1)
    if target == "-":
        print(text)
    else:
        _into(target).write_text(text + "\n")


def _into(target: str) -> Path:
    """A file that may be written: its folder is there."""
    path = Path(target)
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


def _take_json(arguments: list[str]) -> tuple[list[str], str | None]:
    """Splits `--json [FILE]` from the key=value arguments."""
    if "--json" not in arguments:
        return arguments, None
    at = arguments.index("--json")
    following = arguments[at + 1 : at + 2]
    named = bool(following) and "=" not in following[0]
    return arguments[:at] + arguments[at + 1 + named :], following[0] if named else "-"


if __name__ == "__main__":
    main()
