"""Rows as other tools publish them: either the tokens that their authors mean, or one line that says
what can't be read. Never a column, a turn or a mark that is passed over without a word."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from controllers.data import DemonstrationDataset, PairDataset, SafetyPairDataset
from tests.data.kinds import make
from tests.data.rows import ROWS, lines, load, row_of

CHAT = make("byte_level", "chatml")


def user(content: str) -> dict[str, Any]:
    return {"role": "user", "content": content}


def assistant(content: str, **marks: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content, **marks}


SYSTEM = {"role": "system", "content": "s"}


def learned(directory: Path, messages: list[dict[str, Any]]) -> str:
    """The text of the tokens that are learned."""
    (directory / "a.jsonl").write_bytes(lines([{"messages": messages}]))
    batch = load(
        directory / "a.jsonl", DemonstrationDataset, CHAT, messages_column="messages"
    ).all()
    (response,), (mask,) = batch.ragged("response_ids").unbind(), batch.ragged("loss_mask").unbind()
    return str(CHAT.decode(response[mask]))


def pair(directory: Path, **row: Any) -> list[tuple[str, str]]:
    """The texts of prompt and response, of the chosen and the rejected one."""
    (directory / "a.jsonl").write_bytes(lines([row]))
    batch = load(directory / "a.jsonl", PairDataset, CHAT).all()
    prompts, responses = batch.ragged("prompt_ids"), batch.ragged("response_ids")
    return [(CHAT.decode(prompts[n]), CHAT.decode(responses[n])) for n in (0, 1)]


def expected(messages: list[dict[str, Any]], *answers: str) -> list[tuple[str, str]]:
    prompt = CHAT.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    return [(str(prompt), f"{answer}<|im_end|>") for answer in answers]


def test_turns_of_weight_0_are_context(tmp_path: Path) -> None:
    turns = [user("a"), assistant("b", weight=0), user("c"), assistant("d", weight=1)]
    assert learned(tmp_path, turns) == "d<|im_end|>"
    turns = [user("a"), assistant("b"), user("c"), assistant("d", weight=0)]
    assert learned(tmp_path, turns) == "b<|im_end|>"
    for mark in ("train", "training", "loss"):
        turns = [
            user("a"),
            assistant("b", **{mark: False}),
            user("c"),
            assistant("d", **{mark: True}),
        ]
        assert learned(tmp_path, turns) == "d<|im_end|>"
    for weight, message in ((0, "has the weight 0, so there is nothing"), (0.5, "weight=0.5")):
        with pytest.raises(ValueError, match=rf"a\.jsonl, line 1: .*{message}"):
            learned(tmp_path, [user("a"), assistant("b", weight=weight)])


def test_responses_as_json_text_are_messages(tmp_path: Path) -> None:
    answers = {
        name: json.dumps([assistant(text)]) for name, text in (("chosen", "4"), ("rejected", "5"))
    }
    assert pair(tmp_path, prompt=[user("q")], **answers) == expected([user("q")], "4", "5")
    whole = {
        name: json.dumps([user("q"), assistant(text)])
        for name, text in (("chosen", "4"), ("rejected", "5"))
    }
    assert pair(tmp_path, **whole) == expected([user("q")], "4", "5")
    rows = [{"prompt": "q", "response": json.dumps([assistant("4")])}]
    (tmp_path / "b.jsonl").write_bytes(lines(rows))
    batch = load(tmp_path / "b.jsonl", DemonstrationDataset, CHAT).all()
    assert CHAT.decode(batch.ragged("response_ids")[0]) == "4</s>"


@pytest.mark.parametrize(
    "before",
    [[user("q")], [SYSTEM, user("q")], [SYSTEM, user("q"), assistant("x"), user("y")]],
)
def test_the_prompt_of_a_pair_is_never_dropped(
    tmp_path: Path, before: list[dict[str, Any]]
) -> None:
    """Conversations that go on behind the prompt, that repeat it, and that leave out its system's
    message."""
    tails = [[assistant("m"), user("n"), assistant(text)] for text in "45"]
    wanted = expected([*before, assistant("m"), user("n")], "4", "5")
    repeated = [before + tail for tail in tails]
    without_system = [[turn for turn in turns if turn != SYSTEM] for turns in repeated]
    for chosen, rejected in (tails, repeated, without_system):
        assert pair(tmp_path, prompt=before, chosen=chosen, rejected=rejected) == wanted
    with pytest.raises(ValueError, match="'prompt' is a conversation with which 'chosen' or"):
        pair(tmp_path, prompt=[user("other")], chosen=repeated[0], rejected=repeated[1])
    with pytest.raises(ValueError, match="'prompt' is text, and the conversations in 'chosen' and"):
        pair(tmp_path, prompt="q", chosen=tails[0], rejected=tails[1])


TOOLS = (
    "{% for m in messages %}{{ '<|im_start|>' ~ m.role ~ ' ' ~ (m.content or '') }}"
    "{% for call in m.tool_calls or [] %}{{ call.function.arguments | tojson }}{% endfor %}"
    "{{ '<|im_end|>' }}{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant {% endif %}"
)


def test_arguments_of_tool_calls_as_json_text(tmp_path: Path) -> None:
    """As OpenAI's API has them: templates write dictionaries, and would write text in quotes. A pair
    may be a call and words."""
    (tmp_path / "own.jinja").write_text(TOOLS)
    prints = set()
    for arguments in ({"city": "Rome"}, '{"city": "Rome"}'):
        call = {"type": "function", "function": {"name": "look", "arguments": arguments}}
        row = {
            "chosen": [user("q"), {"role": "assistant", "tool_calls": [call]}],
            "rejected": [user("q"), assistant("5")],
        }
        (tmp_path / "a.jsonl").write_bytes(lines([row]))
        dataset = load(
            tmp_path / "a.jsonl", PairDataset, CHAT, chat_template=str(tmp_path / "own.jinja")
        )
        prints.add(dataset.fingerprint)
    assert len(prints) == 1
    assert CHAT.decode(dataset.all().ragged("response_ids")[0]) == '{"city": "Rome"}<|im_end|>'


@pytest.mark.parametrize("form", ["csv", "jsonl", "json", "parquet"])
def test_two_columns_of_one_name(tmp_path: Path, form: str) -> None:
    path = tmp_path / f"a.{form}"
    if form == "parquet":
        cells = [pa.array([cell]) for cell in "abc"]
        pq.write_table(pa.Table.from_arrays(cells, ["prompt", "answer", "answer"]), path)
    elif form == "csv":
        path.write_text("prompt,answer,answer\na,b,c\n")
    else:
        text = '{"prompt": "a", "answer": "b", "answer": "c"}'
        path.write_text(f"[{text}]" if form == "json" else text)
    with pytest.raises(ValueError, match=r"'answer'.*rename or remove one") as error:
        load(path)
    assert str(path) in str(error.value) and "\n" not in str(error.value)


def test_a_directory_has_files_about_its_rows(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "dataset_infos.json").write_text('{"default": {}}')
    (tmp_path / "data" / "train-00000-of-00001.jsonl").write_bytes(lines(ROWS))
    (tmp_path / "data" / "._train-00000-of-00001.jsonl").write_bytes(b"\0\5\x16\7Mac OS X")
    assert len(load(tmp_path)) == len(ROWS)


def test_columns_that_nothing_reads_are_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Alpaca's `input` is half of the question."""
    row = {"instruction": "Add", "input": "2 2", "output": "4"}
    (tmp_path / "a.jsonl").write_bytes(lines([row, row]))
    options = {"prompt_column": "instruction", "response_column": "output"}
    load(tmp_path / "a.jsonl", DemonstrationDataset, CHAT, **options)
    assert caplog.text.count("nothing reads the columns input") == 1
    caplog.clear()
    pair(tmp_path, prompt="q", chosen="4", rejected="5", margin=2)
    assert caplog.text.count("nothing reads the columns margin") == 1
    caplog.clear()
    (tmp_path / "a.jsonl").write_bytes(lines([row_of(level=3)]))
    load(tmp_path / "a.jsonl")
    assert "nothing reads" not in caplog.text


def test_a_turn_of_which_nothing_is_written_is_named(tmp_path: Path) -> None:
    """It would teach to end at once; as context it may stay."""
    call = {"type": "function", "function": {"name": "look", "arguments": {}}}
    for turn in (assistant(""), assistant("  "), assistant("", tool_calls=[call])):
        turns = [user("a"), turn, user("c"), assistant("d")]
        with pytest.raises(
            ValueError, match=r"line 1: message 1 \(from 0\) is the assistant's, and"
        ):
            learned(tmp_path, turns)
        assert learned(tmp_path, [user("a"), turn | {"weight": 0}, *turns[2:]]) == "d<|im_end|>"


@pytest.mark.parametrize(
    ("role", "name"),
    [("human", "user"), ("User", "user"), ("prompter", "user"), ("SYSTEM", "system")],
)
def test_roles_of_another_name_are_refused(tmp_path: Path, role: str, name: str) -> None:
    """A template would write them as they stand."""
    (tmp_path / "a.jsonl").write_bytes(lines([row_of(prompt=[{"role": role, "content": "q"}])]))
    with pytest.raises(ValueError, match=rf"of 'prompt' has the role '{role}'; write '{name}'"):
        load(tmp_path / "a.jsonl", tokenizer=CHAT)
    with pytest.raises(ValueError, match=r"has the role 'gpt'; write 'assistant'"):
        learned(tmp_path, [user("q"), assistant("a"), {"role": "gpt", "content": "b"}])
    with pytest.raises(ValueError, match=r"\(the roles are 'narrator', 'user'\)"):
        learned(tmp_path, [user("q"), {"role": "narrator", "content": "b"}])


@pytest.mark.parametrize(
    "text",
    [
        str([user("q")]),
        json.dumps(user("q")),
        json.dumps([{"from": "human", "value": "q"}]),
        "[{'content': 'q' * 2000, 'role': 'user'}]",
        "array([{'role': 'user', 'content': 'q'}], dtype=object)",
    ],
)
def test_messages_that_became_text_are_refused(tmp_path: Path, text: str) -> None:
    """What pandas writes of a list into a .csv is not JSON."""
    (tmp_path / "a.jsonl").write_bytes(lines([row_of(prompt=text)]))
    with pytest.raises(ValueError, match=r"line 1: 'prompt' is text that begins as messages do"):
        load(tmp_path / "a.jsonl")
    (tmp_path / "a.jsonl").write_bytes(
        lines([row_of(prompt='[{"name": "role", "value": "user"}]')])
    )
    assert len(load(tmp_path / "a.jsonl")) == 1


def test_dialogues_that_begin_with_their_prompt(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """It stands there once."""
    prompt, before = "\n\nHuman: q\n\nAssistant:", [user("q")]
    dialogues = {"chosen": f"{prompt} 4", "rejected": f"{prompt} 5"}
    assert pair(tmp_path, prompt=prompt, **dialogues) == expected(before, "4", "5")
    assert pair(tmp_path, **dialogues) == expected(before, "4", "5")
    with pytest.raises(
        ValueError, match="'prompt' is text with which the dialogues in 'chosen' and"
    ):
        pair(tmp_path, prompt="\n\nHuman: other\n\nAssistant:", **dialogues)
    with pytest.raises(ValueError, match="1 with two turns of the assistant at the end"):
        pair(tmp_path, chosen=f"{prompt} 4\n\nAssistant: 5", rejected=f"{prompt} 4\n\nAssistant: 6")
    caplog.clear()
    pair(tmp_path, prompt="Two and", chosen="Two and two", rejected="Two and three")
    assert caplog.text.count("'chosen' begins with the prompt, so it stands there twice") == 1


def test_entries_that_the_template_does_not_write_are_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    turns = [user("q"), assistant("4", reasoning_content="2+2"), user("r"), assistant("5")]
    assert learned(tmp_path, turns) == "4<|im_end|>5<|im_end|>"
    assert caplog.text.count("does not write 'reasoning_content' of the messages") == 1
    caplog.clear()
    template = CHAT.chat_template.replace(
        "m['content']", "(m.reasoning_content or '') + m['content']"
    )
    (tmp_path / "own.jinja").write_text(template)
    dataset = load(
        tmp_path / "a.jsonl",
        DemonstrationDataset,
        CHAT,
        messages_column="messages",
        chat_template=str(tmp_path / "own.jinja"),
    )
    assert CHAT.decode(dataset.all().ragged("response_ids")[0]).startswith("2+24<|im_end|>")
    assert "does not write" not in caplog.text


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            '{"prompt": "a", "answer": ' + "9" * 5000 + "}",
            "line 1: .*5000 digits; store the number as",
        ),
        (
            '{"prompt": [{"role": "x\\ud800", "content": "a"}], "answer": 1}',
            "line 1: the chat template's text has .* half of a surrogate pair",
        ),
        (
            '{"prompt": [{"input": "a", "output": "b"}], "answer": 1}',
            "has 'input', 'output'; write",
        ),
    ],
)
def test_values_that_nothing_takes_are_named(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "a.jsonl").write_text(text)
    with pytest.raises(ValueError, match=rf"a\.jsonl, {message}|{message}") as error:
        load(tmp_path / "a.jsonl")
    assert str(tmp_path) in str(error.value) and "\n" not in str(error.value)


def test_tools_as_json_texts_and_broken_ones(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    reads = CHAT.chat_template.replace("{% for m in", "{{ tools | tojson if tools }}{% for m in", 1)
    (tmp_path / "own.jinja").write_text(reads)
    tool = {"name": "look"}
    prints = set()
    for tools in ([tool], [json.dumps(tool)], json.dumps([tool]), json.dumps([json.dumps(tool)])):
        (tmp_path / "a.jsonl").write_bytes(lines([row_of(prompt=[user("q")], tools=tools)]))
        dataset = load(
            tmp_path / "a.jsonl", tokenizer=CHAT, chat_template=str(tmp_path / "own.jinja")
        )
        prints.add(CHAT.decode(dataset.all().ragged("prompt_ids")[0]))
    assert len(prints) == 1 and prints.pop().startswith('[{"name": "look"}]<|im_start|>user')
    (tmp_path / "a.jsonl").write_bytes(lines([row_of(prompt=[user("q")], tools={"name": "look"})]))
    with pytest.raises(ValueError, match=r"a\.jsonl, line 1: 'tools' is dict"):
        load(tmp_path / "a.jsonl", tokenizer=CHAT)
    caplog.clear()
    (tmp_path / "a.jsonl").write_bytes(lines([row_of(tools=[tool]), row_of(tools="null")]))
    load(tmp_path / "a.jsonl", tokenizer=CHAT)
    assert caplog.text.count("the prompt is text, which no chat template gives the tools") == 1


@pytest.mark.parametrize(
    ("cell", "message"),
    [
        ('"a \\"b\\" c",1\n', "line 2: ',' expected after '\"'"),
        ('"a,1\nb,2\n', "line 2: unexpected end of data"),
        ('"a"b,1\n', "line 2: ',' expected after '\"'"),
    ],
)
def test_quotes_of_a_csv_are_never_guessed(tmp_path: Path, cell: str, message: str) -> None:
    (tmp_path / "a.csv").write_text(f"prompt,answer\n{cell}")
    with pytest.raises(ValueError, match=rf"a\.csv, {message}; correct the row"):
        load(tmp_path / "a.csv")


def test_a_map_with_two_equal_keys(tmp_path: Path) -> None:
    maps = pa.array([[("a", 1), ("a", 2)]], pa.map_(pa.string(), pa.int64()))
    columns = {"prompt": ["a"], "answer": ["b"], "m": maps}
    pq.write_table(pa.table(columns), tmp_path / "a.parquet")
    with pytest.raises(ValueError, match=r"a\.parquet': one of .* has a map with two equal keys; "):
        load(tmp_path / "a.parquet")


def test_labels_of_a_csv_are_texts(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text(
        "prompt,chosen,rejected,chosen_safe,rejected_safe\nq,4,5,True,false\nq,6,7,false,TRUE\n"
    )
    batch = load(tmp_path / "a.csv", SafetyPairDataset, CHAT).all()
    assert batch.tensor("harm_sign").tolist() == [-1.0, 1.0, 1.0, -1.0]
    (tmp_path / "a.csv").write_text(
        "prompt,chosen,rejected,chosen_safe,rejected_safe\nq,4,5,yes,no\n"
    )
    with pytest.raises(ValueError, match="'chosen_safe' is 'yes'; it must be true"):
        load(tmp_path / "a.csv", SafetyPairDataset, CHAT)


@pytest.mark.parametrize(
    "row",
    [
        {
            "prompt": "q",
            "answers": [{"answer": "a", "rank": 1}, {"answer": "b", "rank": 2}],
        },  # Nectar
        {"prompt": "q", "completion": "a", "label": True},  # KTO
        {"prompt": "q", "response": "a", "helpfulness": 4},  # HelpSteer
        {"instruction": "q", "completions": [{"response": "a", "overall_score": 1}]},
    ],
)
def test_responses_that_are_no_pair_yet(tmp_path: Path, row: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"line 1: neither a column 'chosen' .*or make pairs of"):
        pair(tmp_path, **row)


@pytest.mark.parametrize(
    ("template", "role"),
    [
        ("{% for m in messages if m.role != 'system' %}{{ m.content }}{% endfor %}", "system"),
        ("{% for m in messages %}{{ m.role ~ (m.content if loop.first) }}{% endfor %}", "user"),
    ],
)
def test_roles_that_the_template_leaves_out_are_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, template: str, role: str
) -> None:
    rows = [row_of(prompt=[{"role": "system", "content": "be short"}, user(f"{n}?")]) for n in "34"]
    (tmp_path / "a.jsonl").write_bytes(lines(rows))
    load(tmp_path / "a.jsonl", tokenizer=CHAT)
    assert "does not write" not in caplog.text
    (tmp_path / "own.jinja").write_text(template)
    load(tmp_path / "a.jsonl", tokenizer=CHAT, chat_template=str(tmp_path / "own.jinja"))
    assert caplog.text.count("does not write the content of a message") == 1
    assert f"of the role '{role}' as it stands" in caplog.text
