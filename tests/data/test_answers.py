"""Demonstrations and pairs: which tokens are learned, against the chat template itself; what is
broken is named."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from controllers.data import (
    DataConfig,
    DemonstrationDataset,
    EqualPairs,
    Overlong,
    PairDataset,
    RowDataset,
    SafetyPairDataset,
)

USER = {"role": "user", "content": "Sort 31"}
ANSWER = {"role": "assistant", "content": "13"}
MORE = {"role": "user", "content": "Sort 9870"}
LAST = {"role": "assistant", "content": "0789"}
CONVERSATION = [{"role": "system", "content": "be short"}, USER, ANSWER, MORE, LAST]
LINE_BREAKS = (
    "{% for m in messages %}<|{{m.role}}|>{{m.content}}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
FORGETS = (
    "{% for m in messages %}{% if m.role == 'user' or loop.last %}"
    "<|{{m.role}}|>{{m.content}}<|end|>{% endif %}{% endfor %}"
)


def load(
    kind: type[RowDataset],
    path: Path,
    rows: list[dict[str, Any]],
    tokenizer: PreTrainedTokenizerFast,
    **settings: Any,
) -> RowDataset:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return kind.load(DataConfig(train=str(path), **settings), str(path), tokenizer)


def learned(
    dataset: RowDataset, tokenizer: PreTrainedTokenizerFast, row: int = 0
) -> tuple[str, list[str]]:
    """The prompt's text, and the learned stretches of the response."""
    batch = dataset.all()
    prompt, ids, mask = (
        batch.ragged(name)[row].tolist() for name in ("prompt_ids", "response_ids", "loss_mask")
    )
    stretches: list[list[int]] = []
    for place, (token, counts) in enumerate(zip(ids, mask, strict=True)):
        if counts and (place == 0 or not mask[place - 1]):
            stretches.append([])
        if counts:
            stretches[-1].append(token)
    return tokenizer.decode(prompt), [tokenizer.decode(stretch) for stretch in stretches]


def test_only_assistant_turns_are_learned(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    dataset = load(
        DemonstrationDataset,
        tmp_path / "a.jsonl",
        [{"messages": CONVERSATION}],
        tokenizer,
        messages_column="messages",
    )
    assert learned(dataset, tokenizer) == (
        "<|system|>be short<|end|><|user|>Sort 31<|end|><|assistant|>",
        ["13<|end|>", "0789<|end|>"],
    )
    batch = dataset.all()
    whole = tokenizer.apply_chat_template(CONVERSATION, return_dict=False)
    assert [
        *batch.ragged("prompt_ids")[0].tolist(),
        *batch.ragged("response_ids")[0].tolist(),
    ] == whole
    assert batch.tensor("num_tokens").tolist() == [len(whole)]


def test_what_the_template_writes_after_a_turn_is_not_learned(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    (tmp_path / "chat.jinja").write_text(LINE_BREAKS)
    settings: dict[str, Any] = {
        "messages_column": "messages",
        "chat_template": str(tmp_path / "chat.jinja"),
    }
    dataset = load(
        DemonstrationDataset,
        tmp_path / "a.jsonl",
        [{"messages": [*CONVERSATION, MORE]}],
        tokenizer,
        **settings,
    )
    assert learned(dataset, tokenizer)[1] == ["13<|end|>", "0789<|end|>"]
    assert (
        tokenizer.decode(dataset.all().ragged("response_ids")[0])
        == "13<|end|>\n<|user|>Sort 9870<|end|>\n<|assistant|>0789<|end|>"
    )


def test_prompt_and_response_columns(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    rows = [
        {"prompt": "2+2=", "response": "4"},
        {"prompt": [USER, ANSWER, MORE], "response": [LAST]},
    ]
    dataset = load(DemonstrationDataset, tmp_path / "a.jsonl", rows, tokenizer)
    assert learned(dataset, tokenizer, 0) == ("<|system|>2+2=", ["4<|end|>"]), (
        "the tokenizer's own beginning, and an end to learn"
    )
    prompt = "<|user|>Sort 31<|end|><|assistant|>13<|end|><|user|>Sort 9870<|end|><|assistant|>"
    assert learned(dataset, tokenizer, 1) == (prompt, ["0789<|end|>"]), (
        "earlier turns are part of the prompt"
    )


def test_pairs_are_two_rows_with_one_prompt(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    rows = [
        {
            "prompt": [USER],
            "chosen": "13",
            "rejected": "31",
            "chosen_safe": True,
            "rejected_safe": False,
        },
        {
            "prompt": "a",
            "chosen": "b",
            "rejected": [{"role": "assistant", "content": "cd"}],
            "chosen_safe": 1,
            "rejected_safe": 1,
        },
    ]
    batch = load(SafetyPairDataset, tmp_path / "a.jsonl", rows, tokenizer).rows([1, 0])
    texts = [tokenizer.decode(ids) for ids in batch.ragged("response_ids").unbind()]
    assert texts == ["b<|end|>", "cd<|end|>", "13<|end|>", "31<|end|>"]
    assert [len(ids) for ids in batch.ragged("prompt_ids").unbind()][:2] == [2, 2]
    assert batch.tensor("chosen").tolist() == [True, False] * 2 and batch.tensor(
        "pair"
    ).tolist() == [
        1,
        1,
        0,
        0,
    ]
    assert batch.tensor("harm_sign").tolist() == [-1.0, -1.0, -1.0, 1.0]


@pytest.mark.parametrize(
    ("kind", "row", "settings", "message"),
    [
        (
            DemonstrationDataset,
            {"prompt": "a"},
            {},
            r"no column 'response', it has 'prompt'; set data\.response_column \(or data\.mess",
        ),
        (
            DemonstrationDataset,
            {"response": "a"},
            {},
            r"no column 'prompt'.* set data\.prompt_column",
        ),
        (DemonstrationDataset, {"prompt": "a", "response": " "}, {}, "'response' is empty"),
        (
            DemonstrationDataset,
            {"prompt": "a", "response": 4},
            {},
            "'response' is int '4'; it must be the response as text",
        ),
        (
            DemonstrationDataset,
            {"m": [USER]},
            {"messages_column": "m"},
            "no message has the role 'assistant'",
        ),
        (
            DemonstrationDataset,
            {"m": "hello"},
            {"messages_column": "m"},
            "'m' is str 'hello'; it must be a list of {role, content}",
        ),
        (
            DemonstrationDataset,
            {"m": [{"role": "user"}, ANSWER]},
            {"messages_column": "m"},
            "message 0 .* has content=None",
        ),
        (
            DemonstrationDataset,
            {"m": CONVERSATION},
            {"messages_column": "m", "chat_template": FORGETS},
            "the chat template writes the first messages",
        ),
        (
            PairDataset,
            {"prompt": "a", "chosen": "b"},
            {},
            r"no column 'rejected'.* set data\.rejected_column",
        ),
        (
            PairDataset,
            {"prompt": "a", "chosen": "b", "rejected": "b"},
            {"equal_pairs": EqualPairs.error},
            "the same response in 'chosen' and 'rejected', which prefers nothing",
        ),
        (
            SafetyPairDataset,
            {"prompt": "a", "chosen": "b", "rejected": "c"},
            {},
            r"no column 'chosen_safe'.* data\.chosen_safe_column",
        ),
        (
            SafetyPairDataset,
            {
                "prompt": "a",
                "chosen": "b",
                "rejected": "c",
                "chosen_safe": "yes",
                "rejected_safe": True,
            },
            {},
            r"'chosen_safe' is 'yes'; it must be true \(safe\) or false",
        ),
    ],
)
def test_broken_rows_are_named(
    tmp_path: Path,
    tokenizer: PreTrainedTokenizerFast,
    kind: type[RowDataset],
    row: dict[str, Any],
    settings: dict[str, Any],
    message: str,
) -> None:
    if "chat_template" in settings:
        (tmp_path / "chat.jinja").write_text(settings["chat_template"])
        settings = {**settings, "chat_template": str(tmp_path / "chat.jinja")}
    with pytest.raises(ValueError, match=rf"bad\.jsonl, line 1: {message}"):
        load(kind, tmp_path / "bad.jsonl", [row], tokenizer, **settings)


def test_a_model_without_chat_template_is_named(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    template, tokenizer.chat_template = tokenizer.chat_template, None
    try:
        with pytest.raises(
            ValueError, match=r"the tokenizer has no chat template; set data\.chat_template"
        ):
            load(
                DemonstrationDataset,
                tmp_path / "a.jsonl",
                [{"m": CONVERSATION}],
                tokenizer,
                messages_column="m",
            )
    finally:
        tokenizer.chat_template = template


def test_long_rows_are_dropped_by_their_own_limit(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    rows = [{"prompt": "a", "chosen": "1" * n, "rejected": "2"} for n in (3, 9)]
    assert len(load(PairDataset, tmp_path / "a.jsonl", rows, tokenizer, max_tokens=8)) == 1
    with pytest.raises(ValueError, match=r"12 tokens, over data\.max_tokens=8"):
        load(
            PairDataset,
            tmp_path / "a.jsonl",
            rows,
            tokenizer,
            max_tokens=8,
            overlong=Overlong.error,
        )


@pytest.mark.parametrize("num_rows", [1, 3])
def test_the_log_counts_tokens_without_their_mask(
    num_rows: int,
    tmp_path: Path,
    tokenizer: PreTrainedTokenizerFast,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Of a pair the prompt once and both responses."""
    caplog.set_level(logging.INFO)
    row = {"prompt": "Sort 31", "response": "13", "chosen": "13", "rejected": "0789"}
    for kind, noun, names in (
        (DemonstrationDataset, "demonstration", ("prompt", "response")),
        (PairDataset, "pair", ("prompt", "chosen", "rejected")),
    ):
        caplog.clear()
        load(kind, tmp_path / "rows.jsonl", [row] * num_rows, tokenizer)
        texts = [tokenizer(row["prompt"]).input_ids]
        for name in names[1:]:
            ids = tokenizer(row[name], add_special_tokens=False).input_ids
            texts.append([*ids, tokenizer.eos_token_id])
        plural = "" if num_rows == 1 else "s"
        expected = f"{num_rows} {noun}{plural}, {sum(map(len, texts)):.1f} tokens each on average"
        assert caplog.messages[-1].endswith(expected)
