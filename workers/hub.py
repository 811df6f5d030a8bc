"""check_reachable(): whether a model that is not in a directory can be asked for at all;
local_directory(): where its files are.

Without a network the hub's own client tries every file several times, for the better part of a
minute and with a screen of warnings. One quick question comes before it here.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path

from huggingface_hub import constants, try_to_load_from_cache
from huggingface_hub.utils import get_session

from workers.weight_files import has_all_weights

LOGGER = logging.getLogger(__name__)
TIMEOUT_S = 5.0


def check_reachable(name: str, revision: str | None = None) -> None:
    """An OSError in one line where `name` is neither a path nor in the hub's cache, and the hub does
    not answer. Where it is in the cache, this process does without the hub from then on."""
    if Path(name).exists() or not is_hub_name(name) or constants.HF_HUB_OFFLINE:
        return
    for file in ("config.json", "tokenizer_config.json"):
        if isinstance(try_to_load_from_cache(name, file, revision=revision), str):
            if not _answers():
                LOGGER.warning("%s does not answer; models come from its cache", constants.ENDPOINT)
                constants.HF_HUB_OFFLINE = True
            return
    _ask(constants.ENDPOINT)


@contextmanager
def offline_without_the_hub(name: str) -> Iterator[None]:
    """The hub's client looks into its cache only, at once, where the hub does not answer."""
    before = constants.HF_HUB_OFFLINE
    if not Path(name).exists() and is_hub_name(name):
        constants.HF_HUB_OFFLINE = not _answers()
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before


def local_directory(name: str, revision: str | None = None) -> Path:
    """The directory of a model's files: `name`, or its snapshot in the hub's cache. Where that lacks
    weights that the hub can still give, and where there is none, `name`, which is then no
    directory."""
    path = Path(name)
    if path.exists() or not is_hub_name(name):
        return path
    config = try_to_load_from_cache(name, "config.json", revision=revision)
    if not isinstance(config, str):
        return path
    snapshot = Path(config).parent
    return snapshot if has_all_weights(snapshot) or not _answers() else path


def _answers() -> bool:
    if constants.HF_HUB_OFFLINE:
        return False
    try:
        _ask(constants.ENDPOINT)
    except OSError:
        return False
    return True


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
