"""Arguments of tools as their annotations want them, and results as the policy reads them."""

from __future__ import annotations

import asyncio
import json
import typing
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from enum import Enum, IntEnum
from typing import Any, ClassVar, Literal, NamedTuple, NewType, NotRequired, Optional, TypedDict

import numpy as np
import pytest
import torch
from pydantic import BaseModel

from tests.agents.chat import conversation, saying
from workers.agents.arguments import fitted, schema_of
from workers.agents.interfaces import as_episode
from workers.agents.outcome import EnvironmentMistake
from workers.agents.tools import schemas_of, text_of, toolbox, use


class Color(Enum):
    red = "r"
    blue = "b"


class Level(IntEnum):
    low = 1
    high = 2


class Share(Enum):
    half = 0.5
    all = 2.0


@dataclass
class Point:
    x: int
    tags: list[str] = field(default_factory=list)


class Pair(NamedTuple):
    left: int
    right: int = 0


@dataclass
class Folder:
    """A tree, with what nobody gives to make one."""

    name: str
    inner: list[Folder] = field(default_factory=list)
    size: int = field(init=False, default=0)
    limit: ClassVar[int] = 3


class Row(TypedDict):
    name: str


class Entry(TypedDict):
    """Its annotations are text here, which typing's own list of keys does not read."""

    name: str
    size: NotRequired[int]


Number = NewType("Number", int)


class Order(BaseModel):
    item: str
    count: int = 1


@pytest.mark.parametrize(
    "value, hint, result",
    [
        ({"left": 1}, Pair, Pair(1)),
        ({"name": "a"}, Row, {"name": "a"}),
        ({"item": "a"}, Order, Order(item="a")),
        ([{"item": "a", "count": 2}], list[Order], [Order(item="a", count=2)]),
        ([1, "a"], tuple[int, str], (1, "a")),
        ([1, 2, 3], tuple[int, ...], (1, 2, 3)),
        (3, int, 3),
        (3, float, 3),
        (None, Optional[int], None),  # noqa: UP045
        (None, int | str | None, None),
        ("a", int | str, "a"),
        ([1, 2], list[int], [1, 2]),
        ({"a": [None, 1]}, dict[str, list[int | None]], {"a": [None, 1]}),
        ("b", Literal["a", "b"], "b"),
        ("r", Color, Color.red),
        (1, Level, Level.low),
        (2, Share, Share.all),
        (True, Literal[1, True], True),
        (None, Literal["a", None], None),
        ([1, 2], Sequence[int], [1, 2]),
        ([{"x": 1}], Iterable[Point], [Point(x=1)]),
        ([1], typing.List, [1]),  # noqa: UP006
        ({"a": 1}, Mapping[str, int], {"a": 1}),
        ([1, 1], set[int], {1}),
        (["a"], frozenset, frozenset("a")),
        ([7], list[Number], [7]),
        ({"name": "a"}, Entry, {"name": "a"}),
        ({"x": 1}, Point, Point(x=1)),
        ([{"x": 1, "tags": ["a"]}], list[Point], [Point(x=1, tags=["a"])]),
        ({"any": "thing"}, Any, {"any": "thing"}),
        ([1, "a"], list, [1, "a"]),
    ],
)
def test_values_that_fit(value: Any, hint: Any, result: Any) -> None:
    assert fitted(value, hint, "f: p") == result
    assert type(fitted(value, hint, "f: p")) is type(result)


@pytest.mark.parametrize(
    "value, hint, message",
    [
        ("2", int, 'f: p is "2", which is no int'),
        (True, float, "f: p is true, which is no float"),
        (None, str, "f: p is null, which is no str"),
        ("2", int | None, 'f: p is "2", which is no int'),
        ([1, "2"], list[int], r'f: p\[1\] is "2", which is no int'),
        (3, list[int], r"f: p is 3, which is no list\[int\]"),
        ("c", Literal["a", "b"], "which is no 'a' or 'b'"),
        ("g", Color, "which is no 'r' or 'b'"),
        (True, Literal[1], "f: p is true, which is no 1"),
        (1, Literal[True], "f: p is 1, which is no True"),
        ("abc", Sequence[str], r'f: p is "abc", which is no .*Sequence\[str\]'),
        ({"a": 1}, set[str], "which is no set"),
        (["7"], list[Number], r'f: p\[0\] is "7", which is no int'),
        ({"size": 1}, Entry, "f: p has the fields size; a Entry has name, size"),
        (1.0, Literal[1], r"f: p is 1\.0, which is no 1"),
        (True, Level, "f: p is true, which is no 1 or 2"),
        ([], int | str, r"f: p is \[\], which is no int or str"),
        ({"y": 1}, Point, "f: p has the fields y; a Point has x, tags"),
        ({"x": "1"}, Point, r'f: p\.x is "1", which is no int'),
        ({"item": "a", "count": "2"}, Order, "f: p is no Order: .*count.*valid integer"),
        ([1], tuple[int, str], r"f: p is \[1\], which is no tuple"),
    ],
)
def test_values_that_do_not(value: Any, hint: Any, message: str) -> None:
    with pytest.raises(TypeError, match=message):
        fitted(value, hint, "f: p")


class Drawing:
    """Tools with arguments and results of every kind."""

    def draw(
        self, at: Point, color: Color = Color.red, sizes: list[int] | None = None
    ) -> dict[str, Any]:
        """Draws.

        Args:
            at: Where.
            color: Of what.
            sizes: How large.
        """
        return {"at": at, "color": color.name, "sizes": set(sizes or [])}

    @staticmethod
    def area(side: float) -> object:
        """The area of a square.

        Args:
            side: Its side.
        """
        return np.float32(side * side)

    def reward(self, answer: str) -> float:
        return 1.0


def test_tools_of_dataclasses_and_static_ones() -> None:
    draw, area = schemas_of(Drawing)
    properties = draw["function"]["parameters"]["properties"]
    assert properties["at"]["properties"] == {
        "x": {"type": "integer"},
        "tags": {"type": "array", "items": {"type": "string"}},
    }
    assert properties["at"]["required"] == ["x"] and properties["at"]["description"] == "Where."
    assert properties["color"]["enum"] == ["r", "b"]
    assert area["function"]["name"] == "area"

    def call(name: str, **arguments: Any) -> str:
        return f"<tool_call>{json.dumps({'name': name, 'arguments': arguments})}</tool_call>"

    texts = [
        call("draw", at={"x": 2}, color="b", sizes=[3]),
        call("area", side=3),
        call("draw", at={"z": 2}),
        "done",
    ]
    model = conversation(saying(texts), reply_tokens=300, context_tokens=10_000)
    asyncio.run(use(toolbox(Drawing()), model, {"prompt": "Draw."}))
    told = [message["content"] for message in model.messages if message["role"] == "tool"]
    assert json.loads(told[0]) == {"at": {"x": 2, "tags": []}, "color": "blue", "sizes": [3]}
    assert told[1] == "9.0"
    assert told[2] == "Error: draw: at has the fields z; a Point has x, tags"


def test_a_tree_is_described_once_and_built_whole() -> None:
    assert schema_of(list[Folder])["items"] == {
        "type": "object",
        "properties": {
            "name": {"type": "string"},
            "inner": {"type": "array", "items": {"type": "object"}},
        },
        "required": ["name"],
    }
    tree = {"name": "a", "inner": [{"name": "b", "inner": [{"name": "c"}]}]}
    assert fitted(tree, Folder, "p") == Folder("a", [Folder("b", [Folder("c")])])
    with pytest.raises(TypeError, match="has the fields name, size; a Folder has name, inner"):
        fitted({"name": "a", "size": 3}, Folder, "p")


class Opaque:
    """Has no text of its own."""


@pytest.mark.parametrize(
    "result, text",
    [
        ("a", "a"),
        (None, "null"),
        (np.int64(3), "3"),
        (np.arange(2), "[0, 1]"),
        (torch.tensor([1.5]), "[1.5]"),
        (Point(x=1), '{"x": 1, "tags": []}'),
        ({"é": (1, 2)}, '{"é": [1, 2]}'),
    ],
)
def test_results_as_text(result: Any, text: str) -> None:
    assert text_of(result, "look") == text


@pytest.mark.parametrize("result", [Opaque(), [Opaque()], {(1, 2): 3}, (i for i in ()), b"a"])
def test_results_that_nobody_can_read(result: Any) -> None:
    """They are the tool's mistake, never told to the policy as its own."""
    with pytest.raises(EnvironmentMistake, match=r"the tool look returned .*return text, numbers"):
        text_of(result, "look")


class Forward:
    def look(self, where: Missing) -> str:  # type: ignore[name-defined]  # noqa: F821
        """Looks.

        Args:
            where: A place.
        """
        return ""


class Any_:
    def look(self, *places: str) -> str:
        """Looks.

        Args:
            places: Some.
        """
        return ""


class Dates:
    def look(self, when: datetime) -> str:
        """Looks.

        Args:
            when: A time, which JSON has no form for.
        """
        return ""


class Yields:
    def look(self, where: str) -> Any:
        """Looks.

        Args:
            where: A place.
        """
        yield where


class Containers:
    def look(self, at: Sequence[int], names: set[str], by: Mapping[str, int], one: Number) -> str:
        """Looks.

        Args:
            at: Places.
            names: Words.
            by: Numbers.
            one: A number.
        """
        return f"{at} {names} {by} {one}"


def test_containers_are_described_as_json_has_them() -> None:
    (look,) = schemas_of(Containers)
    kinds = look["function"]["parameters"]["properties"]
    for schema in kinds.values():
        del schema["description"]
    assert kinds == {
        "at": {"type": "array", "items": {"type": "integer"}},
        "names": {"type": "array", "items": {"type": "string"}, "uniqueItems": True},
        "by": {"type": "object", "additionalProperties": {"type": "integer"}},
        "one": {"type": "integer"},
    }
    given = {"at": [1, 2], "names": ["a"], "by": {"b": 1}, "one": 7}
    assert asyncio.run(toolbox(Containers()).call("look", given)) == "[1, 2] {'a'} {'b': 1} 7"


@pytest.mark.parametrize("kind", [Forward, Any_, Dates, Yields])
def test_parameters_that_no_schema_can_have(kind: type) -> None:
    with pytest.raises(ValueError, match="its method look can't be described to the policy"):
        as_episode(kind)


def test_a_number_that_python_does_not_write_is_named() -> None:
    with pytest.raises(EnvironmentMistake, match="the tool look returned int an integer of thous"):
        text_of(10**5000, "look")
