"""Files to prompts: what comes out is what went in, tokenised as the tokenizer alone would;
what is broken is named."""

from __future__ import annotations

import json
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from omegaconf import OmegaConf
from transformers import PreTrainedTokenizerFast

from controllers.data import DataConfig, Overlong, PromptDataset, RowLoader, load_tokenizer
from controllers.data.sources import read_hub
from controllers.streams import TextStream
from workers.config import ModelConfig

ROWS: list[dict[str, Any]] = [
    {"prompt": "2+2=", "answer": "4", "level": 1, "tests": [{"in": 1}]},
    {"prompt": "Größe?", "answer": "5", "level": 2, "tests": [{"out": [2.5, None]}]},
    {"prompt": [{"role": "user", "content": "Sort 31"}], "answer": "13", "level": 3, "tests": []},
]


def jsonl(path: Path, rows: list[Any]) -> Path:
    lines = [row if isinstance(row, str) else json.dumps(row, ensure_ascii=False) for row in rows]
    path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    return path


def load(
    path: Path | list[str], tokenizer: PreTrainedTokenizerFast, **settings: Any
) -> PromptDataset:
    where = str(path) if isinstance(path, Path) else path
    return PromptDataset.load(DataConfig(train=where, **settings), where, tokenizer)


def test_jsonl_text_and_chat(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    batch = load(jsonl(tmp_path / "a.jsonl", ROWS), tokenizer).all()
    chat = tokenizer.apply_chat_template(
        ROWS[2]["prompt"], add_generation_prompt=True, return_dict=False
    )
    expected = [tokenizer("2+2=").input_ids, tokenizer("Größe?").input_ids, chat]
    assert [ids.tolist() for ids in batch.ragged("prompt_ids").unbind()] == expected
    assert (
        tokenizer.decode(expected[0]).startswith("<|system|>")
        and tokenizer.decode(chat) == "<|user|>Sort 31<|end|><|assistant|>"
    )
    assert batch.ragged("prompt_ids").values.dtype == torch.int64
    assert batch.tensor("uid").tolist() == [0, 1, 2]
    assert batch.objects("extras") == [
        {name: row[name] for name in ("answer", "level", "tests")} for row in ROWS
    ]


def test_parquet_equals_jsonl(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    rows = [
        {"prompt": [{"role": "user", "content": f"Sort {n}"}], "answer": str(n), "n": n, "f": n / 3}
        for n in range(5)
    ]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "b.parquet", row_group_size=2)
    parquet = load(tmp_path / "b.parquet", tokenizer)
    lines = load(jsonl(tmp_path / "b.jsonl", rows), tokenizer)
    assert parquet.fingerprint == lines.fingerprint
    expected = [{name: row[name] for name in ("answer", "n", "f")} for row in rows]
    assert parquet.all().objects("extras") == lines.all().objects("extras") == expected
    both = load([str(tmp_path / "b.jsonl"), str(tmp_path / "*.parquet")], tokenizer)
    directory = load(tmp_path, tokenizer)
    assert (
        len(both) == len(directory) == 10
        and both.fingerprint == directory.fingerprint != parquet.fingerprint
    )
    assert [row["n"] for row in both.rows([9, 0]).objects("extras")] == [4, 0]


def test_renamed_and_chosen_columns(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    path = jsonl(
        tmp_path / "a.jsonl", [{"question": "q", "gold": 7, "response": "old", "level": 1}]
    )
    with pytest.raises(ValueError, match=r"'response'.*data\.columns"):
        load(path, tokenizer, prompt_column="question", answer_column="gold")
    data = load(path, tokenizer, prompt_column="question", answer_column="gold", columns=["level"])
    assert data.all().objects("extras") == [{"answer": 7, "level": 1}]
    assert load(
        path, tokenizer, prompt_column="question", answer_column=None, columns=[]
    ).all().objects("extras") == [{}]


def test_text_as_user_message_and_own_template(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    path = jsonl(tmp_path / "a.jsonl", [{"prompt": "Hi", "answer": ""}])
    (tmp_path / "chat.jinja").write_text("{{ messages[0]['content'] }}{{ suffix }}")
    data = load(path, tokenizer, text_as_user_message=True)
    assert tokenizer.decode(data.all().ragged("prompt_ids")[0]) == "<|user|>Hi<|end|><|assistant|>"
    options = {
        "text_as_user_message": True,
        "chat_template": str(tmp_path / "chat.jinja"),
        "chat_template_options": {"suffix": "!"},
    }
    assert tokenizer.decode(load(path, tokenizer, **options).all().ragged("prompt_ids")[0]) == "Hi!"


def test_long_prompts_are_dropped_and_counted(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, caplog: pytest.LogCaptureFixture
) -> None:
    path = jsonl(tmp_path / "a.jsonl", [{"prompt": "1" * n, "answer": n} for n in (1, 9, 10, 2)])
    with caplog.at_level(logging.WARNING):
        data = load(path, tokenizer, max_prompt_tokens=10)
    assert [row["answer"] for row in data.all().objects("extras")] == [
        1,
        9,
        2,
    ] and data.all().tensor("uid").tolist() == [0, 1, 2]
    assert "dropped 1 of 4" in caplog.text and "the longest has 11" in caplog.text
    with pytest.raises(ValueError, match=r"line 3.*11 tokens.*max_prompt_tokens=10"):
        load(path, tokenizer, max_prompt_tokens=10, overlong=Overlong.error)
    with pytest.raises(ValueError, match="all 4 prompts are over"):
        load(path, tokenizer, max_prompt_tokens=1)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ('{"prompt": "a", answer: 1}', r"line 3: not valid JSON.*character 17"),
        ("[1, 2]", r"line 3: a list, not a JSON object"),
        ({"answer": "1"}, r"line 3: no column 'prompt', it has 'answer'; set data\.prompt_column"),
        ({"prompt": "  ", "answer": "1"}, r"line 3: 'prompt' is empty"),
        ({"prompt": [], "answer": "1"}, r"line 3: 'prompt' is an empty list"),
        ({"prompt": 5, "answer": "1"}, r"line 3: 'prompt' is int '5'"),
        ({"prompt": ["hello"], "answer": "1"}, r"line 3: message 0 .* is a str"),
        ({"prompt": [{"role": "user"}], "answer": "1"}, r"line 3: message 0 .* content=None"),
        (
            {"prompt": [{"role": "assistant", "content": "x"}], "answer": "1"},
            r"line 3: message 0 .* nothing to answer",
        ),
        (
            {"prompt": "a"},
            r"line 3: the answer's column 'answer' is not among 'prompt'; set data\.answer_column",
        ),
        ({"prompt": "a", "answer": None}, r"line 3: the answer's column 'answer' is null"),
    ],
)
def test_broken_rows_are_named(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, row: Any, message: str
) -> None:
    path = jsonl(tmp_path / "bad.jsonl", [ROWS[0], "", row])
    with pytest.raises(ValueError, match=rf"bad\.jsonl, {message}"):
        load(path, tokenizer)


def test_broken_files_are_named(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    (tmp_path / "latin.jsonl").write_bytes(b'{"prompt": "a", "answer": "\xff"}\n')
    (tmp_path / "bad.parquet").write_bytes(b"not parquet at all")
    (tmp_path / "empty.jsonl").write_text("\n")
    pq.write_table(
        pa.Table.from_pylist([{"prompt": "a", "answer": "b", "sound": b"\x00"}]),
        tmp_path / "bytes.parquet",
    )
    (tmp_path / "table.txt").write_text("prompt\n")
    for name, message in (
        ("latin.jsonl", "line 1: not UTF-8"),
        ("bad.parquet", "can't be read as parquet"),
        ("empty.jsonl", "has no rows"),
        ("bytes.parquet", r"row 0.*'sound' \(bytes\).*data\.columns"),
        ("table.txt", "only .jsonl, .json, .parquet, .csv"),
        ("absent.parquet", "there is no such file"),
    ):
        with pytest.raises(ValueError, match=message):
            load(tmp_path / name, tokenizer)


def test_chat_without_template(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    bare = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer)
    with pytest.raises(
        ValueError, match=r"a\.jsonl, line 3: .* no chat template; set data\.chat_template"
    ):
        load(jsonl(tmp_path / "a.jsonl", ROWS), bare)
    template = tmp_path / "strict.jinja"
    template.write_text("{{ raise_exception('only systems') }}")
    with pytest.raises(
        ValueError, match=r"line 3: the chat template rejects the messages \(only systems\)"
    ):
        load(tmp_path / "a.jsonl", tokenizer, chat_template=str(template))


def test_hub_datasets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "hub").mkdir()
    jsonl(tmp_path / "hub" / "train.jsonl", ROWS[:2])
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    rows = list(read_hub(f"{tmp_path / 'hub'}:train"))
    assert [row.values["answer"] for row in rows] == ["4", "5"] and rows[1].place.endswith(
        "row 1 (from 0)"
    )
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match="neither a file nor a dataset"):
        list(read_hub("nobody/has-this"))
    with pytest.raises(ValueError, match="owner/name:config:split"):
        list(read_hub("a:b:c:d"))


def test_config() -> None:
    config = OmegaConf.merge(
        OmegaConf.structured(DataConfig),
        OmegaConf.from_dotlist(["train=a.parquet", "validation=[b,c]"]),
    )
    plain = OmegaConf.to_object(config)
    assert (
        isinstance(plain, DataConfig)
        and plain.train == "a.parquet"
        and plain.validation == ["b", "c"]
    )
    for field, value in (
        ("batch_size", 0),
        ("max_prompt_tokens", 0),
        ("seed", -1),
        ("train", 3),
        ("validation", [1]),
        ("columns", ["answer"]),
    ):
        with pytest.raises(ValueError, match=rf"data\.{field}"):
            DataConfig(**{field: value})


def test_load_tokenizer(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    tokenizer.save_pretrained(tmp_path / "t")
    assert (
        load_tokenizer(ModelConfig(path="unused", tokenizer=str(tmp_path / "t"))).get_vocab()
        == tokenizer.get_vocab()
    )
    with pytest.raises(ValueError, match="no tokenizer at"):
        load_tokenizer(ModelConfig(path=str(tmp_path / "nothing")))


def test_text_of_the_pretraining_distribution_is_cut_into_equal_pieces(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, caplog: pytest.LogCaptureFixture
) -> None:
    """A token a letter, one before each text: 10 tokens are 4 + 3 + 3 of at most 4, 4 stay
    whole; of each piece the first is the prompt."""
    path = jsonl(tmp_path / "text.jsonl", [{"text": "ihgfedcba"}, {"text": "123"}])
    config = DataConfig(
        train="x",
        pretraining=str(path),
        pretraining_tokens=4,
        pretraining_batch_size=4,
        shuffle=False,
    )
    dataset = PromptDataset.load_text(config, str(path), tokenizer)
    pieces = [tokenizer.decode(piece) for piece in dataset.all().ragged("prompt_ids").unbind()]
    assert "".join(pieces) == "<|system|>ihgfedcba<|system|>123" and [
        len(piece) for piece in dataset.all().ragged("prompt_ids").unbind()
    ] == [3, 3, 4, 4]
    batch = TextStream(RowLoader(dataset, replace(config, batch_size=4))).take()
    assert batch.ragged("prompt_ids").lengths.tolist() == [1] * 4 and batch.ragged(
        "response_ids"
    ).lengths.tolist() == [2, 2, 3, 3]
    whole = [
        first.tolist() + rest.tolist()
        for first, rest in zip(*(batch.ragged(n).unbind() for n in COLUMNS), strict=True)
    ]
    assert whole == [piece.tolist() for piece in dataset.all().ragged("prompt_ids").unbind()]


COLUMNS = ("prompt_ids", "response_ids")
