"""What people bring as data: every kind of file, directory, hub name and layout gives the same
rows; what is broken is one line with file, row and fix."""

from __future__ import annotations

import bz2
import csv
import gzip
import json
import logging
import lzma
from collections.abc import Callable
from datetime import date, datetime, time
from decimal import Decimal
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from transformers import PreTrainedTokenizerFast

from controllers.data import (
    DemonstrationDataset,
    EqualPairs,
    PairDataset,
    RowDataset,
)
from controllers.data.sources import read
from tests.data.kinds import make
from tests.data.rows import ROWS, answers, lines, load, row_of


def zstandard(data: bytes) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(data)
    return sink.getvalue().to_pybytes()


COMPRESS: dict[str, Callable[[bytes], bytes]] = {
    "": bytes,
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    ".zst": zstandard,
}


def encoded(form: str, rows: list[dict[str, Any]]) -> bytes:
    if form == "json":
        return json.dumps(rows, indent=1).encode()
    if form == "csv":
        cells = ["prompt,answer", *(f'"{row["prompt"]}",{row["answer"]}' for row in rows)]
        return ("\ufeff" + "\r\n".join(cells) + "\r\n").encode()
    if form == "parquet":
        sink = pa.BufferOutputStream()
        pq.write_table(pa.Table.from_pylist(rows), sink)
        return sink.getvalue().to_pybytes()
    return lines(rows)


def test_b02_messages_as_json_text(tmp_path: Path) -> None:
    """A table without lists: the same tokens as from a list. Other text with brackets is text."""
    messages = [{"role": "user", "content": "2+2?"}]
    (tmp_path / "list.jsonl").write_bytes(lines([row_of(prompt=messages)]))
    with (tmp_path / "text.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerows([["prompt", "answer"], [json.dumps(messages), "b"]])
    expected = load(tmp_path / "list.jsonl").all().ragged("prompt_ids").values
    assert torch.equal(load(tmp_path / "text.csv").all().ragged("prompt_ids").values, expected)
    (tmp_path / "other.jsonl").write_bytes(lines([row_of(prompt='[{"content": "2+2?"}]')]))
    tokenizer = make("byte_level", "chatml")
    tokens = load(tmp_path / "other.jsonl", tokenizer=tokenizer).all().ragged("prompt_ids").values
    assert tokenizer.decode(tokens) == '[{"content": "2+2?"}]'


@pytest.mark.parametrize("form", ["jsonl", "json", "parquet", "csv"])
@pytest.mark.parametrize("compression", list(COMPRESS))
@pytest.mark.parametrize("upper", [False, True])
def test_b02_every_format(tmp_path: Path, form: str, compression: str, upper: bool) -> None:
    suffix = f".{form}{compression}"
    path = tmp_path / f"rows{suffix.upper() if upper else suffix}"
    path.write_bytes(COMPRESS[compression](encoded(form, ROWS)))
    dataset = load(path)
    assert answers(dataset) == [row["answer"] for row in ROWS]
    (tmp_path / "plain").mkdir()
    (tmp_path / "plain/rows.jsonl").write_bytes(lines(ROWS))
    assert dataset.fingerprint == load(tmp_path / "plain").fingerprint
    assert (str(path) in dataset.place(2) and "2 (from 0)" in dataset.place(2)) or "line" in (
        dataset.place(2)
    )


def test_b02_a_json_file_of_lines(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_bytes(lines(ROWS))
    assert answers(load(tmp_path / "a.json")) == [row["answer"] for row in ROWS]


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("a.jsonl.gz", b"no gzip", r"can't be read \(BadGzipFile"),
        ("a.jsonl.xz", b"no xz", r"can't be read \(LZMAError"),
        ("a.jsonl.zst", b"no zstandard at all", r"can't be read \(OSError"),
        ("a.jsonl.gz", gzip.compress(lines(ROWS))[:-20], r"can't be read \(EOFError"),
        ("a.json", b'[{"prompt": 1}, ', "not valid JSON"),
        ("a.json", b'[{"prompt": "a", "answer": 1}, 3]', r"row 1 \(from 0\): an int, not a JSON"),
        ("a.csv", b"prompt,answer\na\n", "line 2: 1 cells, and the first line has 2"),
        ("a.csv", b"prompt,answer\na,b,c\n", "line 2: 3 cells, and the first line has 2"),
        ("a.csv", b"prompt,answer\na,\n", r"line 2: the answer's column 'answer' is null"),
        ("a.csv", b"prompt,answer\n\xff,b\n", "not UTF-8"),
        ("a.jsonl", b"[" * 100_000 + b"]" * 100_000, "line 1: JSON that is nested too deeply"),
    ],
)
def test_b02_broken_files(tmp_path: Path, name: str, data: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(data)
    with pytest.raises(ValueError, match=message) as error:
        load(tmp_path / name)
    assert str(tmp_path / name) in str(error.value) and "\n" not in str(error.value)


FAILS = "{{ 1 + messages[0].content }}"


@pytest.mark.parametrize(
    ("row", "message", "options"),
    [
        ('{"prompt": "bad \\ud83d text", "answer": 1}', "half of a surrogate pair", {}),
        (
            '{"prompt": [{"role": "user", "content": "\\udc00"}], "answer": 1}',
            "message 0 .* half of a surrogate pair",
            {},
        ),
        ('{"prompt": "a", "answer": NaN}', "the answer's column 'answer' is null", {}),
        ('{"prompt": NaN, "answer": 1}', "'prompt' is float 'nan'", {}),
        (
            '{"prompt": "a", "reward_model": {"ground_truth": NaN}}',
            "'answer' is null in",
            {},
        ),
        (row_of(prompt=[{"role": "user", "content": "x"}]), "TypeError: unsupported", FAILS),
        (row_of(prompt=[{"role": "user", "content": "x"}]), "undefined", "{{ nothing.at.all }}"),
        (row_of(prompt=[{"role": "user", "content": "x"}]), "IndexError", "{{ [][3].x or a() }}"),
        (row_of(prompt=[{"from": "human", "value": "x"}]), "rename them to role", {}),
        (
            row_of(prompt=[{"role": "user", "content": [{"image": 1}]}]),
            "only text and images are read",
            {},
        ),
        (
            row_of(tools=["search"], prompt=[{"role": "user", "content": "x"}]),
            "'tools' is list",
            {},
        ),
    ],
)
def test_b03_b04_b08_a_rows_mistakes(tmp_path: Path, row: Any, message: str, options: Any) -> None:
    text = row if isinstance(row, str) else json.dumps(row)
    (tmp_path / "bad.jsonl").write_text(json.dumps(ROWS[0]) + "\n" + text + "\n")
    if isinstance(options, str):
        (tmp_path / "own.jinja").write_text(options)
        options = {"chat_template": str(tmp_path / "own.jinja")}
    pattern = rf"bad\.jsonl, line 2: .*({message})"
    if "undefined" in message or "IndexError" in message:
        pattern = r"bad\.jsonl, line 2: the chat template rejects the messages"
    with pytest.raises(ValueError, match=pattern) as error:
        load(tmp_path / "bad.jsonl", **options)
    assert "\n" not in str(error.value)


def test_b04_nan_in_parquet(tmp_path: Path) -> None:
    table = pa.table({"prompt": ["a", "b"], "answer": [1.0, float("nan")]})
    pq.write_table(table, tmp_path / "a.parquet")
    with pytest.raises(ValueError, match=r"row 1 \(from 0\): the answer's column .* is null"):
        load(tmp_path / "a.parquet")


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (Decimal("1.50"), "1.50"),
        (date(2026, 11, 27), "2026-11-27"),
        (datetime(2026, 11, 27, 3, 4, 5), "2026-11-27T03:04:05"),
        (time(3, 4), "03:04:00"),
        ({"on": [date(2026, 11, 27)]}, {"on": ["2026-11-27"]}),
    ],
    ids=str,
)
def test_dates_and_decimals_of_parquet_are_their_text(
    value: Any, text: object, tmp_path: Path
) -> None:
    """As an answer and as a column that may not be read, the same as a .jsonl with the text."""
    pq.write_table(
        pa.table({"prompt": ["a"], "answer": [value], "other": [value]}), tmp_path / "a.parquet"
    )
    (tmp_path / "a.jsonl").write_bytes(lines([{"prompt": "a", "answer": text, "other": text}]))
    for name in ("a.parquet", "a.jsonl"):
        (row,) = load(tmp_path / name).all().objects("extras")
        assert (row["answer"], row["other"]) == (text, text)


def test_b03_b07_demonstrations(tmp_path: Path) -> None:
    begins = [{"role": "assistant", "content": "hello"}, {"role": "user", "content": "a"}]
    for row, message in (
        ({"messages": begins}, "message 0 .* is the assistant's, and nothing stands before"),
        ({"messages": [*begins[1:], {"role": "assistant", "content": "\ud83d"}]}, "surrogate"),
        ({"messages": [{"role": "user"}, begins[0]]}, "content=None"),
    ):
        (tmp_path / "bad.jsonl").write_bytes(lines([row]))
        with pytest.raises(ValueError, match=rf"bad\.jsonl, line 1: .*{message}"):
            load(tmp_path / "bad.jsonl", DemonstrationDataset, messages_column="messages")


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A dataset's directory as the hub has it, offline."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    directory = tmp_path / "openai" / "gsm8k"
    for config in ("main", "socratic"):
        (directory / config).mkdir(parents=True)
        for split, rows in (("train", ROWS), ("test", ROWS[:2])):
            marked = [row | {"config": config} for row in rows]
            path = directory / config / f"{split}-00000-of-00001.parquet"
            pq.write_table(pa.Table.from_pylist(marked), path)
    (directory / "README.md").write_text(
        "---\nconfigs:\n"
        + "".join(
            f"- config_name: {name}\n  data_files:\n  - split: train\n    path: {name}/train-*\n"
            f"  - split: test\n    path: {name}/test-*\n"
            for name in ("main", "socratic")
        )
        + "---\n"
    )
    return tmp_path


@pytest.mark.parametrize(
    ("rest", "config", "count"),
    [
        ("main:train[:3]", "main", 3),
        ("main:train[40%:]", "main", 3),
        ("socratic:test", "socratic", 2),
        ("socratic:train[:1]+test[1:]", "socratic", 2),
    ],
)
def test_b05_hub_names_with_slices(
    hub: Path, monkeypatch: pytest.MonkeyPatch, rest: str, config: str, count: int
) -> None:
    """openai/gsm8k:main:train[:3] by the code that loads from the hub, on a directory of that
    name."""
    monkeypatch.chdir(hub)
    rows = [row.values for row in read(f"openai/gsm8k:{rest}")]
    assert len(rows) == count and {row["config"] for row in rows} == {config}
    absolute = [row.values for row in read(f"{hub}/openai/gsm8k:{rest}")]
    assert absolute == rows


def test_b05_hub_names_are_no_globs(hub: Path) -> None:
    for place in ("openai/gsm8k:main:train[:10]", "openai/gsm8k", "nobody/has:this[:1%]"):
        with pytest.raises(ValueError, match="neither a file nor a dataset that the hub") as error:
            list(read(place))
        assert "\n" not in str(error.value)


def test_b06_a_directory_with_several_splits(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for folder in (tmp_path, tmp_path / "repository" / "data"):
        folder.mkdir(exist_ok=True, parents=True)
        for split, rows in (("train", ROWS), ("test", ROWS[:1])):
            table = pa.Table.from_pylist(rows)
            pq.write_table(table, folder / f"{split}-00000-of-00001.parquet")
    with caplog.at_level(logging.INFO):
        assert len(load(tmp_path)) == len(load(tmp_path / "repository")) == len(ROWS)
    assert "its split train is read, not test" in caplog.text
    with pytest.raises(ValueError, match=r"splits test, train; name one, as in data\.valid"):
        load(tmp_path, field="data.validation")
    (tmp_path / "train-00000-of-00001.parquet").rename(tmp_path / "dev.parquet")
    with pytest.raises(ValueError, match="with the splits test, validation"):
        load(tmp_path)


def test_b06_what_save_to_disk_wrote(tmp_path: Path) -> None:
    table = datasets.Dataset.from_list(ROWS)
    table.save_to_disk(str(tmp_path / "one"))
    datasets.DatasetDict(train=table, test=table.select([0])).save_to_disk(str(tmp_path / "two"))
    assert answers(load(tmp_path / "one")) == answers(load(tmp_path / "two"))


def test_b09_nested_dictionaries_give_the_same_tokens(tmp_path: Path) -> None:
    """Tool calls with different arguments, from parquet, which fills nulls in, and from jsonl."""
    template = tmp_path / "tools.jinja"
    template.write_text(
        "{% if tools %}{{ tools | tojson }}{% endif %}{% for m in messages %}"
        "{{ '<|im_start|>' ~ m.role ~ ' ' ~ (m.content or '') }}"
        "{% for call in m.tool_calls or [] %}{{ call.function.arguments | tojson }}{% endfor %}"
        "{{ '<|im_end|>' }}{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant {% endif %}"
    )
    rows = []
    for arguments in ({"city": "Rome"}, {"zone": "CET"}):
        call = {"function": {"name": "look", "arguments": arguments}}
        properties = {name: {"type": "string"} for name in arguments}
        tool = {"type": "function", "function": {"name": "look", "parameters": properties}}
        rows.append(
            {
                "messages": [
                    {"role": "user", "content": "go"},
                    {"role": "assistant", "tool_calls": [call]},
                ],
                "tools": [tool],
            }
        )
    (tmp_path / "a.jsonl").write_bytes(lines(rows))
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    options = {"messages_column": "messages", "chat_template": str(template)}
    both = []
    for name in ("a.jsonl", "a.parquet"):
        both.append(load(tmp_path / name, DemonstrationDataset, **options))
    assert both[0].fingerprint == both[1].fingerprint
    tokenizer = make("byte_level", "chatml")
    batch = both[0].all()
    for row, values in enumerate(rows):
        expected = tokenizer.apply_chat_template(
            values["messages"],
            tools=values["tools"],
            chat_template=template.read_text(),
            tokenize=False,
        )
        ids = [*batch.ragged("prompt_ids")[row], *batch.ragged("response_ids")[row]]
        assert tokenizer.decode(ids) == expected
    texts = [row | {"tools": json.dumps(row["tools"])} for row in rows]
    (tmp_path / "text.jsonl").write_bytes(lines(texts))
    assert (
        load(tmp_path / "text.jsonl", DemonstrationDataset, **options).fingerprint
        == both[0].fingerprint
    )


def test_b10_tools_reach_the_template_of_prompts(tmp_path: Path) -> None:
    template = tmp_path / "tools.jinja"
    template.write_text("{{ tools[0].name if tools else 'none' }}")
    messages = [{"role": "user", "content": "x"}]
    rows = [row_of(prompt=messages, tools=[{"name": "look"}]), row_of(prompt=messages)]
    (tmp_path / "a.jsonl").write_bytes(lines(rows))
    tokenizer = make("byte_level", "chatml")
    for column, expected in (("tools", "look"), (None, "none")):
        dataset = load(tmp_path / "a.jsonl", chat_template=str(template), tools_column=column)
        ids = dataset.all().ragged("prompt_ids")
        assert [tokenizer.decode(ids[0]), tokenizer.decode(ids[1])] == [expected, "none"]


def test_b10_a_template_that_reads_no_tools(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    messages = [{"role": "user", "content": "x"}]
    rows = [row_of(prompt=messages, tools=[{"name": "look"}])] * 2
    (tmp_path / "a.jsonl").write_bytes(lines(rows))
    load(tmp_path / "a.jsonl")
    assert caplog.text.count("the chat template does not read the tools in column 'tools'") == 1


def texts_of(dataset: RowDataset, tokenizer: PreTrainedTokenizerFast) -> list[str]:
    batch = dataset.all()
    texts = []
    for prompt, response in zip(
        batch.ragged("prompt_ids").unbind(), batch.ragged("response_ids").unbind(), strict=True
    ):
        texts.append(tokenizer.decode(prompt) + "|" + tokenizer.decode(response))
    return texts


HUMAN = "\n\nHuman: Hi\n\nAssistant: Hello\n\nHuman: 2+2?\n\nAssistant:"


def test_b12_hh_rlhf(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Two dialogues: messages where there is a chat template, else text."""
    rows = [
        {"chosen": HUMAN + " 4", "rejected": HUMAN + " 5"},
        {"chosen": HUMAN + " 4", "rejected": "\n\nHuman: other\n\nAssistant: 5"},
        {"chosen": HUMAN + " 4", "rejected": HUMAN + " "},
    ]
    (tmp_path / "a.jsonl").write_bytes(lines(rows))
    chat, text = make("byte_level", "chatml"), make("byte_level")
    shown = texts_of(load(tmp_path / "a.jsonl", PairDataset, chat), chat)
    messages = [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello"},
        {"role": "user", "content": "2+2?"},
    ]
    prompt = chat.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert shown == [f"{prompt}|4<|im_end|>", f"{prompt}|5<|im_end|>"]
    assert texts_of(load(tmp_path / "a.jsonl", PairDataset, text), text) == [
        f"{HUMAN}| 4</s>",
        f"{HUMAN}| 5</s>",
    ]
    assert "1 with conversations that part before their last turn" in caplog.text
    assert "1 with an empty response" in caplog.text
    with pytest.raises(ValueError, match=r"line 2: conversations that part .* data\.equal_pairs"):
        load(tmp_path / "a.jsonl", PairDataset, equal_pairs=EqualPairs.error)


def test_b12_ultrafeedback(tmp_path: Path) -> None:
    question = {"role": "user", "content": "2+2?"}
    pair = {
        name: [question, {"role": "assistant", "content": text}]
        for name, text in (("chosen", "4"), ("rejected", "5"))
    }
    plain = {"prompt": [question], "chosen": "4", "rejected": "5"}
    for name, row in (("a", pair), ("b", {"prompt": "2+2?", **pair}), ("c", plain)):
        (tmp_path / f"{name}.jsonl").write_bytes(lines([row]))
    pq.write_table(pa.Table.from_pylist([pair]), tmp_path / "d.parquet")
    prints = {
        load(tmp_path / name, PairDataset).fingerprint
        for name in ("a.jsonl", "b.jsonl", "c.jsonl", "d.parquet")
    }
    assert len(prints) == 1


def test_b13_equal_pairs_are_counted_and_dropped(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rows = [{"prompt": "a", "chosen": "b", "rejected": text} for text in "bcb"]
    (tmp_path / "a.jsonl").write_bytes(lines(rows))
    assert len(load(tmp_path / "a.jsonl", PairDataset)) == 1
    assert "1 pair, " in caplog.text
    assert "dropped 2 of 3: 2 with the same response in 'chosen' and 'rejected'" in caplog.text
    with pytest.raises(ValueError, match=r"line 1: the same response .* data\.equal_pairs=drop"):
        load(tmp_path / "a.jsonl", PairDataset, equal_pairs=EqualPairs.error)


def test_verls_rows(tmp_path: Path) -> None:
    rows = [
        {
            "data_source": "openai/gsm8k",
            "prompt": [{"role": "user", "content": "2+2?"}],
            "ability": "math",
            "reward_model": {"style": "rule", "ground_truth": "4"},
            "extra_info": {"split": "train", "index": 0},
        }
    ]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    for options in ({}, {"answer_column": "reward_model.ground_truth"}):
        (extras,) = load(tmp_path / "a.parquet", **options).all().objects("extras")
        assert extras == {"answer": "4"} | {k: v for k, v in rows[0].items() if k != "prompt"}
