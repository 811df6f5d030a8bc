"""check_reachable(): whether a model that is not in a directory can be asked for at all.

Without a network the hub's own client tries every file several times, for the better part of a
minute and with a screen of warnings. One quick question comes before it here.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path

from huggingface_hub import constants, try_to_load_from_cache
from huggingface_hub.utils import get_session

TIMEOUT_S = 5.0


def check_reachable(name: str, revision: str | None = None) -> None:
    """An OSError in one line where `name` is neither a path nor in the hub's cache, and the hub does
    not answer."""
    if Path(name).exists() or not is_hub_name(name) or constants.HF_HUB_OFFLINE:
        return
    for file in ("config.json", "tokenizer_config.json"):
        if isinstance(try_to_load_from_cache(name, file, revision=revision), str):
            return
    _ask(constants.ENDPOINT)


@contextmanager
def offline_without_the_hub(name: str) -> Iterator[None]:
    """The hub's client looks into its cache only, at once, where the hub does not answer."""
    before = constants.HF_HUB_OFFLINE
    if not Path(name).exists() and is_hub_name(name) and not before:
        try:
            _ask(constants.ENDPOINT)
        except OSError:
            constants.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before


def is_hub_name(name: str) -> bool:
    """NAME or OWNER/NAME; the rest are paths, and the hub is not asked for them."""
    parts = name.split("/")
    return len(parts) <= 2 and all(part and part[0] not in ".~" for part in parts)


@lru_cache
def _ask(endpoint: str) -> None:
    """Any answer will do; that there is none is not remembered."""
    try:
        get_session().head(endpoint, timeout=TIMEOUT_S)
    except Exception as error:  # which library speaks HTTP depends on the hub client's version
        raise OSError(
            f"there is no such directory here, and {endpoint} does not answer "
            f"({type(error).__name__})"
        ) from error
