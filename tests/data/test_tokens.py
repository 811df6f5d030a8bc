"""Tokens of prompt + response over tokenizers of every kind and templates that strip or add:
decoding gives back the text, the prompt's tokens are a prefix, the end is learned once."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from controllers.data import DataConfig, DemonstrationDataset, PairDataset, PromptDataset
from controllers.data.rows import RowDataset
from tests.data.kinds import BOS, END, ENDS, EOS, KINDS, LOSSLESS, TEMPLATES, make
from workers.text import PieceTokenizer, turn_ending

WORDS = st.text(alphabet="ab c12=+.\n,?xYZ-", min_size=1, max_size=12)
TEXTS = WORDS.filter(lambda text: text.strip() != "")


def load(
    kind: type[RowDataset], rows: list[dict[str, Any]], tokenizer: Any, **options: Any
) -> RowDataset:
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "rows.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return kind.load(DataConfig(train=str(path), **options), str(path), tokenizer)


def parts(dataset: RowDataset, row: int = 0) -> list[list[int]]:
    """Prompt, response and mask of a row."""
    batch = dataset.all()
    names = [name for name in ("prompt_ids", "response_ids", "loss_mask") if name in batch]
    return [batch.ragged(name)[row].tolist() for name in names]


def decoded(tokenizer: PreTrainedTokenizerFast, ids: list[int]) -> str:
    return tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)


def plain(tokenizer: PreTrainedTokenizerFast, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def letters(tokenizer: PreTrainedTokenizerFast, ids: list[int]) -> str:
    """The tokens as the vocabulary writes them, one after the other."""
    return "".join(tokenizer.convert_ids_to_tokens(ids))


@pytest.mark.parametrize("kind", LOSSLESS)
@settings(max_examples=60, deadline=None)
@example(texts=["1", " 1"])
@given(texts=st.lists(TEXTS, min_size=2, max_size=4))
def test_b22_pieces_decode_to_the_text(kind: str, texts: list[str]) -> None:
    tokenizer = make(kind)
    (pieces,) = PieceTokenizer(tokenizer)([texts])
    whole = [token for piece in pieces for token in piece]
    expected = plain(tokenizer, "".join(texts))
    if kind.startswith("metaspace"):
        # The decoder drops every space of the first token, wherever it stands: compare the tokens.
        assert letters(tokenizer, whole) == letters(tokenizer, expected)
    else:
        assert decoded(tokenizer, whole) == decoded(tokenizer, expected)
    assert pieces[0] == plain(tokenizer, texts[0]), "what generation sees"


@pytest.mark.parametrize("kind", sorted(KINDS))
@pytest.mark.parametrize("add_bos", [False, True])
@pytest.mark.parametrize("add_eos", [False, True])
def test_b22_b23_text_prompt_and_response(kind: str, add_bos: bool, add_eos: bool) -> None:
    """{"prompt": "ab=", "response": "c"} is ab=c and an end, with one beginning where the
    tokenizer has one, and no end after the prompt."""
    tokenizer = make(kind, add_bos=add_bos, add_eos=add_eos)
    rows = [{"prompt": "ab=", "response": "c"}, {"prompt": "Answer: ", "response": "yes"}]
    dataset = load(DemonstrationDataset, rows, tokenizer)
    prompts = load(
        PromptDataset, [{"prompt": row["prompt"]} for row in rows], tokenizer, answer_column=None
    )
    for row, text in enumerate(rows):
        prompt, response, mask = parts(dataset, row)
        bos = [tokenizer.bos_token_id] * add_bos
        assert prompt == bos + plain(tokenizer, text["prompt"])
        assert prompt == prompts.all().ragged("prompt_ids")[row].tolist()
        assert response[-1] == tokenizer.eos_token_id and mask == [1] * len(response)
        assert (prompt + response).count(tokenizer.eos_token_id) == 1
        shown = decoded(tokenizer, (prompt + response)[add_bos:-1])
        if kind in LOSSLESS:
            assert shown == text["prompt"] + text["response"]
        elif kind == "word_piece":
            joint = plain(tokenizer, text["prompt"] + text["response"])
            assert shown == decoded(tokenizer, joint)


def test_b24_a_text_that_spells_its_beginning_has_one() -> None:
    tokenizer = make("byte_level", add_bos=True, add_eos=True)
    rows = [{"prompt": f"{BOS}ab", "response": f"c{EOS}"}, {"prompt": "ab", "response": "c"}]
    dataset = load(DemonstrationDataset, rows, tokenizer)
    assert parts(dataset, 0) == parts(dataset, 1)
    assert parts(dataset, 0)[0].count(tokenizer.bos_token_id) == 1
    pairs = [{"prompt": f"{BOS}ab", "chosen": "c", "rejected": f"d{EOS}"}]
    prompt, chosen = parts(load(PairDataset, pairs, tokenizer))
    assert prompt == parts(dataset, 1)[0] and chosen == parts(dataset, 1)[1]


@pytest.mark.parametrize("kind", LOSSLESS)
@pytest.mark.parametrize("template", sorted(TEMPLATES))
@settings(max_examples=25, deadline=None)
@given(contents=st.lists(TEXTS, min_size=4, max_size=4))
def test_b20_b22_conversations(kind: str, template: str, contents: list[str]) -> None:
    """The response decodes to the template's text up to the end of the last turn; each turn's
    learned tokens are its words and one end."""
    tokenizer = make(kind, template)
    roles = ["user", "assistant", "user", "assistant"]
    messages = [{"role": r, "content": c} for r, c in zip(roles, contents, strict=True)]
    dataset = load(
        DemonstrationDataset, [{"messages": messages}], tokenizer, messages_column="messages"
    )
    prompt, response, mask = parts(dataset)
    asked = tokenizer.apply_chat_template(messages[:1], tokenize=False, add_generation_prompt=True)
    assert prompt == plain(tokenizer, asked), "what generation sees"
    end = tokenizer.convert_tokens_to_ids(ENDS[template])
    learned = [token for token, counts in zip(response, mask, strict=True) if counts]
    assert learned.count(end) == 2 and learned[-1] == response[-1] == end
    whole = tokenizer.apply_chat_template(messages, tokenize=False)
    ended = whole[: whole.rindex(ENDS[template]) + len(ENDS[template])]
    assert decoded(tokenizer, prompt + response) == decoded(tokenizer, plain(tokenizer, ended))


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_b20_what_is_learned_of_a_turn(kind: str) -> None:
    """REALITY B20: learned is `4 <|im_end|>`, and no line break after it; the same where the text
    spells its end already, and in a pair."""
    tokenizer = make(kind, "chatml")
    question = {"role": "user", "content": "1"}
    for words in ("4", f"4{END}", f"4{END}\n"):
        answer = {"role": "assistant", "content": words}
        rows = [{"messages": [question, answer]}]
        prompt, response, mask = parts(
            load(DemonstrationDataset, rows, tokenizer, messages_column="messages")
        )
        assert all(mask) and response[-1] == tokenizer.convert_tokens_to_ids(END)
        assert decoded(tokenizer, response[:-1]).strip() == "4"
        pair = [{"prompt": [question], "chosen": [answer], "rejected": "5"}]
        assert parts(load(PairDataset, pair, tokenizer)) == [prompt, response]


def test_b20_a_template_that_ends_no_turn(caplog: pytest.LogCaptureFixture) -> None:
    """The tokenizer's end is learned after the last turn, which is said."""
    tokenizer = make("byte_level", "none")
    with tempfile.NamedTemporaryFile("w", suffix=".jinja") as file:
        file.write("{% for m in messages %}{{ m.role + ': ' + m.content + '\n' }}{% endfor %}")
        file.flush()
        rows = [{"prompt": [{"role": "user", "content": "1"}], "response": "4"}]
        _, response, mask = parts(
            load(DemonstrationDataset, rows, tokenizer, chat_template=file.name)
        )
    assert response[-1] == tokenizer.eos_token_id and all(mask)
    assert "writes no token that ends an assistant's turn" in caplog.text


@pytest.mark.parametrize("template", sorted(TEMPLATES))
def test_b20_what_ends_a_turn(template: str) -> None:
    tokenizer = make("byte_level", template)
    ending = turn_ending(tokenizer)
    assert ending is not None
    assert ending.token_id == tokenizer.convert_tokens_to_ids(ENDS[template])
    assert ending.text[: ending.end].endswith(ENDS[template])
