"""The column of a row that has its images: data.images_column, or one of the two names that data sets
of the hub have.

As it comes, data.images_column is `images`, and stands for `image` too. A model that sees none is
given no rows with images: what looks like one in such a column is refused.
"""

from __future__ import annotations

import logging
import mimetypes
from collections.abc import Sequence
from typing import Any

from controllers.data.config import DataConfig
from controllers.data.images import ColumnImages, has_images, has_marks
from controllers.data.messages import MISSING, find_value, is_null
from controllers.data.sources import SourceRow

LOGGER = logging.getLogger(__name__)

USUAL_COLUMN = "images"
"""data.images_column as it comes."""
USUAL_COLUMNS = (USUAL_COLUMN, "image")
"""The columns that it stands for; rows of text alone have none of them."""
OF_THE_HUB = {"bytes", "path"}
"""The keys of an image in the columns of the hub."""
ABSENT = dict.fromkeys(OF_THE_HUB)
"""A row without an image in a table whose image is a group of two columns."""


def image_columns(config: DataConfig) -> tuple[str, ...]:
    """The columns that a row's images may be in, the first one before the others."""
    if config.images_column is None:
        return ()
    return USUAL_COLUMNS if is_usual(config) else (config.images_column,)


def is_usual(config: DataConfig) -> bool:
    """Whether data.images_column is as it comes, so that rows may lack it."""
    return config.images_column == USUAL_COLUMN


def column_images(row: SourceRow, config: DataConfig) -> ColumnImages:
    """The row's images outside of its messages, as the data has them; a ValueError where two columns
    have some."""
    columns = every_column(row, config)
    filled = [column for column in columns if column.values]
    if len(filled) > 1:
        one, other = (column.name for column in filled)
        raise ValueError(
            f"{row.place}: images are in {one!r} and in {other!r}; set data.images_column={other} for "
            f"those, or rename {other!r} to leave them out"
        )
    present = [column for column in columns if column.is_there]
    return next(iter([*filled, *present, *columns]), ColumnImages("", [], is_there=False))


def every_column(row: SourceRow, config: DataConfig) -> list[ColumnImages]:
    """The images that each of image_columns has in the row."""
    columns = []
    for name in image_columns(config):
        value = find_value(row.values, name)
        is_there = value is not MISSING
        columns.append(ColumnImages(name, _listed(value) if is_there else [], is_there=is_there))
    return columns


class NamedColumn:
    """Whether any row has the column that data.images_column or data.tools_column was set to.

    column = NamedColumn("images", config, "data.train"); column.look_at(rows); ...; column.check()
    """

    def __init__(self, kind: str, config: DataConfig, field: str) -> None:
        """`kind`: images or tools, which is what the column is called as it comes."""
        name: str | None = vars(config)[f"{kind}_column"]
        self._kind, self._name = kind, None if name == kind else name
        self._field, self._found = field, False

    def look_at(self, rows: Sequence[SourceRow]) -> None:
        if self._name is not None and not self._found:
            name = self._name
            self._found = any(find_value(row.values, name) is not MISSING for row in rows)

    def check(self) -> None:
        """A ValueError if no row that is trained on has it; held-out rows may be of text alone."""
        if self._name is None or self._found:
            return
        problem = (
            f"data.{self._kind}_column is {self._name!r}, and no row of {self._field} has it; set it "
            f"to the column of the {self._kind}, or to null"
        )
        if self._field == "data.train":
            raise ValueError(problem)
        LOGGER.warning("%s", problem)


def _listed(value: Any) -> list[Any]:
    if is_null(value) or value == ABSENT:
        return []
    return value if isinstance(value, list) else [value]


def looks_like_images(images: ColumnImages, config: DataConfig) -> bool:
    """Whether the column has images: one with a usual name may have the names of containers, say."""
    if not is_usual(config):
        return bool(images.values)
    return any(map(_looks_like_an_image, images.values))


def check_all_read(row: SourceRow, config: DataConfig, messages: Sequence[dict[str, Any]]) -> None:
    """A ValueError where a row whose messages have no image has some in a column of another name: the
    model would be asked about what it is not shown. A path in such a column is an image's only where
    the messages have a mark for one."""
    if not is_usual(config) or column_images(row, config).is_there or has_images(messages):
        return
    marked = has_marks(messages)
    for name, value in row.values.items():
        values = [each for each in _listed(value) if marked or not isinstance(each, str)]
        if any(map(_looks_like_an_image, values)):
            raise ValueError(
                f"{row.place}: {name!r} has images and is not read; set data.images_column={name}, or to "
                "null to leave them out"
            )


def _looks_like_an_image(value: Any) -> bool:
    if isinstance(value, dict) and set(value) == OF_THE_HUB:
        # Sounds have the same two keys; a name without a known end may be an image's.
        kind, _ = mimetypes.guess_type(value["path"] or "")
        return value != ABSENT and (kind is None or kind.startswith("image/"))
    if isinstance(value, str):
        kind, _ = mimetypes.guess_type(value)
        return kind is not None and kind.startswith("image/")
    # A text model's rows need no import of PIL.
    return isinstance(value, bytes | bytearray) or type(value).__module__.startswith("PIL.")
