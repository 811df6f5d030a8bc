"""What a run settles about text, from its settings to what it saves: endings, templates,
vocabularies, stop strings, what a reward reads. In one process, against transformers."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from omegaconf import DictConfig
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForSequenceClassification,
)

from hybridflow.batch import Batch
from hybridflow.columns import Ragged
from hybridflow.group import spawn
from hybridflow.local_pool import LocalPool
from hybridflow.pool import PoolSpec
from recipes.evaluate import evaluate
from recipes.main import to_settings
from recipes.preparation import prepare
from recipes.run import run
from recipes.text_settings import with_text
from tests.data.kinds import END, EOS, PAD, make
from workers.config import ModelConfig, Precision, TrainConfig
from workers.generation.config import SamplingConfig
from workers.generation.sampling import end_token_ids, load_model_config, with_special_stops
from workers.reward import ModelRewardWorker
from workers.role_config import RewardConfig
from workers.sequences import Sequences
from workers.text import ResponseReader
from workers.tokenizer import load_tokenizer

LOCAL = [
    "runtime=local",
    "metrics.console=false",
    "data.batch_size=4",
    "loop.num_steps=1",
    "loop.validate_every=0",
]
GRPO = [
    *LOCAL,
    "actor.generation.engine=hf",
    "actor.generation.precision=fp32",
    "actor.train.precision=fp32",
    "actor.generation.sampling.max_response_tokens=6",
    "algorithm.samples_per_prompt=2",
    "reward.function=tests.recipes.rewards:plain",
]


def model(
    directory: Path,
    *,
    tokenizer_eos: str = EOS,
    config_eos: int | list[int] | None = None,
    generation_eos: int | list[int] | None = None,
    template: str = "chatml",
) -> Path:
    """A tiny Llama with a byte-level tokenizer; eos are ids."""
    tokenizer = make("byte_level", template)
    torch.manual_seed(0)
    language_model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=2,
            max_position_embeddings=128,
            bos_token_id=None,
            eos_token_id=config_eos,
        )
    )
    language_model.generation_config = GenerationConfig(eos_token_id=generation_eos)
    language_model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    settings = json.loads((directory / "tokenizer_config.json").read_text())
    settings["eos_token"] = tokenizer_eos
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))
    return directory


def ids(*tokens: str) -> list[int]:
    return sorted(make("byte_level").convert_tokens_to_ids(list(tokens)))


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def exported(output: Path) -> Path:
    store = output / "checkpoints"
    return store / (store / "latest").read_text().strip() / "huggingface"


@pytest.fixture
def start(composed: Callable[..., DictConfig], tmp_path: Path) -> Callable[..., Any]:
    """start("sft", "model.path=...")"""
    return lambda recipe, *arguments: to_settings(
        composed(recipe, [*arguments, f"output_dir={tmp_path}/out"])
    )


@pytest.mark.parametrize(
    ("tokenizer_eos", "config_eos", "generation_eos", "template", "expected"),
    [
        (EOS, ids(EOS)[0], ids(EOS)[0], "chatml", [EOS, END]),
        (END, ids(EOS)[0], ids(EOS)[0], "chatml", [EOS, END]),
        (EOS, None, None, "chatml", [EOS, END]),
        (EOS, ids(PAD), ids(EOS, PAD), "", [EOS, PAD]),
        (EOS, ids(END), None, "", [EOS, END]),
        (EOS, 300, ids(EOS)[0], "", [EOS]),
    ],
    ids=["B20", "B21", "no eos in generation_config", "lists", "config alone", "class default"],
)
def test_b20_b21_all_that_end_a_response(
    tmp_path: Path,
    tokenizer_eos: str,
    config_eos: Any,
    generation_eos: Any,
    template: str,
    expected: list[str],
) -> None:
    """The union of tokenizer, template, generation_config and config, lists too; an ordinary token
    that config.json alone names (its class's default) is none."""
    path = model(
        tmp_path / "m",
        tokenizer_eos=tokenizer_eos,
        config_eos=config_eos,
        generation_eos=generation_eos,
        template=template,
    )
    settings = ModelConfig(path=str(path))
    assert list(end_token_ids(settings, load_model_config(settings))) == ids(*expected)
    chosen = replace(settings, end_token_ids=[7])
    assert end_token_ids(chosen, load_model_config(chosen)) == (7,)


def test_b21_the_tokenizer_of_another_directory(tmp_path: Path) -> None:
    path = model(tmp_path / "m", config_eos=ids(EOS)[0], generation_eos=ids(EOS)[0], template="")
    make("byte_level", "chatml").save_pretrained(tmp_path / "t")
    settings = ModelConfig(path=str(path), tokenizer=str(tmp_path / "t"))
    assert list(end_token_ids(settings, load_model_config(settings))) == ids(EOS, END)


def test_b20_generation_after_sft_stops_where_a_turn_ends(
    tmp_path: Path, start: Callable[..., Any]
) -> None:
    """The export's generation_config names the end of a turn, so transformers stops there."""
    path = model(tmp_path / "m", config_eos=ids(EOS)[0], generation_eos=ids(EOS)[0])
    turns = [{"role": "user", "content": "1"}, {"role": "assistant", "content": "4"}]
    data = write(tmp_path / "rows.jsonl", [{"messages": turns}] * 4)
    run(
        start(
            "sft",
            *LOCAL,
            f"model.path={path}",
            f"data.train={data}",
            "data.messages_column=messages",
            "policy.train.precision=fp32",
            "policy.train.optimizer.learning_rate=1e-2",
            "loop.num_steps=40",
        )
    )
    saved = exported(tmp_path / "out")
    assert GenerationConfig.from_pretrained(saved).eos_token_id == ids(EOS, END)
    tokenizer = AutoTokenizer.from_pretrained(saved)
    language_model = AutoModelForCausalLM.from_pretrained(saved)
    inputs = tokenizer.apply_chat_template(
        turns[:1], add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    output = language_model.generate(**inputs, max_new_tokens=8, do_sample=False)
    answer = tokenizer.decode(output[0, inputs["input_ids"].shape[1] :])
    assert answer == f"4{END}"
    asked = write(tmp_path / "asked.jsonl", [{"prompt": turns[:1], "answer": "4"}])
    evaluation = start(
        "evaluate",
        *GRPO[:-2],
        "reward.function=tests.recipes.rewards:plain",
        f"model.path={saved}",
        f"data.validation={asked}",
        "actor.generation.sampling.greedy=true",
    )
    numbers = evaluate(replace(evaluation, output_dir=str(tmp_path / "evaluated")))
    assert numbers is not None and numbers["response_tokens/finished"] == 1.0, numbers


def test_prompts_are_kept_by_the_pass_rates_that_evaluate_wrote(
    tmp_path: Path, start: Callable[..., Any]
) -> None:
    path = model(tmp_path / "m", template="", generation_eos=ids(EOS)[0])
    rows = [{"prompt": text, "answer": text} for text in ("ab", "cd", "ef")]
    data = write(tmp_path / "rows.jsonl", rows)
    evaluate(
        start(
            "evaluate",
            *GRPO[:-2],
            "reward.function=tests.data.test_text_of_a_run:passes_the_second",
            f"model.path={path}",
            f"data.validation={data}",
        )
    )
    settings = start(
        "grpo",
        *GRPO,
        f"model.path={path}",
        f"data.train={data}",
        "data.pass_rate=[0.5,1]",
        f"data.pass_rates={tmp_path}/out/pass_rates.jsonl",
    )
    train = prepare(settings).train
    assert [row["answer"] for row in train.all().objects("extras")] == ["cd"]


def passes_the_second(*, answer: str, **columns: object) -> float:
    return float(answer == "cd")


@pytest.mark.parametrize("name", ["train", "validation"])
@pytest.mark.parametrize("recipe", ["sft", "dpo", "grpo", "reward_model"])
def test_b25_tokens_beyond_the_vocabulary(
    tmp_path: Path, start: Callable[..., Any], recipe: str, name: str
) -> None:
    """One line with file, row and role before anything starts, in any role and set."""
    path = model(tmp_path / "m", template="", config_eos=1, generation_eos=1)
    tokenizer = AutoTokenizer.from_pretrained(path)
    size = len(tokenizer)
    tokenizer.add_tokens(["<new>", "<newer>"])
    tokenizer.save_pretrained(path)
    good = {"prompt": "ab", "response": "c", "chosen": "c", "rejected": "d", "answer": "x"}
    bad = dict.fromkeys(good, "a<newer>") | {"rejected": "e"}
    sets = {"train": [good], "validation": [good], name: [good, bad]}
    arguments = ["data.columns=[]"]
    for each, rows in sets.items():
        arguments.append(f"data.{each}={write(tmp_path / f'{each}.jsonl', rows)}")
    settings = start(
        recipe, *(GRPO if recipe == "grpo" else LOCAL), f"model.path={path}", *arguments
    )
    with pytest.raises(
        ValueError,
        match=rf"{name}\.jsonl, line 2: token {size + 1} .* is outside the vocabulary of",
    ):
        prepare(settings)


def test_b30_stop_strings_that_are_special_tokens(
    tmp_path: Path, start: Callable[..., Any]
) -> None:
    path = model(tmp_path / "m", template="", generation_eos=ids(EOS)[0])
    data = write(tmp_path / "rows.jsonl", [{"prompt": "ab", "answer": "x"}])
    settings = start("grpo", *GRPO, f"model.path={path}", f"data.train={data}")
    sampling = replace(settings.actor.generation.sampling, stop_strings=[END, "."])
    tokenizer = load_tokenizer(settings.model)
    settled = with_text(
        replace(
            settings,
            actor=replace(
                settings.actor, generation=replace(settings.actor.generation, sampling=sampling)
            ),
        ),
        tokenizer,
    ).actor.generation.sampling
    assert settled.stop_strings == ["."] and settled.stop_token_ids == ids(END)
    with pytest.raises(
        ValueError, match=r"'<\|im_end\|>' in it is a special token.*stop_token_ids"
    ):
        with_special_stops(SamplingConfig(stop_strings=[f"a{END}"]), tokenizer, "sampling")


def test_b50_the_export_has_the_template_that_was_trained_with(
    tmp_path: Path, start: Callable[..., Any]
) -> None:
    """data.chat_template, its options and model.tokenizer of another directory."""
    path = model(tmp_path / "m", generation_eos=ids(EOS)[0])
    make("byte_level", "gemma").save_pretrained(tmp_path / "t")
    (tmp_path / "own.jinja").write_text(
        "\n{% for m in messages %}{{ (mark or '-') + m.content + eos_token }}{% endfor %}"
        "{% if add_generation_prompt %}{{ mark }}{% endif %}"
    )
    turns = [{"role": "user", "content": "1"}, {"role": "assistant", "content": "4"}]
    data = write(tmp_path / "rows.jsonl", [{"messages": turns}] * 4)
    run(
        start(
            "sft",
            *LOCAL,
            f"model.path={path}",
            f"model.tokenizer={tmp_path}/t",
            f"data.train={data}",
            "data.messages_column=messages",
            f"data.chat_template={tmp_path}/own.jinja",
            "+data.chat_template_options.mark='>'",
            "policy.train.precision=fp32",
        )
    )
    saved = AutoTokenizer.from_pretrained(exported(tmp_path / "out"))
    expected = make("byte_level").apply_chat_template(
        turns, chat_template=(tmp_path / "own.jinja").read_text(), tokenize=False, mark=">"
    )
    assert saved.apply_chat_template(turns, tokenize=False) == expected
    other = saved.apply_chat_template(turns, tokenize=False, mark="+")
    assert other == expected.replace(">1", "+1").replace(">4", "+4"), (
        "options are defaults, not constants"
    )


def test_b51_the_token_that_is_scored(tmp_path: Path) -> None:
    """A reward model with pad == eos: what transformers scores, in a batch."""
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        num_labels=1,
        pad_token_id=5,
        eos_token_id=5,
    )
    reference = Qwen2ForSequenceClassification(config).eval()
    reference.save_pretrained(tmp_path / "rm")
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path / "rm")
    rows = [[7, 8, 9, 5], [7, 5, 8], [9, 10, 5, 5]]
    batch = Batch.of(
        prompt_ids=Ragged.of([np.array(row[:1]) for row in rows]),
        response_ids=Ragged.of([np.array(row[1:]) for row in rows]),
        finish_reason=["stop"] * len(rows),
        num_tokens=torch.tensor([len(row) for row in rows]),
    )
    settings = RewardConfig(
        model=ModelConfig(path=str(tmp_path / "rm")),
        train=TrainConfig(precision=Precision.fp32),
    )
    with LocalPool(PoolSpec()) as pool:
        scores = spawn(ModelRewardWorker, pool, settings, role="reward").compute_reward(batch)
        scores = scores.tensor("rewards")
    longest = max(map(len, rows))
    padded = torch.tensor([row + [5] * (longest - len(row)) for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows])
    with torch.no_grad():
        expected = loaded(padded, attention_mask=mask).logits[:, 0]
        alone = torch.cat([loaded(torch.tensor([row])).logits[:, 0] for row in rows])
    torch.testing.assert_close(scores, alone, atol=1e-5, rtol=0)
    torch.testing.assert_close(scores, expected, atol=1e-5, rtol=0)


def test_b51_rows_of_padding_alone_keep_a_token() -> None:
    rows = Sequences(
        token_ids=torch.tensor([5, 5, 5, 1, 2, 5]),
        lengths=torch.tensor([3, 3]),
        scored_lengths=torch.tensor([2, 1]),
    ).without_trailing(5)
    assert rows.token_ids.tolist() == [5, 1, 2] and rows.lengths.tolist() == [1, 2]
    assert rows.scored_lengths.tolist() == [0, 0]


def test_b29_what_a_reward_reads() -> None:
    """Special tokens stay in a response's text, the ones that end and pad it do not."""
    tokenizer = make("byte_level", "chatml")
    row = tokenizer(f"<|im_start|>ab{END}{PAD}{EOS}", add_special_tokens=False)["input_ids"]
    ends = ids(END, EOS)
    assert ResponseReader(tokenizer, ends)([row]) == ["<|im_start|>ab"]
    without = ResponseReader(tokenizer, ends, special_tokens=False)
    assert without([row]) == ["ab"]
    assert without.describe() == "<unk>, <s>, </s>, <pad>, <|im_start|>, <|im_end|>"
    assert ResponseReader(tokenizer, ends).describe() == "<s>, </s>, <pad>, <|im_end|>"
