"""fitted(): a value that the policy wrote as JSON, as the annotation of a tool's parameter wants it.

It checks what JSON can say (numbers, text, lists, objects, None) and builds tuples, sets, enums,
dataclasses and models of pydantic. No value is converted from another type: a policy that writes "2"
for a number is told so. schema_of() is the annotation's JSON schema; it refuses what JSON has no
form for.
"""

from __future__ import annotations

import dataclasses
import inspect
import json
from collections.abc import Collection, Iterable, Mapping, MutableMapping, MutableSequence, Sequence
from enum import Enum
from types import NoneType, UnionType
from typing import (
    Annotated,
    Any,
    Literal,
    NewType,
    NotRequired,
    Protocol,
    Required,
    Union,
    get_args,
    get_origin,
    get_type_hints,
    is_typeddict,
    runtime_checkable,
)

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
NAMES: Mapping[Any, str] = {
    int: "integer",
    float: "number",
    str: "string",
    bool: "boolean",
    list: "array",
    tuple: "array",
    dict: "object",
    NoneType: "null",
}
"""Annotation -> JSON schema's name of its type."""
FORMS: Mapping[Any, type] = {
    Sequence: list,
    MutableSequence: list,
    Iterable: list,
    Collection: list,
    Mapping: dict,
    MutableMapping: dict,
}
"""Annotation of a container -> the type of the value for it."""
SETS = (set, frozenset)
FURTHER = "For further information"
"""The beginning of a line of pydantic's that is for people."""


@runtime_checkable
class OfPydantic(Protocol):
    """A class derived from pydantic.BaseModel."""

    def model_json_schema(self) -> dict[str, Any]: ...

    def model_validate_json(self, text: str, *, strict: bool) -> Any: ...


def fitted(value: Any, hint: Any, where: str) -> Any:
    """The value for a parameter `where` with that annotation; a TypeError in words for the policy.

    fitted({"x": 1}, Point, "p") == Point(x=1)
    """
    hint, origin, inner = _form(hint)
    if hint in PLAIN:
        if _is_plain(value, hint):
            return value
    elif origin is Annotated:
        return fitted(value, inner[0], where)
    elif origin in (Union, UnionType):
        return _first_that_fits(value, inner, where)
    elif origin is Literal:
        for choice in inner:
            if _is_same(value, choice):
                return choice
    elif origin is list and isinstance(value, list):
        return [fitted(part, inner[0], f"{where}[{place}]") for place, part in enumerate(value)]
    elif origin is dict and isinstance(value, dict):
        return {key: fitted(part, inner[1], f"{where}[{key!r}]") for key, part in value.items()}
    elif origin in SETS and isinstance(value, list):
        return origin(fitted(part, inner[0], f"{where}[{i}]") for i, part in enumerate(value))
    elif hint is tuple or origin is tuple:
        if isinstance(value, list) and (parts := _hints_of_parts(inner, len(value))) is not None:
            whole = zip(value, parts, strict=True)
            return tuple(fitted(part, of, f"{where}[{i}]") for i, (part, of) in enumerate(whole))
    elif inspect.isclass(hint) and issubclass(hint, Enum):
        for member in hint:
            if _is_same(value, member.value):
                return member
    elif has_fields(hint):
        if isinstance(value, dict):
            return _object(value, hint, where)
    elif isinstance(hint, OfPydantic):
        return _of_pydantic(value, hint, where)
    elif origin not in (list, dict, *SETS):
        return value
    raise TypeError(
        f"{where} is {json.dumps(value, ensure_ascii=False)}, which is no {named(hint)}"
    )


def _form(hint: Any) -> tuple[Any, Any, tuple[Any, ...]]:
    """The annotation as fitted knows it, its origin and arguments: list for Sequence, dict for
    Mapping, what a NewType stands for."""
    while isinstance(hint, NewType):
        hint = hint.__supertype__
    origin, inner = get_origin(hint), get_args(hint)
    origin = FORMS.get(origin, origin)
    if origin in (list, dict, *SETS) and not inner:  # typing.List and its like
        hint, origin = origin, None
    hint = FORMS.get(hint, hint)
    if hint in SETS:
        return hint, hint, (Any,)
    return hint, origin, inner


def _is_plain(value: Any, kind: Any) -> bool:
    """Whether a JSON value is one of a kind of PLAIN; JSON's true is no number."""
    if isinstance(value, bool) and kind in (int, float):
        return False
    return isinstance(value, PLAIN[kind])


def _is_same(value: Any, choice: Any) -> bool:
    """Whether a JSON value is that choice; true is not 1, and 1.0 is no integer."""
    return type(choice) in PLAIN and _is_plain(value, type(choice)) and bool(value == choice)


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


def schema_of(hint: Any, within: tuple[Any, ...] = ()) -> dict[str, Any]:
    """The JSON schema of an annotation; a TypeError for one that no JSON value fits. `within`: the
    classes that it is a part of, which are any object where they come again, as in a tree."""
    hint, origin, inner = _form(hint)
    if hint is Any or hint is object:
        return {}
    if hint in NAMES:
        return {"type": NAMES[hint]}
    if origin is Annotated:
        return schema_of(inner[0], within)
    if origin in (Union, UnionType):
        some = [schema_of(part, within) for part in inner if part is not NoneType]
        schema = some[0] if len(some) == 1 else {"anyOf": some}
        return schema | ({"nullable": True} if NoneType in inner else {})
    if origin is Literal:
        return _choice(list(inner))
    if origin is list:
        return {"type": "array", "items": schema_of(inner[0], within)}
    if origin in SETS:
        return {"type": "array", "items": schema_of(inner[0], within), "uniqueItems": True}
    if origin is dict:
        if inner[0] is not str:
            raise TypeError("an object's keys are text; take dict[str, ...]")
        return {"type": "object", "additionalProperties": schema_of(inner[1], within)}
    if origin is tuple:
        if Ellipsis in inner:
            return {"type": "array", "items": schema_of(inner[0], within)}
        return {"type": "array", "prefixItems": [schema_of(part, within) for part in inner]}
    if inspect.isclass(hint) and issubclass(hint, Enum):
        return _choice([member.value for member in hint])
    if has_fields(hint):
        if hint in within:
            return {"type": "object"}
        inside = (*within, hint)
        return {
            "type": "object",
            "properties": {name: schema_of(of, inside) for name, of in fields_of(hint).items()},
            "required": required_fields(hint),
        }
    if isinstance(hint, OfPydantic):
        described: dict[str, Any] = hint.model_json_schema()
        return described
    raise TypeError(
        f"no JSON value is a {named(hint)}; take text, numbers, a list, a dict, a dataclass or a "
        "model of pydantic"
    )


def has_classes(hint: Any) -> bool:
    """Whether the annotation holds a class of somebody's own, or another that transformers takes for
    an object."""
    of_itself = has_fields(hint) or _is_own(hint) or isinstance(hint, NewType)
    return of_itself or hint in (*SETS, object) or any(map(has_classes, get_args(hint)))


def has_fields(hint: Any) -> bool:
    """Whether it is a dataclass, a TypedDict or a NamedTuple: an object with named parts."""
    if not inspect.isclass(hint):
        return False
    is_named_tuple = issubclass(hint, tuple) and "_fields" in vars(hint)
    return dataclasses.is_dataclass(hint) or is_typeddict(hint) or is_named_tuple


def fields_of(kind: Any) -> dict[str, Any]:
    """The annotations of the fields that one gives to make a dataclass, a TypedDict or a NamedTuple."""
    hints = get_type_hints(kind)
    if dataclasses.is_dataclass(kind):
        return {field.name: hints[field.name] for field in dataclasses.fields(kind) if field.init}
    return hints


def required_fields(kind: Any) -> list[str]:
    """The names of the fields that have no default."""
    names = list(fields_of(kind))
    if dataclasses.is_dataclass(kind):
        by_name = {field.name: field for field in dataclasses.fields(kind)}
        return [name for name in names if _is_required(by_name[name])]
    if is_typeddict(kind):
        return [name for name in names if _is_required_key(kind, name)]
    return [name for name in names if name not in kind._field_defaults]


def _is_own(hint: Any) -> bool:
    return inspect.isclass(hint) and (issubclass(hint, Enum) or isinstance(hint, OfPydantic))


def _choice(values: list[Any]) -> dict[str, Any]:
    names = list(dict.fromkeys(NAMES.get(type(value), "") for value in values))
    if "" in names:
        raise TypeError(f"JSON has no form for one of {values}; take text or numbers")
    return {"type": names[0] if len(names) == 1 else names, "enum": values}


def _hints_of_parts(inner: tuple[Any, ...], number: int) -> list[Any] | None:
    """The annotations of a tuple's parts; None where it has another number of them."""
    if not inner:
        return [Any] * number
    if Ellipsis in inner:
        return [inner[0]] * number
    return list(inner) if len(inner) == number else None


def _of_pydantic(value: Any, kind: OfPydantic, where: str) -> Any:
    try:
        return kind.model_validate_json(json.dumps(value), strict=True)
    except ValueError as error:
        said = [line for line in str(error).splitlines() if FURTHER not in line]
        raise TypeError(
            f"{where} is no {named(kind)}: {' '.join(' '.join(said).split())}"
        ) from None


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


def _object(value: dict[str, Any], kind: Any, where: str) -> Any:
    """The value as a dataclass, a TypedDict or a NamedTuple."""
    hints = fields_of(kind)
    unknown = [name for name in value if name not in hints]
    missing = [name for name in required_fields(kind) if name not in value]
    if unknown or missing:
        raise TypeError(
            f"{where} has the fields {', '.join(value)}; a {kind.__name__} has {', '.join(hints)}"
        )
    parts = {name: fitted(part, hints[name], f"{where}.{name}") for name, part in value.items()}
    return kind(**parts)


def _is_required_key(kind: Any, name: str) -> bool:
    """Whether a TypedDict needs the key; its own list does not read annotations that are text."""
    origin = get_origin(get_type_hints(kind, include_extras=True)[name])
    if origin in (Required, NotRequired):
        return origin is Required
    return name in kind.__required_keys__


def _is_required(field: dataclasses.Field[Any]) -> bool:
    return (
        field.default is dataclasses.MISSING
        and field.default_factory is dataclasses.MISSING
        and field.init
    )
