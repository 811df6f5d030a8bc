"""B90 to B92: values as a user writes them, on the command line, in a YAML and in Python."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from hydra.core.override_parser.overrides_parser import OverridesParser

from controllers.data import DataConfig
from recipes.arguments import read_arguments
from recipes.checks import check_settings
from recipes.composing import RecipeFile, compose, to_settings
from recipes.config import RunConfig
from recipes.override_values import quote_values, quoted
from recipes.plan import PATHS, PlanConfig
from recipes.python_settings import make_settings
from recipes.roles import scorer_settings
from workers.config import ModelConfig

STOP = "actor.generation.sampling.stop_strings"
NEEDED = ["model.path=m", "data.train=d"]


def settings(*arguments: str, recipe: str = "grpo") -> RunConfig:
    return to_settings(compose(RecipeFile(recipe), [*NEEDED, *arguments]))


ODD_PATHS = [
    "/tmp/a=b",
    "/tmp/a(b",
    "/tmp/a#b",
    "/tmp/a, b",
    "/tmp/a b",
    "/tmp/[x]/{y}",
    "[a].jsonl",
    "/tmp/it's",
    '/tmp/5"',
    "/tmp/ü/模型",
    "a&b;c!d^e`f<g>h|i*j?k@l%m+n",
    "1e3",
    "007",
    "true",
    "a\\b",
    "$",
    "/tmp/a$b",
    "a:b",
]


@pytest.mark.parametrize("path", ODD_PATHS)
def test_b90_b91_hydra_reads_any_path_as_itself(path: str) -> None:
    (argument,) = quote_values([f"model.path={path}"])
    override = OverridesParser.create().parse_override(argument)
    assert override.key_or_group == "model.path" and override.value() == path


def test_b90_b91_any_path_is_itself_on_the_command_line_in_python_and_in_yaml(
    tmp_path: Path,
) -> None:
    path = "/tmp/a=b (c) #d, 'e' \"f\" [g] {h} ü~1"
    names = ("model.path", "output_dir", "data.train", "loop.resume")
    mine: dict[str, Any] = {
        "defaults": ["grpo", "_self_"],
        "model": {"path": path},
        "output_dir": path,
        "data": {"train": path},
        "loop": {"resume": path},
    }
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(mine))
    for config in (
        settings(*(f"{name}={path}" for name in names)),
        make_settings("grpo", dict.fromkeys(names, path)),
        to_settings(compose(RecipeFile("mine", tmp_path), [])),
    ):
        assert config.model.path == config.output_dir == config.actor.model.path == path
        assert config.data.train == config.loop.resume == path
    many = settings("data.train=[" + ", ".join(map(quoted, ODD_PATHS)) + "]")
    assert many.data.train == ODD_PATHS


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("[</answer>]", ["</answer>"]),
        ("[</answer>, </s>]", ["</answer>", "</s>"]),
        (r'["\n"]', ["\n"]),
        (r'["\n\n", "a\tb", "\u00fc", "\"", "\\n"]', ["\n\n", "a\tb", "ü", '"', "\\n"]),
        (r"['\n']", ["\\n"]),
        (r"[\n]", ["\\n"]),
        ('["a, b", c d]', ["a, b", "c d"]),
        ("[1, true, 1e3]", ["1", "true", "1e3"]),
        ("[it's, #]", ["it's", "#"]),
        ("[]", []),
        ('["[x]", (, =]', ["[x]", "(", "="]),
    ],
)
def test_b92_stop_strings(text: str, values: list[str]) -> None:
    sampling = settings(f"{STOP}={text}").actor.generation.sampling
    assert sampling.stop_strings == values


def test_b92_the_judges_template_has_line_breaks() -> None:
    """As docs/pipeline.md writes it."""
    argument = r'judge.template="Question:\n{prompt}\n\nAnswer:\n{response}"'
    judge = settings("judge.model.path=j", argument, recipe="generative_reward").judge
    assert judge.template == "Question:\n{prompt}\n\nAnswer:\n{response}"
    raw = settings(r"judge.template=a\n{response}", recipe="generative_reward").judge
    assert raw.template == "a\\n{response}"
    pattern = r'judge.pattern="score: (\d+)"'
    written = settings("judge.verdict=written", pattern, recipe="generative_reward").judge
    assert written.pattern == r"score: (\d+)"


def test_lists_dictionaries_and_numbers_are_what_they_were() -> None:
    config = settings(
        "data.train=[a.jsonl, ~x/y=1.jsonl]",
        "data.columns=[level, 'a b']",
        "data.chat_template_options={enable_thinking: false, n: 3, text: a=b, list: [1, 2]}",
        "actor.train.optimizer.learning_rate=1e-5",
        "loop.stop_at_reward=null",
        "model.tokenizer=null",
        "seed=3",
        "data.chat_template_options.further=[x]",
        "reward.parts={a: {function: 'm:f', weight: 0.5, options: {pattern: '<a>.*</a>'}}}",
        "reward.parts.b.function=m:g",
        "reward.parts.b.options={pattern: <b>}",
        "reward.parts.c.function=m:h",
        "reward.parts.c.options.pattern=<c>",
        "reward.parts.c.options.whole=true",
    )
    assert config.data.train == ["a.jsonl", "~x/y=1.jsonl"]
    assert config.data.columns == ["level", "a b"]
    options = {"enable_thinking": False, "n": 3, "text": "a=b", "list": [1, 2]}
    assert config.data.chat_template_options == options | {"further": ["x"]}
    assert config.actor.train.optimizer.learning_rate == 1e-5 and config.seed == 3
    assert config.loop.stop_at_reward is None and config.model.tokenizer is None
    assert config.reward.parts["b"].options == {"pattern": "<b>"}
    assert config.reward.parts["c"].options == {"pattern": "<c>", "whole": True}


def test_b91_home_and_variables_everywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("DATA", "/data")
    arguments = [
        "model.path=~/m",
        "model.tokenizer=$HOME/t",
        "data.train=[~/a.jsonl,$DATA/b.jsonl]",
        "data.validation=$DATA/c.jsonl",
        "data.chat_template=~/x.jinja",
        'output_dir="~/q"',
        "loop.resume=~/r",
        "plan.calibration=~/c.json",
        "cluster.working_dir=~",
        "reward.model.path=~/reward",
    ]
    home = str(tmp_path)
    for config in (settings(*arguments), make_settings("grpo", arguments)):
        assert (config.model.path, config.model.tokenizer) == (f"{home}/m", f"{home}/t")
        assert config.critic.model.path == f"{home}/m"
        assert config.data.train == [f"{home}/a.jsonl", "/data/b.jsonl"]
        assert config.data.validation == "/data/c.jsonl"
        assert config.data.chat_template == f"{home}/x.jinja"
        assert (config.output_dir, config.loop.resume) == (f"{home}/q", f"{home}/r")
        assert (config.plan.calibration, config.cluster.working_dir) == (f"{home}/c.json", home)
        assert config.reward.model is not None and config.reward.model.path == f"{home}/reward"
    plain = RunConfig(
        model=ModelConfig(path="~/m"), data=DataConfig(train="~/a"), output_dir="$DATA/x"
    )
    assert (plain.actor.model.path, plain.data.train) == (f"{home}/m", f"{home}/a")
    assert plain.output_dir == "/data/x"
    plan = read_arguments(PlanConfig, ["model=~/m #1", "cluster=8xA100-80GB"], paths=PATHS)
    assert plan.model == f"{home}/m #1"


def test_b91_a_variable_that_is_not_set_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NOWHERE", raising=False)
    with pytest.raises(ValueError, match=r"^output_dir is '\$NOWHERE/x', but .* NOWHERE is not"):
        settings("output_dir=$NOWHERE/x")
    with pytest.raises(ValueError, match=r"^data.train is .*variable NOWHERE is not set"):
        settings("data.train=[a,/b/$NOWHERE/x]")


def test_b90_what_hydra_still_refuses_is_one_line() -> None:
    with pytest.raises(ValueError, match=r"data.chat_template_options=\{a: \[1\}") as raised:
        settings("data.chat_template_options={a: [1}")
    assert "\n" not in str(raised.value) and "bracket" in str(raised.value)


def test_b91_an_unknown_reference_says_how_a_variable_is_written() -> None:
    with pytest.raises(ValueError, match=r"^output_dir: .*'HOME' not found; .*written \$NAME$"):
        settings("output_dir=${HOME}/x")


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("actor.loss.entropy_coefficient=nan", "is nan; use a finite number"),
        ("actor.loss.kl_coefficient=inf", "is inf; use a finite number"),
        ("actor.loss.clip_high=-inf", "is -inf; the ratio"),
        ("actor.loss.kl_cov_coefficient=-1", "is -1.0; use 0 or more"),
        ("data.batch_size=99999999999999999999", "use a number of at most 63 bits"),
        ("loop.keep_best=-1", "is -1; use 0 or more"),
        ("cluster.dashboard_port=70000", "is 70000; use a port, 1 to 65535"),
        ("actor.generation.max_num_seqs=0", "is 0; use at least 1"),
        ("actor.generation.gpu_memory_fraction=5", "is 5.0; use a share"),
        ("actor.generation.sampling.temperature=inf", "is inf; use a finite number"),
        ("actor.probe_tolerance=-5", "is -5.0; use 0 or more, or -1"),
        ("actor.train.optimizer.min_learning_rate_fraction=2", "is 2.0; choose 0 to 1"),
        ("data.validation=[{path: a, weight: 2}]", ".* nothing reads a weight; leave it out"),
        ("reward.parts=null", "=null: it can't be null; leave it out"),
    ],
)
def test_a_number_out_of_range_is_named(argument: str, message: str) -> None:
    name = argument.partition("=")[0]
    with pytest.raises(ValueError, match=rf"^{re.escape(name)}\b.*{message}"):
        check_settings("actor", settings(argument).actor)


def test_infinity_is_a_limit_that_lets_everything_through() -> None:
    config = settings("actor.loss.clip_high=inf", "call_timeout_s=inf")
    assert config.actor.loss.clip_high == config.call_timeout_s == math.inf
    check_settings("actor", config.actor)


def test_a_critics_constant_is_a_number_of_tokens() -> None:
    with pytest.raises(ValueError, match=r"^critic\.loss\.aggregation_constant is 0; .*in tokens$"):
        settings("critic.loss.aggregation=constant", recipe="ppo")


def test_rewards_of_weight_0_alone_teach_nothing() -> None:
    config = settings("reward.parts={a: {function: 'workers.rewards:math', weight: 0}}")
    with pytest.raises(ValueError, match=r"^reward\.parts: every weight is 0 \(a\), so that"):
        scorer_settings(config, config.reward)
