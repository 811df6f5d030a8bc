"""recipes.generate and recipes.evaluate in this process: what stands in their files, against
transformers and the files themselves."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
from omegaconf import DictConfig
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from controllers.evaluation import pass_at_k
from hybridflow.metrics import read_samples
from recipes.evaluate import evaluate
from recipes.generate import generate
from recipes.main import to_settings
from recipes.response_files import prompt_text
from recipes.run import run
from tests.tiny import make_data, make_model

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def common(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    directory = tmp_path_factory.mktemp("asking")
    return [
        "runtime=local",
        f"model.path={make_model(directory / 'model', layers=1)}",
        "data.batch_size=3",
        "actor.generation.engine=hf",
        "actor.generation.precision=fp32",
        "actor.generation.sampling.max_response_tokens=6",
    ]


def test_generated_rows_are_the_models_own(
    common: list[str], composed: Callable[..., DictConfig], tmp_path: Path
) -> None:
    data = make_data(tmp_path / "prompts.jsonl", rows=4)
    arguments = [
        f"data.train={data}",
        f"output_dir={tmp_path}",
        "algorithm.samples_per_prompt=2",
        "algorithm.log_probs=true",
    ]
    config = to_settings(composed("generate", [*common, *arguments]))
    path = generate(config)
    assert path == tmp_path / "responses.parquet"
    rows = pq.read_table(path).to_pylist()
    assert [(row["row"], row["sample"], row["answer"]) for row in rows] == [
        (i, s, str(i)) for i in range(4) for s in (0, 1)
    ]
    model = AutoModelForCausalLM.from_pretrained(config.model.path)
    tokenizer = AutoTokenizer.from_pretrained(config.model.path)
    for row in rows[:3]:
        asked = tokenizer(row["prompt"]).input_ids
        with torch.no_grad():
            logits = model(torch.tensor([asked + row["response_ids"]])).logits[
                0, len(asked) - 1 : -1
            ]
        expected = torch.log_softmax(logits, -1).gather(
            1, torch.tensor(row["response_ids"])[:, None]
        )[:, 0]
        torch.testing.assert_close(torch.tensor(row["log_probs"]), expected, atol=1e-5, rtol=1e-5)
        assert row["response"] == tokenizer.decode(row["response_ids"], skip_special_tokens=True)


def test_the_prompt_is_text_that_gives_its_tokens_again() -> None:
    words = Tokenizer(models.WordLevel({str(i): i for i in range(9)}, unk_token="2"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    plain = PreTrainedTokenizerFast(tokenizer_object=words, bos_token="3")
    assert prompt_text(plain, [3, 5, 6]) == "3 5 6" and plain("3 5 6").input_ids == [3, 5, 6]
    words.post_processor = processors.TemplateProcessing(single="3 $A", special_tokens=[("3", 3)])
    adding = PreTrainedTokenizerFast(tokenizer_object=words, bos_token="3")
    assert prompt_text(adding, [3, 5, 6]) == "5 6" and adding("5 6").input_ids == [3, 5, 6]


def test_evaluation_is_what_its_samples_say(
    common: list[str], composed: Callable[..., DictConfig], tmp_path: Path
) -> None:
    data = make_data(tmp_path / "prompts.jsonl", rows=4)
    arguments = [
        *common,
        f"data.validation={data}",
        f"output_dir={tmp_path}",
        "reward.function=tests.runtime.rewards:count",
        "algorithm.samples_per_prompt=3",
        "algorithm.success_reward=0.5",
        "algorithm.pass_at=[1,3]",
    ]
    with pytest.raises(
        ValueError, match=r"samples_per_prompt is 3 with actor\.generation\.sampling\.greedy=true"
    ):
        evaluate(to_settings(composed("evaluate", arguments)))
    arguments += [
        "actor.generation.sampling.greedy=false",
        "actor.generation.sampling.temperature=2",
    ]
    numbers = evaluate(to_settings(composed("evaluate", arguments)))
    assert numbers is not None
    rows = pq.read_table(tmp_path / "samples.parquet").to_pylist()
    assert len(rows) == 12 and {row["row"] for row in rows} == {0, 1, 2, 3}
    passed = [sum(row["reward"] >= 0.5 for row in rows if row["row"] == i) for i in range(4)]
    assert numbers["reward/mean"] == pytest.approx(sum(row["reward"] for row in rows) / 12)
    assert numbers["pass@1"] == pytest.approx(sum(passed) / 12) and numbers[
        "pass@3"
    ] == pytest.approx(pass_at_k(passed, 3, 3))
    shown = read_samples(tmp_path / "samples.jsonl")
    assert len(shown) == 4 and {row["split"] for row in shown} == {"evaluation"}
    first = {row["row"]: row for row in rows if row["sample"] == 0}
    for sample in shown:
        row = first[sample["uid"]]
        assert (sample["response"], sample["reward"]) == (row["response"], row["reward"])
    stored = json.loads((tmp_path / "evaluation.json").read_text())
    assert stored["pass@3"] == numbers["pass@3"] and stored["prompts"] == 4
    with pytest.raises(ValueError, match=r"trains nothing; run python -m recipes\.evaluate"):
        run(to_settings(composed("evaluate", arguments)))
