"""The teacher and the judge of benchmarks.learning: models that some algorithms need beside the
policy."""

from __future__ import annotations

from pathlib import Path

from benchmarks.learning.settings import SETTINGS
from recipes.rlhf.teachers import prepare_teachers

PLACEHOLDERS = ("{teacher}", "{judge}")


def teachers(algorithms: list[str], directory: Path) -> dict[str, str]:
    """The paths for the placeholders of the algorithms' settings; trains the models (half a
    minute) only if an algorithm asks for one."""
    settings = " ".join(" ".join(SETTINGS[algorithm]) for algorithm in algorithms)
    if not any(name in settings for name in PLACEHOLDERS):
        return {}
    models = prepare_teachers(directory / "teachers")
    return dict(zip(PLACEHOLDERS, (str(models.teacher), str(models.judge)), strict=True))


def filled(algorithm: str, models: dict[str, str]) -> list[str]:
    """The algorithm's settings with paths in place of placeholders."""
    settings = SETTINGS[algorithm]
    for name, path in models.items():
        settings = [setting.replace(name, path) for setting in settings]
    return settings
