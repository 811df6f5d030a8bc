"""split_flags(): what begins with a dash on a recipe's command line: Hydra's flags that show the
settings. Any other, such as those that other systems' settings are, ends in one line."""

from __future__ import annotations

from collections.abc import Callable, Sequence

WITH_VALUE = {
    "--cfg": ("job", "hydra", "all"),
    "-c": ("job", "hydra", "all"),
    "--package": (),
    "-p": (),
    "--info": ("all", "config", "defaults", "defaults-tree", "plugins", "searchpath"),
    "-i": ("all", "config", "defaults", "defaults-tree", "plugins", "searchpath"),
}
"""Hydra's flags that are followed by a value -> the values, where they are fixed."""
WITHOUT_VALUE = ("--resolve", "--version", "--hydra-help")
SHOWS = ("--cfg", "-c", "--info", "-i", "--version", "--hydra-help")
REFUSED = {
    "--multirun": "one command is one run, in its output_dir; start a command for each value",
    "-m": "one command is one run, in its output_dir; start a command for each value",
    "--run": "it is what happens anyway; leave it out",
    "-r": "it is what happens anyway; leave it out",
    "--config-name": "the recipe is the configuration; run python -m recipes path/to/mine.yaml",
    "-cn": "the recipe is the configuration; run python -m recipes path/to/mine.yaml",
    "--config-path": "the recipe is the configuration; run python -m recipes path/to/mine.yaml",
    "-cp": "the recipe is the configuration; run python -m recipes path/to/mine.yaml",
    "--config-dir": "the recipe is the configuration; run python -m recipes path/to/mine.yaml",
    "-cd": "the recipe is the configuration; run python -m recipes path/to/mine.yaml",
    "--experimental-rerun": "start the command again; the run goes on (docs/recipes.md)",
    "--shell-completion": "recipes install no completion; --settings lists what can be set",
    "-sc": "recipes install no completion; --settings lists what can be set",
}
"""Hydra's other flags -> why not."""


def split_flags(
    arguments: Sequence[str], nearest: Callable[[str], str]
) -> tuple[list[str], list[str]]:
    """(Hydra's flags with their values, everything else). A ValueError for any other flag;
    `nearest` gives the setting whose name is most like a text, or nothing.

    >>> split_flags(["seed=1", "--cfg", "job"], str)
    (['--cfg', 'job'], ['seed=1'])
    """
    flags, settings = [], []
    rest = list(arguments)
    while rest:
        argument = rest.pop(0)
        flag, equals, _ = argument.partition("=")
        if not argument.startswith("-"):
            settings.append(argument)
        elif flag in WITHOUT_VALUE:
            flags.append(argument)
        elif flag in WITH_VALUE:
            flags.append(argument)
            values = WITH_VALUE[flag]
            if not equals and rest and (rest[0] in values or not values):
                flags.append(rest.pop(0))
            elif not equals and flag in ("--cfg", "-c"):
                raise ValueError(f"{flag}: say what to show, one of {', '.join(values)}")
        elif flag in REFUSED:
            raise ValueError(f"{argument}: recipes do not take it; {REFUSED[flag]}")
        else:
            raise ValueError(no_flag(argument, rest, nearest))
    if not any(flag.partition("=")[0] in SHOWS for flag in flags):
        raise ValueError(f"{' '.join(flags)}: shows nothing by itself; add --cfg job")
    return flags, settings


def no_flag(argument: str, rest: Sequence[str], nearest: Callable[[str], str]) -> str:
    """One line for a flag, and the value behind it, that names the setting to write instead."""
    flag, equals, value = argument.partition("=")
    if not equals and rest and "=" not in rest[0] and not rest[0].startswith("--"):
        argument, value = f"{argument} {rest[0]}", rest[0]
    name = nearest(flag.lstrip("-").replace("-", "_"))
    if name == flag.lstrip("-").replace("-", "_"):
        return f"{argument}: settings have no dashes; write {name}={value}"
    if not name:
        return f"{argument}: settings are name=value; --settings lists them all"
    return f"{argument}: settings are name=value; did you mean {name}={value or '...'}"
