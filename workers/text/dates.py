"""dated(): a chat template that writes the day's date (Llama 3.2 does), with the date of one day in its
place, so that a run that goes on tomorrow has the tokens of today."""

from __future__ import annotations

import re
from datetime import date
from typing import Any

NOW = re.compile(r"""strftime_now\(\s*(?P<quote>["'])(?P<format>.*?)(?P=quote)\s*\)""")
"""The call by which a template asks transformers for the time."""


def dated(template: Any, day: str | None) -> Any:
    """The template (or several by name). `day`: as 2026-11-27; None leaves it as it is.

    >>> dated("Today: {{ strftime_now('%d %b %Y') }}", "2026-11-27")
    "Today: {{ '27 Nov 2026' }}"
    """
    if day is None or template is None:
        return template
    if isinstance(template, dict):
        return {name: dated(text, day) for name, text in template.items()}
    return NOW.sub(lambda match: repr(date.fromisoformat(day).strftime(match["format"])), template)


def writes_the_date(template: Any) -> bool:
    texts = [template]
    if isinstance(template, dict):
        texts = list(template.values())
    return any(text is not None and NOW.search(text) for text in texts)
