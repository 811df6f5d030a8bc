"""Images of a row: from the parts of its messages and from a column of the data, as references.

A part is {"type": "image", "image": X} or {"type": "image_url", "image_url": {"url": X}}, with X a path,
a data URL, bytes, an image of PIL, or {bytes, path} as columns of the hub have it. A part {"type":
"image"} without one, and each "<image>" in a text, stands for the next of data.images_column; where a
conversation has neither, the column's images come before the first user message. References are
plain values of a row, {"path": ...} or {"base64": ...}, with their place in the data. Images on the
web are left out.
"""

from __future__ import annotations

import base64
import binascii
import io
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from controllers.data.files import SourceRow
from workers.images import ImageReference

IMAGE = "image"
IMAGE_URL = "image_url"
USUAL_COLUMN = "images"
"""data.images_column as it comes; rows of text alone have none."""
MARK = "<image>"
"""In a text: an image of the column stands here."""
STORED = "\x00images"
"""The name of a row's references among its plain values; no column of data is called so."""


def is_image_part(part: Any) -> bool:
    """Whether a part of a message's content is an image."""
    return isinstance(part, dict) and part.get("type") in (IMAGE, IMAGE_URL)


def image_part(place: str, row: SourceRow, part: Mapping[str, Any]) -> dict[str, Any]:
    """The part with its image as a reference, or without one where the column has it."""
    value = part.get(IMAGE)
    for name in (IMAGE_URL, "url", "path", "bytes"):
        if value is None:
            value = part.get(name)
    if value is None:
        return {"type": IMAGE}
    return {"type": IMAGE, IMAGE: stored_reference(place, row, value)}


def stored_reference(place: str, row: SourceRow, value: Any) -> dict[str, str]:
    """An image of the data as a plain value; a ValueError for what is none, or is not here."""
    if isinstance(value, dict):
        inner = value.get("bytes")
        for name in ("path", "url"):
            if inner is None:
                inner = value.get(name)
        value = inner
    if not isinstance(value, str | bytes | bytearray):
        value = _png_of_picture(value)
    if isinstance(value, bytes | bytearray):
        return {"base64": base64.b64encode(value).decode(), "place": place}
    if not isinstance(value, str) or not value:
        raise ValueError(
            f"{place} is {type(value).__name__} {str(value)[:60]!r}; give an image as a path, as "
            "bytes, or as {bytes, path}"
        )
    if value.startswith("data:"):
        return {"base64": _of_data_url(place, value), "place": place}
    if value.startswith(("http://", "https://")):
        raise ValueError(f"{place} is {value[:80]!r}; download it, and give its path")
    return {"path": str(_found(place, row, value.removeprefix("file://"))), "place": place}


def _png_of_picture(value: Any) -> Any:
    """An image of PIL as the bytes of a file; anything else as it is."""
    from PIL import Image

    if not isinstance(value, Image.Image):
        return value
    buffer = io.BytesIO()
    value.save(buffer, format="PNG")
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
    tried = [path]
    if not path.is_absolute() and row.directory is not None:
        tried.insert(0, row.directory / path)
    for candidate in tried:
        if candidate.is_file():
            return candidate.resolve()
    raise ValueError(
        f"{place}: there is no file {value!r} (looked for {' and '.join(map(str, tried))}); correct "
        "the path"
    )


def with_column_images(
    row: SourceRow, messages: Sequence[dict[str, Any]], column: str | None
) -> list[dict[str, Any]]:
    """The messages with the images of data.images_column where they belong."""
    values = None if column is None else row.values.get(column)
    if values is None:
        values = []
    elif not isinstance(values, list):
        values = [values]
    place = f"{row.place}: {column!r}"
    if column is not None and row.values.get(column) == [] and any(map(_is_marked, messages)):
        raise ValueError(
            f"{place} is empty, and the messages have {MARK}; give the image, or remove the mark"
        )
    if column not in (None, USUAL_COLUMN, *row.values) and any(map(_is_marked, messages)):
        raise ValueError(
            f"{place} is not among {', '.join(map(repr, row.values))}, and the messages have {MARK}; "
            "set data.images_column to the column of the images, or remove the mark"
        )
    images = [{"type": IMAGE, IMAGE: stored_reference(place, row, value)} for value in values]
    waiting = iter(images)
    filled = [_filled(message, waiting, bool(images)) for message in messages]
    left = list(waiting)
    if left and len(left) == len(images):
        filled = _before_the_question(filled, left)
    elif left:
        raise ValueError(
            f"{place} has {len(images)} images, and the messages have places for "
            f"{len(images) - len(left)}; give each its {{'type': 'image'}} or {MARK}"
        )
    for message in filled:
        for part in parts_of(message):
            if is_image_part(part) and IMAGE not in part:
                raise ValueError(
                    f"{row.place}: a message has an image without a value, and {column!r} has "
                    f"{len(images)}; give it {{'type': 'image', 'image': ...}}, or set "
                    "data.images_column"
                )
    return filled


def _is_marked(message: Mapping[str, Any]) -> bool:
    texts = [part.get("text", "") for part in parts_of(message) if not is_image_part(part)]
    return any(MARK in text for text in texts)


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
            parts.append(part if IMAGE in part else next(images, part))
            continue
        pieces = part["text"].split(MARK) if has_images else [part["text"]]
        for number, piece in enumerate(pieces):
            if number:
                parts.append(next(images, {"type": IMAGE}))
            if piece:
                parts.append({"type": "text", "text": piece})
    return {**message, "content": parts}


def _before_the_question(
    messages: Sequence[dict[str, Any]], images: Sequence[dict[str, Any]]
) -> list[dict[str, Any]]:
    result = list(messages)
    for number, message in enumerate(result):
        if message["role"] == "user":
            result[number] = {**message, "content": [*images, *parts_of(message)]}
            break
    return result


def parts_of(message: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The content of a message as parts."""
    content = message.get("content")
    if isinstance(content, list):
        return content
    return [{"type": "text", "text": content or ""}]


def images_of(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, str]]:
    """The references of all images, in order."""
    found = []
    for message in messages:
        for part in parts_of(message):
            if is_image_part(part):
                found.append(part[IMAGE])
    return found


def reference_of(stored: Mapping[str, str]) -> ImageReference:
    """The image that a plain value refers to."""
    if "path" in stored:
        return ImageReference(path=stored["path"], place=stored["place"])
    return ImageReference(encoded=base64.b64decode(stored["base64"]), place=stored["place"])
