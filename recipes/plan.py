"""Plan a run without starting it: which models share devices, every layout, time and memory per
call, and why the alternatives lose.

    python -m recipes.plan algorithm=ppo model=llama-7b cluster=2x8xA100-80GB
    python -m recipes.plan model=llama-13b models.critic=llama-70b models.reward=function cluster=64xH100-80GB
    python -m recipes.plan ... mapping=mine.json        # judge a mapping of your own
    python -m recipes.plan ... --json plan.json         # the answer as data ("-" or nothing: to the screen)

Needs no accelerator and starts nothing; the algorithm is any entry of ALGORITHMS, traced. Settings
are the fields of PlanConfig; those that a run has too are called by their names in a run.
"""

from __future__ import annotations

import json
import sys
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from hybridflow.dataflow import CallKind, Dataflow
from hybridflow.mapping.answer.auto import mapping_of, shortage
from hybridflow.mapping.answer.device_mapping import DeviceMapping
from hybridflow.mapping.answer.explain import context_gain, mapping_report, rivals
from hybridflow.mapping.answer.judge import Judgement, judge
from hybridflow.mapping.question.cluster import Cluster
from hybridflow.mapping.question.model import ModelSpec
from hybridflow.mapping.question.space import SearchSpace
from hybridflow.mapping.question.workload import Asynchrony, Lengths
from hybridflow.mapping.question.zoo import model_spec
from hybridflow.mapping.search.search import PlacementResult, SearchResult, search
from hybridflow.mapping.search.setting import GENERATION, Setting
from recipes.arguments import HELP, read_arguments, usage
from recipes.dataflows import dataflow_of, without
from recipes.errors import plain_errors
from recipes.mapper_config import QuestionConfig
from recipes.mapping_question import Question, precision_space, to_setting
from workers.config import Precision

FUNCTION, NONE = "function", "none"
SCALAR_ROLES = ("critic", "cost_critic", "reward", "cost")
RENAMED = {
    "num_prompts": "batch_size, as data.batch_size of a run",
    "updates": "num_mini_batches, as algorithm.num_mini_batches of a run",
    "epochs": "num_epochs, as actor.num_epochs of a run",
    "fp32": "precision (fp32 or bf16), as actor.train.precision of a run",
    "max_running": "max_num_seqs, as actor.generation.max_num_seqs of a run",
}


@dataclass(kw_only=True)
class PlanConfig(QuestionConfig):
    """Every setting of `python -m recipes.plan`; QuestionConfig has those that are `plan.*` of
    a run."""

    algorithm: str = "ppo"
    model: str = "???"
    """The model of all roles: a known shape (llama-7b, qwen2.5-7b, mixtral-8x7b, ...) or a
    Hugging Face directory."""
    models: dict[str, str] = field(default_factory=dict)
    """Role -> another model, `function` for a Python function that needs no devices, or `none`
    for a role that the run does without (the reference, where no KL coefficient asks for one)."""
    cluster: str = "???"
    batch_size: int = 1024
    """Prompts of a step."""
    samples_per_prompt: int = 1
    prompt: str = "1024"
    """Tokens of a prompt: a number, uniform:LOW:HIGH or lognormal:MEAN:MAX; a run has those of
    its data."""
    response: str = "1024"
    num_mini_batches: int = 8
    """Optimizer updates per epoch."""
    num_epochs: int = 1
    staleness: int = 0
    """Steps that generation is ahead of training, as asynchrony.staleness of a run; with
    split_generation it then runs beside training."""
    look_ahead: float = 1.0
    """As asynchrony.look_ahead of a run."""
    precision: Precision = Precision.bf16
    """The precision of training and generation: bf16 with float32 master weights (18 bytes a
    parameter) or fp32 (16)."""
    offload: bool = False
    """Also try keeping optimizer states (and the parameters of models that are not trained) in
    host memory between calls."""
    shared_generation_weights: bool = True
    """Generation computes on the training shards where they suffice. false: the engine holds a
    copy of the weights (vLLM), as it does in a run."""
    engine: str = ""
    """Only layouts that this training engine has (fsdp, threed, deepspeed); empty: every layout."""
    max_num_seqs: int = 256
    """The most responses that a generation engine decodes at once."""
    every_placement: bool = True
    """The best plan of every placement for the table; false stops at the proof that a placement
    loses."""
    timeline: str = ""
    """Where to draw the timeline (.png, .svg, .pdf)."""
    save: str = ""
    """Where to write the chosen mapping (JSON), for plan.mapping of a run and for `mapping=`."""


PATHS = ("model", "models", "cluster", "calibration", "mapping", "timeline", "save")
"""Settings that are paths, or may be."""


@dataclass(frozen=True, kw_only=True)
class Answer:
    """A mapping, and where it comes from: a search, or the judgement of the user's."""

    setting: Setting
    mapping: DeviceMapping
    seconds: float
    """How long searching or judging took."""
    judgement: Judgement | None = None
    result: SearchResult | None = None


def main() -> None:
    arguments, json_target = _take_json(sys.argv[1:])
    if {*HELP} & {*arguments}:
        print(usage(__doc__, PlanConfig, "recipes/plan.py"))
        return
    with plain_errors():
        plan(to_config(arguments), json_target)


def to_config(arguments: list[str]) -> PlanConfig:
    """name=value arguments over the defaults; a mistake is a ValueError with the setting's name."""
    return read_arguments(PlanConfig, arguments, RENAMED, PATHS)


def to_question(config: PlanConfig) -> Question:
    """The question that the settings ask."""
    dataflow = dataflow_of(config.algorithm)
    for role, name in config.models.items():
        if name == NONE:
            dataflow = without(dataflow, role)
    asynchrony = None
    if config.staleness:
        asynchrony = Asynchrony(staleness=config.staleness, look_ahead=config.look_ahead)
    return Question(
        dataflow=dataflow,
        models=role_models(config, dataflow),
        cluster=Cluster.parse(config.cluster),
        calibration=config.calibration,
        batch_size=config.batch_size,
        samples_per_prompt=config.samples_per_prompt,
        prompt=Lengths.parse(config.prompt),
        response=Lengths.parse(config.response),
        num_mini_batches=config.num_mini_batches,
        num_epochs=config.num_epochs,
        split_generation=config.split_generation,
        space=search_space(config),
        asynchrony=asynchrony,
    )


def role_models(config: PlanConfig, dataflow: Dataflow) -> dict[str, ModelSpec | None]:
    """Role -> model, None for a function. Critics, rewards and costs have a scalar head;
    generation in a pool of its own has the actor's model unless another is named."""
    roles = dataflow.roles
    if config.split_generation:
        roles = (*roles, GENERATION)
    unknown = []
    for role, name in sorted(config.models.items()):
        if name != NONE and role not in roles:
            unknown.append(role)
    if unknown:
        raise ValueError(
            f"models: {unknown} are no roles of {dataflow.algorithm}; it has {', '.join(roles)}"
        )
    names = {GENERATION: config.models.get("actor", config.model), **config.models}
    models: dict[str, ModelSpec | None] = {}
    for role in roles:
        name = names.get(role, config.model)
        kinds = {call.kind for call in dataflow.calls if call.role == role}
        if name == FUNCTION and (
            role == GENERATION or kinds & {CallKind.training, CallKind.generation}
        ):
            raise ValueError(f"models.{role}=function: {role} trains or generates; give it a model")
        if name == FUNCTION:
            models[role] = None
        elif role in SCALAR_ROLES:
            models[role] = model_spec(name).with_scalar_head()
        else:
            models[role] = model_spec(name)
    return models


def search_space(config: PlanConfig) -> SearchSpace:
    """The layouts to choose from, limited to those of `engine` where one is named."""
    space = replace(
        precision_space(config.precision),
        offload=(False, True) if config.offload else (False,),
        max_num_seqs=config.max_num_seqs,
        shared_generation_weights=config.shared_generation_weights,
        old_log_prob_pass=bool(config.engine),
    )
    if not config.engine:
        return space
    from recipes.engine_facts import limited_space  # loads torch, which --help need not wait for

    return limited_space(config.engine, space)


def plan(config: PlanConfig, json_target: str | None = None) -> DeviceMapping:
    """Search or judge, print, draw, save; returns the mapping."""
    answer = find_answer(config)
    if json_target != "-":
        print(_text(answer))
    if config.timeline:
        from hybridflow.mapping.answer.timeline import draw_timelines

        title = "chosen" if answer.judgement is None else "yours"
        draw_timelines({title: answer.mapping}, _with_folder(config.timeline))
    if config.save:
        answer.mapping.save(_with_folder(config.save))
    if json_target is not None:
        _write_json(_as_json(answer), json_target)
    return answer.mapping


def find_answer(config: PlanConfig) -> Answer:
    """The judgement of `mapping`, or the search's answer; a ValueError with what would do if
    nothing fits."""
    setting = to_setting(to_question(config))
    started = time.perf_counter()
    if config.mapping:
        judgement = judge(setting, DeviceMapping.load(Path(config.mapping)))
        seconds = time.perf_counter() - started
        return Answer(
            setting=setting, mapping=judgement.mapping, seconds=seconds, judgement=judgement
        )
    result = search(setting, every_placement=config.every_placement)
    if result.best is None:
        raise ValueError(shortage(setting))
    mapping = mapping_of(setting, result.best)
    seconds = time.perf_counter() - started
    return Answer(setting=setting, mapping=mapping, seconds=seconds, result=result)


def _text(answer: Answer) -> str:
    parts = [mapping_report(answer.mapping)]
    if answer.judgement is not None:
        parts.append(answer.judgement.report())
    if answer.result is not None:
        searched = len(answer.result.placements)
        parts.append(rivals(answer.setting, answer.result))
        gain = context_gain(answer.setting, answer.result)
        if gain:
            parts.append(gain)
        parts.append(f"{searched} placements searched in {answer.seconds:.2f} s")
    return "\n\n".join(parts)


def _as_json(answer: Answer) -> dict[str, Any]:
    content: dict[str, Any] = {"mapping": answer.mapping.to_json(), "seconds": answer.seconds}
    judgement = answer.judgement
    if judgement is not None:
        content |= {
            "fits": judgement.fits,
            "overfull": judgement.overfull,
            "changes": judgement.changes,
        }
    if answer.result is not None:
        content["placements"] = [_placement_json(entry) for entry in answer.result.placements]
    return content


def _placement_json(entry: PlacementResult) -> dict[str, Any]:
    """A placement that is searched no further has no devices and step_s; one that does not fit,
    no bound."""
    fits = entry.bound_s != float("inf")
    content: dict[str, Any] = {
        "placement": entry.placement,
        "devices": None,
        "step_s": None,
        "at_least_s": entry.bound_s if fits else None,
        "fits": fits,
    }
    if entry.solution is not None:
        content["devices"] = [size for _, size in entry.solution.allocation]
        content["step_s"] = entry.solution.step_s
    return content


def _write_json(content: dict[str, Any], target: str) -> None:
    text = json.dumps(content, indent=1)
    if target == "-":
        print(text)
    else:
        _with_folder(target).write_text(text + "\n")


def _with_folder(target: str) -> Path:
    """The path of a file to write, whose folder is made where it is missing."""
    path = Path(target)
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


def _take_json(arguments: list[str]) -> tuple[list[str], str | None]:
    """Splits `--json [FILE]` from the name=value arguments."""
    if "--json" not in arguments:
        return arguments, None
    position = arguments.index("--json")
    before, after = arguments[:position], arguments[position + 1 :]
    if after and "=" not in after[0]:
        return before + after[1:], after[0]
    return before + after, "-"


if __name__ == "__main__":
    main()
