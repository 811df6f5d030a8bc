"""Images of a row: from the parts of its messages and from a column of the data, as references.

A part is {"type": "image", "image": X} or {"type": "image_url", "image_url": {"url": X}}, with X a path,
a data URL, bytes, an image of PIL, or {bytes, path} as columns of the hub have it. A part {"type":
"image"} without one, and each "<image>" in a text, stands for the next of the row's column of images
(image_column.py); where a conversation has neither, they come before the first user message. References are
plain values of a row, {"path": ...} or {"base64": ...}, with their place in the row. Images on the
web are left out.
"""

from __future__ import annotations

import base64
import binascii
import io
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from controllers.data.files import SourceRow
from hybridflow.wording import counted
from workers.images import ImageReference
from workers.images.reference import check_range, explained, upright_rgb

IMAGE = "image"
IMAGE_URL = "image_url"
MARK = "<image>"
"""In a text: an image of the column stands here."""
STORED = "\x00images"
"""The name of a row's references among its plain values; no column of data is called so."""


@dataclass(frozen=True, slots=True)
class ColumnImages:
    """The images of a row outside of its messages: ColumnImages("image", ["cat.png"], is_there=True)"""

    name: str
    values: Sequence[Any]
    is_there: bool
    """Whether the row has the column, empty or not."""


def is_image_part(part: Any) -> bool:
    """Whether a part of a message's content is an image."""
    return isinstance(part, dict) and part.get("type") in (IMAGE, IMAGE_URL)


def image_part(place: str, row: SourceRow, part: Mapping[str, Any]) -> dict[str, Any]:
    """The part with its image as a reference, or without one where the column has it."""
    value = part.get(IMAGE)
    for name in (IMAGE_URL, "url", "path", "bytes"):
        if value is None or value == {}:  # a group of columns that are all null
            value = part.get(name)
    if value is None or value == {}:
        return {"type": IMAGE}
    return {"type": IMAGE, IMAGE: stored_reference(place, row, value)}


def stored_reference(place: str, row: SourceRow, value: Any) -> dict[str, str]:
    """An image of the data as a plain value; a ValueError for what is none, or is not here."""
    inside = place.removeprefix(row.place)  # equal rows have equal values, wherever they stand
    if isinstance(value, dict):
        if "base64" in value:  # of a row whose messages are read for the second time
            return {**value, "place": inside}
        inner = value.get("bytes")
        for name in ("path", "url"):
            if inner is None:
                inner = value.get(name)
        value = inner
    if not isinstance(value, str | bytes | bytearray):
        value = _png_of_picture(place, value)
    if isinstance(value, bytes | bytearray):
        return {"base64": base64.b64encode(value).decode(), "place": inside}
    if not isinstance(value, str) or not value:
        raise ValueError(
            f"{place} is {type(value).__name__} {str(value)[:60]!r}; give an image as a path, as "
            "bytes, or as {bytes, path}"
        )
    if value.startswith("data:"):
        return {"base64": _of_data_url(place, value), "place": inside}
    if value.startswith(("http://", "https://")):
        raise ValueError(f"{place} is {value[:80]!r}; download it, and give its path")
    file = _found(place, row, value.removeprefix("file://"))
    return {"path": str(file), "place": inside}


def _png_of_picture(place: str, value: Any) -> Any:
    """An image of PIL as the bytes of a file, as a model is shown it; anything else as it is."""
    from PIL import Image

    if not isinstance(value, Image.Image):
        return value
    buffer = io.BytesIO()
    with explained(place):
        check_range(value)
        upright_rgb(value).save(buffer, format="PNG")
    return buffer.getvalue()


def _of_data_url(place: str, url: str) -> str:
    head, _, body = url.partition(",")
    try:
        if not head.endswith(";base64"):
            raise ValueError("it is not base64")
        base64.b64decode(body, validate=True)
    except (ValueError, binascii.Error) as error:
        raise ValueError(f"{place}: {url[:40]!r} is no data URL of an image ({error})") from error
    return body


def _found(place: str, row: SourceRow, value: str) -> Path:
    """The file, relative to the data's file or to the working directory."""
    path = Path(value).expanduser()
    directories = dict.fromkeys([(row.directory or Path()).absolute(), Path.cwd()])
    for directory in directories:
        if (directory / path).is_file():
            return (directory / path).resolve()
    where = "" if path.is_absolute() else f" in {' or '.join(map(str, directories))}"
    raise ValueError(f"{place}: there is no file {value!r}{where}; correct the path")


def with_column_images(
    row: SourceRow, messages: Sequence[dict[str, Any]], column: ColumnImages, *, usual: bool
) -> list[dict[str, Any]]:
    """The messages with the images of a column where they belong; `usual`: rows may lack it."""
    place = f"{row.place}: {column.name!r}"
    images = [
        {"type": IMAGE, IMAGE: stored_reference(place, row, value)} for value in column.values
    ]
    num_marks = sum(map(_num_marks, messages))
    if num_marks and not images and column.is_there:
        raise ValueError(
            f"{place} is empty, and the messages have {MARK}; give the image, or remove the mark"
        )
    if num_marks and not column.is_there and not usual and column.name:
        raise ValueError(
            f"{place} is not among {', '.join(map(repr, row.values))}, and the messages have {MARK}; "
            "set data.images_column to the column of the images, or remove the mark"
        )
    places = sum(map(_num_bare_parts, messages)) + (num_marks if images else 0)
    if images and not places:
        return _before_the_question(place, messages, images)
    if places != len(images):
        what = f"{column.name!r} has {len(images)}" if column.is_there else "no column has any"
        raise ValueError(
            f"{row.place}: the messages have {counted(places, 'places')} for images of a column "
            f"({{'type': 'image'}} without a value, or {MARK}), and {what}; give as many of one as of the "
            "other"
        )
    waiting = iter(images)
    return [_filled(message, waiting, bool(images)) for message in messages]


def _num_marks(message: Mapping[str, Any]) -> int:
    texts = [part.get("text", "") for part in parts_of(message) if not is_image_part(part)]
    return sum(text.count(MARK) for text in texts)


def _num_bare_parts(message: Mapping[str, Any]) -> int:
    """Parts that are images without a value."""
    return sum(is_image_part(part) and IMAGE not in part for part in parts_of(message))


def _filled(
    message: dict[str, Any], images: Iterator[dict[str, Any]], has_images: bool
) -> dict[str, Any]:
    """The message with each place of an image taken by the next one."""
    content = message.get("content")
    if isinstance(content, str):
        if not has_images or MARK not in content:
            return message
        content = [{"type": "text", "text": content}]
    if not isinstance(content, list):
        return message
    parts: list[dict[str, Any]] = []
    for part in content:
        if is_image_part(part):
            parts.append(part if IMAGE in part else next(images))
            continue
        pieces = part["text"].split(MARK) if has_images else [part["text"]]
        for number, piece in enumerate(pieces):
            if number:
                parts.append(next(images))
            if piece:
                parts.append({"type": "text", "text": piece})
    return {**message, "content": parts}


def _before_the_question(
    place: str, messages: Sequence[dict[str, Any]], images: Sequence[dict[str, Any]]
) -> list[dict[str, Any]]:
    """Where the messages have no places. A ValueError where they have other images, or no question."""
    if others := images_of(messages):
        raise ValueError(
            f"{place} has {counted(len(images), 'images')} beside the {len(others)} in the messages, which "
            "have no place for them; leave one of the two out (data.images_column=null), or put "
            f"{{'type': 'image'}} or {MARK} where they belong"
        )
    result = list(messages)
    for number, message in enumerate(result):
        if message["role"] == "user":
            result[number] = {**message, "content": [*images, *parts_of(message)]}
            return result
    raise ValueError(
        f"{place} has {counted(len(images), 'images')}, and the messages have no place for them, nor a "
        f"user's message; put {{'type': 'image'}} or {MARK} where they belong"
    )


def parts_of(message: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The content of a message as parts."""
    content = message.get("content")
    if isinstance(content, list):
        return content
    return [{"type": "text", "text": content or ""}]


def has_images(messages: Sequence[Mapping[str, Any]]) -> bool:
    """Whether a message has an image, or a place for one."""
    return any(is_image_part(part) for message in messages for part in parts_of(message))


def has_marks(messages: Sequence[Mapping[str, Any]]) -> bool:
    """Whether a text has a mark for an image of a column."""
    return any(map(_num_marks, messages))


def images_of(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, str]]:
    """The references of all images that are there, in order."""
    found = []
    for message in messages:
        for part in parts_of(message):
            if is_image_part(part) and IMAGE in part:
                found.append(part[IMAGE])
    return found


def without_places(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The messages without where their images stand in the row, for comparisons."""
    bare = []
    for message in messages:
        parts = []
        for part in parts_of(message):
            if part.get(IMAGE):
                part = {**part, IMAGE: {**part[IMAGE], "place": ""}}
            parts.append(part)
        bare.append({**message, "content": parts})
    return bare


def reference_of(stored: Mapping[str, str], row_place: str) -> ImageReference:
    """The image that a plain value of a row refers to."""
    place = row_place + stored["place"]
    if "path" in stored:
        return ImageReference(path=stored["path"], place=place)
    return ImageReference(encoded=base64.b64decode(stored["base64"]), place=place)
