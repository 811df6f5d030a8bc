"""fitted(): a value that the policy wrote as JSON, as the annotation of a tool's parameter wants it.

It checks what JSON can say (numbers, text, lists, objects, None) and builds dataclasses and enums.
Other annotations take the value as it is. No value is converted from another type: a policy that
writes "2" for a number is told so.
"""

from __future__ import annotations

import dataclasses
import inspect
import json
from collections.abc import Mapping
from enum import Enum
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

PLAIN: Mapping[Any, tuple[type, ...]] = {
    int: (int,),
    float: (int, float),
    str: (str,),
    bool: (bool,),
    list: (list,),
    dict: (dict,),
    NoneType: (NoneType,),
}
"""Annotation -> types of JSON values that it takes."""


def fitted(value: Any, hint: Any, where: str) -> Any:
    """The value for a parameter `where` with that annotation; a TypeError in words for the policy.

    fitted({"x": 1}, Point, "p") == Point(x=1)
    """
    origin, inner = get_origin(hint), get_args(hint)
    if hint in PLAIN:
        if isinstance(value, PLAIN[hint]) and not (
            isinstance(value, bool) and hint in (int, float)
        ):
            return value
    elif origin is Annotated:
        return fitted(value, inner[0], where)
    elif origin in (Union, UnionType):
        return _first_that_fits(value, inner, where)
    elif origin is Literal:
        if value in inner:
            return value
    elif origin is list and isinstance(value, list):
        return [fitted(part, inner[0], f"{where}[{place}]") for place, part in enumerate(value)]
    elif origin is dict and isinstance(value, dict):
        return {key: fitted(part, inner[1], f"{where}[{key!r}]") for key, part in value.items()}
    elif inspect.isclass(hint) and issubclass(hint, Enum):
        if value in [member.value for member in hint]:
            return hint(value)
    elif inspect.isclass(hint) and dataclasses.is_dataclass(hint):
        if isinstance(value, dict):
            return _dataclass(value, hint, where)
    elif origin not in (list, dict):
        return value
    raise TypeError(
        f"{where} is {json.dumps(value, ensure_ascii=False)}, which is no {named(hint)}"
    )


def named(hint: Any) -> str:
    """The annotation in words for the policy."""
    if hint is NoneType:
        return "null"
    if get_origin(hint) in (Union, UnionType):
        return " or ".join(map(named, get_args(hint)))
    if get_origin(hint) is Literal:
        return " or ".join(map(repr, get_args(hint)))
    if inspect.isclass(hint) and issubclass(hint, Enum):
        return " or ".join(repr(member.value) for member in hint)
    if inspect.isclass(hint) and get_origin(hint) is None:
        return hint.__name__
    return str(hint).replace("typing.", "")


def described(hint: Any) -> dict[str, Any]:
    """The schema of a dataclass or an enum, which transformers takes for any object; empty
    for others."""
    if not inspect.isclass(hint):
        return {}
    if issubclass(hint, Enum):
        return {"type": "string", "enum": [member.value for member in hint]}
    if not dataclasses.is_dataclass(hint):
        return {}
    types = {int: "integer", float: "number", str: "string", bool: "boolean", list: "array"}
    hints, properties, required = get_type_hints(hint), {}, []
    for field in dataclasses.fields(hint):
        of = hints[field.name]
        known = types.get(get_origin(of) or of)
        properties[field.name] = described(of) or ({"type": known} if known else {})
        if _is_required(field):
            required.append(field.name)
    return {"type": "object", "properties": properties, "required": required}


def _first_that_fits(value: Any, hints: tuple[Any, ...], where: str) -> Any:
    some = [hint for hint in hints if hint is not NoneType]
    if value is None and len(some) < len(hints):
        return None
    if len(some) == 1:  # its own message says more
        return fitted(value, some[0], where)
    for hint in some:
        try:
            return fitted(value, hint, where)
        except TypeError:
            continue
    names = " or ".join(map(named, hints))
    raise TypeError(f"{where} is {json.dumps(value, ensure_ascii=False)}, which is no {names}")


def _dataclass(value: dict[str, Any], kind: Any, where: str) -> Any:
    hints, fields = get_type_hints(kind), dataclasses.fields(kind)
    names = [field.name for field in fields]
    unknown = [name for name in value if name not in names]
    missing = [field.name for field in fields if _is_required(field) and field.name not in value]
    if unknown or missing:
        raise TypeError(
            f"{where} has the fields {', '.join(value)}; a {kind.__name__} has {', '.join(names)}"
        )
    parts = {name: fitted(part, hints[name], f"{where}.{name}") for name, part in value.items()}
    return kind(**parts)


def _is_required(field: dataclasses.Field[Any]) -> bool:
    return (
        field.default is dataclasses.MISSING
        and field.default_factory is dataclasses.MISSING
        and field.init
    )
