"""The quickstart's task, model and preparation (a warm start of a few steps; the real one is a
run of 200)."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from rich.console import Console
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    Qwen2ForCausalLM,
)

from controllers.data import DataConfig, PromptDataset
from recipes.quickstart.__main__ import main, recipe_command, summarise
from recipes.quickstart.model import ModelShape, make_model, make_tokenizer
from recipes.quickstart.prepare import PrepareConfig, Prepared, prepare
from recipes.quickstart.reward import exact_match
from recipes.quickstart.task import MOST_DIGITS, TaskConfig, make_examples
from recipes.quickstart.warm_start import (
    IGNORED,
    WarmStartConfig,
    greedy_accuracy,
    learned,
    padded,
    prompt_ids,
    tokenize,
)

SMALL = PrepareConfig(
    task=TaskConfig(num_train=200, num_test=40),
    warm_start=WarmStartConfig(num_steps=3, batch_size=8),
)


@pytest.fixture(scope="module", autouse=True)
def one_torch_thread() -> Iterator[None]:
    """Tiny matrices: on a busy machine more threads wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Prepared:
    return prepare(
        tmp_path_factory.mktemp("quickstart"), seed=5, config=SMALL, console=Console(quiet=True)
    )


def test_examples() -> None:
    config = TaskConfig(num_train=3000, num_test=300, wanted_fraction=0.2)
    train, test = make_examples(config, seed=1)
    assert (train, test) == make_examples(config, seed=1) != make_examples(config, seed=2)
    assert (len(train), len(test)) == (3000, 300)
    assert not {example.question for example in train} & {example.question for example in test}
    long = []
    for example in train:
        digits = example.question.removeprefix("Sort ")
        assert (
            example.answer == "".join(sorted(digits))
            and len(set(digits)) == len(digits) <= MOST_DIGITS
        )
        assert example.demonstration == example.answer or (
            len(digits) > 4 and example.demonstration == example.answer[::-1]
        )
        long += [example.demonstration == example.answer] * (len(digits) > 4)
    assert abs(sum(long) / len(long) - 0.2) < 0.03


def test_reward() -> None:
    assert exact_match("Sort 21", "12", answer="12", finish_reason="stop", level=3) == 1.0
    assert exact_match("Sort 21", " 12\n", answer="12") == 1.0
    assert [exact_match("Sort 21", wrong, answer="12") for wrong in ("21", "1 2", "", "123")] == [
        0.0
    ] * 4


def test_tokenizer_round_trip() -> None:
    tokenizer = make_tokenizer()
    for text in ("Sort 40821", "résumé ☃\n\t{}", "So rt", "a <|b|>  c"):
        assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.tokenize("Sort 40") == ["Sort", "Ġ", "4", "0"]
    assert tokenizer.decode(prompt_ids(tokenizer, "Sort 1")) == "<|user|>Sort 1<|end|><|assistant|>"
    assert tokenizer.decode(prompt_ids(tokenizer, "Sort 1"), skip_special_tokens=True) == "Sort 1"


def test_labels_are_the_responses() -> None:
    tokenizer = make_tokenizer()
    rows = [
        tokenize(tokenizer, example)
        for example in make_examples(TaskConfig(num_train=5, num_test=1), seed=0)[0]
    ]
    inputs, labels = padded([learned(*row) for row in rows])
    for (prompt, response), tokens, targets in zip(
        rows, inputs.tolist(), labels.tolist(), strict=True
    ):
        whole = prompt + response
        assert tokens[: len(whole) - 1] == whole[:-1]
        assert targets == [IGNORED] * (len(prompt) - 1) + response + [IGNORED] * (
            len(targets) - len(whole) + 1
        )


def test_model_is_what_others_load(prepared: Prepared) -> None:
    model = AutoModelForCausalLM.from_pretrained(prepared.model_path)
    tokenizer = AutoTokenizer.from_pretrained(prepared.model_path)
    files = {path.name for path in prepared.model_path.iterdir()}
    assert {
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    } <= files
    assert (
        1e6
        <= prepared.num_parameters
        == sum(parameter.numel() for parameter in model.parameters())
        <= 5e6
    )
    assert (
        model.dtype == torch.float32
        and model.config.hidden_size // model.config.num_attention_heads == 32
    )
    assert tokenizer.get_vocab() == make_tokenizer().get_vocab()
    assert len(tokenizer) == model.config.vocab_size and model.config.vocab_size % 8 == 0
    assert (
        model.generation_config.eos_token_id
        == tokenizer.eos_token_id
        != tokenizer.pad_token_id
        == model.config.pad_token_id
    )
    critic = AutoModelForSequenceClassification.from_pretrained(prepared.model_path, num_labels=1)
    assert torch.equal(critic.model.embed_tokens.weight, model.model.embed_tokens.weight)


def test_data_is_what_the_pipeline_reads(prepared: Prepared) -> None:
    tokenizer = AutoTokenizer.from_pretrained(prepared.model_path)
    config = DataConfig(train=str(prepared.train_path), validation=str(prepared.test_path))
    train, test = make_examples(SMALL.task, seed=5)
    for path, examples in ((config.train, train), (config.validation, test)):
        batch = PromptDataset.load(config, path, tokenizer).all()
        assert [ids.tolist() for ids in batch.ragged("prompt_ids").unbind()] == [
            prompt_ids(tokenizer, example.question) for example in examples
        ]
        assert batch.objects("extras") == [{"answer": example.answer} for example in examples]


def test_accuracy_equals_transformers_generate(prepared: Prepared) -> None:
    """A model that was trained to the end on a few questions, so that some answers are right,
    others not."""
    tokenizer = AutoTokenizer.from_pretrained(prepared.model_path)
    model = AutoModelForCausalLM.from_pretrained(prepared.model_path)
    assert isinstance(model, Qwen2ForCausalLM)
    examples = make_examples(SMALL.task, seed=5)[0][:12]
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    inputs, labels = padded([learned(*tokenize(tokenizer, example)) for example in examples])
    for _ in range(25):
        logits = model(input_ids=inputs, use_cache=False).logits
        torch.nn.functional.cross_entropy(
            logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORED
        ).backward()
        optimizer.step()
        optimizer.zero_grad()
    right = 0
    for example in examples:
        prompt = torch.tensor([prompt_ids(tokenizer, example.question)])
        drawn = model.generate(
            prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=10, do_sample=False
        )[0, prompt.shape[1] :]
        right += tokenizer.decode(drawn, skip_special_tokens=True) == example.answer
    assert 0 < right < len(examples)
    assert greedy_accuracy(model, tokenizer, examples) == right / len(examples)


def test_preparation_is_deterministic_and_found_again(prepared: Prepared, tmp_path: Path) -> None:
    """Another directory and number of threads: the same weights. The same directory: found.
    Other settings: made anew."""
    quiet, threads = Console(quiet=True), torch.get_num_threads()
    torch.set_num_threads(2)
    torch.rand(3)
    again = prepare(tmp_path, seed=5, config=SMALL, console=quiet)
    assert torch.get_num_threads() == 2
    torch.set_num_threads(threads)
    name = "model.safetensors"
    assert (again.model_path / name).read_bytes() == (prepared.model_path / name).read_bytes()
    assert again.test_path.read_bytes() == prepared.test_path.read_bytes()

    written = (again.model_path / name).stat().st_mtime_ns
    assert prepare(tmp_path, seed=5, config=SMALL, console=quiet) == again
    assert (again.model_path / name).stat().st_mtime_ns == written
    other = prepare(tmp_path, seed=6, config=SMALL, console=quiet)
    assert (
        other.accuracy == json.loads((tmp_path / "prepared.json").read_text())["result"]["accuracy"]
    )
    assert (other.model_path / name).read_bytes() != (prepared.model_path / name).read_bytes()


def test_tied_model() -> None:
    """For the tests of what tied embeddings break elsewhere."""
    tokenizer = make_tokenizer()
    tied = make_model(tokenizer, ModelShape(tie_word_embeddings=True), seed=0)
    assert tied.lm_head.weight is tied.model.embed_tokens.weight
    first, second = (make_model(tokenizer, ModelShape(), seed=3).state_dict() for _ in range(2))
    assert all(torch.equal(value, second[name]) for name, value in first.items())


def test_the_command_names_every_setting_once(prepared: Prepared, tmp_path: Path) -> None:
    overrides = ["data.batch_size=8", "num_devices=1", "loop.num_steps=2"]
    command = recipe_command("ppo", prepared, tmp_path, overrides)
    names = [setting.partition("=")[0] for setting in command[2:]]
    assert len(names) == len(set(names))
    assert set(overrides) <= set(command)


def test_a_finished_run_is_left_as_it_is(tmp_path: Path) -> None:
    """`make quickstart` a second time: the recipe has nothing to do and says so, and the table is
    shown again."""
    summary = {"accuracy_before": 0.1, "accuracy_after": 0.9, "num_steps": 40}
    (tmp_path / "summary.json").write_text(json.dumps(summary))
    assert summarise(tmp_path) == summary
    assert json.loads((tmp_path / "summary.json").read_text()) == summary


def test_the_directory_is_set_where_it_is_read(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The curves of an earlier run would be shown."""
    monkeypatch.setattr("sys.argv", ["quickstart", "output_dir=elsewhere"])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    assert (
        "output_dir=elsewhere: the quickstart reads what it shows from --output"
        in capsys.readouterr().err
    )
