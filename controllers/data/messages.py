"""Chat messages of a row, checked, and the same whichever kind of file they come from."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from typing import Any

from controllers.data.images import image_part, is_image_part
from controllers.data.sources import SourceRow
from hybridflow.wording import kind_of

CONTENTLESS = ("tool_calls", "function_call")
"""Fields of a message that may stand in place of its content."""
MARKS = ("weight", "train", "training", "loss")
"""Fields by which published conversations say whether a turn is learned: 1 or true, 0 or false."""
ALIASES = {
    "human": "user",
    "prompter": "user",
    "gpt": "assistant",
    "bot": "assistant",
    "chatbot": "assistant",
    "model": "assistant",
}
"""Roles of published conversations that no chat template knows, or that are never learned."""
ROLES = ("system", "user", "assistant", "tool", "developer")
BEGINS_AS_MESSAGES = re.compile(
    r"""\s*(array\()?\[?\s*\{\s*['"](role|content|from|value)['"]\s*:"""
)
NAMES_A_ROLE = re.compile(
    r"""['"](role|from)['"]\s*:\s*['"](system|user|assistant|human|gpt)['"]"""
)
"""Both: messages as text, in JSON or as Python prints them."""


def value_of(row: SourceRow, column: str, setting: str) -> Any:
    """The row's value, which must be there; `setting` names the column. "a.b" is the entry b of
    the dictionary in column a."""
    value = find_value(row.values, column)
    if value is MISSING:
        raise ValueError(
            f"{row.place}: no column {column!r}, it has {', '.join(map(repr, row.values))}; set "
            f"{setting} to the right column"
        )
    return value


class _Missing:
    """The value of a column that a row does not have."""


MISSING = _Missing()


def find_value(values: dict[str, Any], column: str) -> Any:
    """The value of a column, or of an entry of a dictionary in one; MISSING where there is
    none."""
    if column in values:
        return values[column]
    value: Any = values
    for name in column.split("."):
        if not isinstance(value, dict) or name not in value:
            return MISSING
        value = value[name]
    return value


def roots(columns: Iterable[str | None]) -> set[str]:
    """The columns that hold what is named: "a" of "a.b", which may be a column itself."""
    names: set[str] = set()
    for column in columns:
        if column is not None:
            names |= {column, column.partition(".")[0]}
    return names


def is_null(value: Any) -> bool:
    """Whether there is no value: null, or the NaN that stands for it in tables."""
    return value is None or (isinstance(value, float) and value != value)


def check_messages(
    row: SourceRow, column: str, setting: str, what: str = "", value: Any = MISSING
) -> list[dict[str, Any]]:
    """The checked messages of a column that holds a conversation, as a list or as JSON text;
    `value` in place of the column's."""
    messages = value
    if value is MISSING:
        messages = _from_json(value_of(row, column, setting))
    if not isinstance(messages, list) or not messages:
        shown = f"{type(messages).__name__} {str(messages)[:60]!r}"
        if messages == []:
            shown = "an empty list"
        raise ValueError(
            f"{row.place}: {column!r} is {shown}; it must be {what}a list of {{role, content}} "
            "messages"
        )
    return [_message(row, column, number, message) for number, message in enumerate(messages)]


def tools_of(row: SourceRow, column: str | None) -> list[Any] | None:
    """The tools that the chat template is given, from a list or JSON text; None without any."""
    if column is None:
        return None
    tools = find_value(row.values, column)
    if tools is MISSING or is_null(tools) or tools in ("", []):
        return None
    if isinstance(tools, str) and tools.strip() == "null":
        return None
    tools = _from_json(tools)
    if isinstance(tools, list):
        tools = [_tool(tool) for tool in tools]
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise ValueError(
            f"{row.place}: {column!r} is {type(tools).__name__} {str(tools)[:60]!r}; it must be a "
            "list of tools, each a dictionary (a JSON schema), or set data.tools_column=null"
        )
    return list(without_nulls(tools))


def _tool(tool: Any) -> Any:
    """A tool that is stored as JSON text."""
    if not isinstance(tool, str):
        return tool
    try:
        return json.loads(tool)
    except json.JSONDecodeError:
        return tool


def without_nulls(value: Any) -> Any:
    """The value without the dictionary entries that are null: parquet puts nulls where other rows
    have an entry."""
    if isinstance(value, dict):
        return {name: without_nulls(inner) for name, inner in value.items() if inner is not None}
    if isinstance(value, list):
        return [without_nulls(inner) for inner in value]
    return value


def text_or_messages(value: Any) -> Any:
    """A prompt as it is meant: text that is the JSON of messages, as tables without lists hold
    it, is those messages; other text stays text."""
    messages = _from_json(value)
    if not isinstance(messages, list) or not messages:
        return value
    for message in messages:
        if not isinstance(message, dict) or "role" not in message:
            return value
    return messages


def check_no_messages(row: SourceRow, column: str, text: str) -> None:
    """A ValueError for text that is messages in a form that is not read: as Python prints a list (what
    pandas writes into a .csv), one message that is no list, or ShareGPT's."""
    if BEGINS_AS_MESSAGES.match(text) and NAMES_A_ROLE.search(text):
        raise ValueError(
            f"{row.place}: {column!r} is text that begins as messages do, {text[:60]!r}, and is no JSON "
            "of a list of {role, content}; store the list, or json.dumps of it"
        )


def _from_json(value: Any) -> Any:
    """A list that is stored as JSON text."""
    if not isinstance(value, str) or not value.lstrip().startswith("["):
        return value
    try:
        return json.loads(value)
    except json.JSONDecodeError:
        return value


def _message(row: SourceRow, column: str, number: int, message: Any) -> dict[str, Any]:
    """The message without nulls, its content as text, or as parts where it has images."""
    place = f"{row.place}: message {number} (from 0) of {column!r}"
    if not isinstance(message, dict):
        raise ValueError(f"{place} is {kind_of(message)}; write {{'role': ..., 'content': ...}}")
    checked: dict[str, Any] = without_nulls(message)
    if "role" not in checked and {"from", "value"} <= set(checked):
        raise ValueError(
            f"{place} has 'from' and 'value'; rename them to role (user, assistant, system) and "
            "content"
        )
    if "role" not in checked and "content" not in checked:
        names = ", ".join(map(repr, checked)) or "nothing"
        raise ValueError(f"{place} has {names}; write {{'role': ..., 'content': ...}}")
    _check_role(place, checked.get("role"))
    if isinstance(checked.get("tool_calls"), list):
        checked["tool_calls"] = [_tool_call(call) for call in checked["tool_calls"]]
    content = checked.get("content")
    if isinstance(content, list) and any(map(is_image_part, content)):
        checked["content"] = content = _parts(place, row, content)
    elif isinstance(content, list):
        checked["content"] = content = _joined(place, content)
    for name in ("role", "content"):
        if name == "content" and content is None and any(map(checked.get, CONTENTLESS)):
            continue
        if name == "content" and isinstance(content, list):
            continue
        if not isinstance(checked.get(name), str):
            raise ValueError(f"{place} has {name}={checked.get(name)!r}; it must be text")
    if not isinstance(content, list):
        check_encodable(place, content or "")
    return checked


def _check_role(place: str, role: Any) -> None:
    """A ValueError for another spelling of a role: a template would write it as it stands, and nothing
    of it would be learned."""
    if isinstance(role, str) and role not in ROLES:
        name = ALIASES.get(role.lower(), role.lower())
        if name in ROLES:
            raise ValueError(f"{place} has the role {role!r}; write {name!r}")


def _tool_call(call: Any) -> Any:
    """The call with its arguments as a dictionary, which chat templates expect; OpenAI's API has them
    as JSON text, of which a template would make text in quotes."""
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("arguments"), str):
        return call
    try:
        arguments = json.loads(function["arguments"] or "{}")
    except json.JSONDecodeError:
        return call
    if not isinstance(arguments, dict):
        return call
    return {**call, "function": {**function, "arguments": without_nulls(arguments)}}


def _parts(place: str, row: SourceRow, parts: list[Any]) -> list[dict[str, Any]]:
    """The content as parts, its images as references."""
    checked = []
    for part in parts:
        if is_image_part(part):
            checked.append(image_part(f"{place}: an image", row, part))
            continue
        text = _joined(place, [part])
        check_encodable(place, text)
        checked.append({"type": "text", "text": text})
    return checked


def _joined(place: str, parts: list[Any]) -> str:
    """The text of a content that comes in parts."""
    texts = []
    for part in parts:
        text = part.get("text") if isinstance(part, dict) else part
        if not isinstance(text, str):
            raise ValueError(
                f"{place} has a content part {str(part)[:60]!r}; only text and images are read"
            )
        texts.append(text)
    return "".join(texts)


def check_encodable(place: str, text: str) -> None:
    """A ValueError for half of a surrogate pair, which no tokenizer takes."""
    if text.isascii():
        return
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{place} has {text[error.start]!r} at character {error.start}, half of a surrogate "
            "pair, which is no text; remove it (text.encode(errors='ignore').decode())"
        ) from None
