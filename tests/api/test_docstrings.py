"""Every public name says what it is: help(hybridflow.NAME) is documentation, not a signature (issue
10, tried by a stranger, F)."""

from __future__ import annotations

import inspect

import pytest

import hybridflow

PACKAGES = ("hybridflow", "controllers", "workers", "recipes", "cluster")


def function_of(member: object) -> object:
    """What a class attribute runs, if it is a method or a property."""
    if isinstance(member, property):
        return member.fget
    return member.__func__ if isinstance(member, (classmethod, staticmethod)) else member


@pytest.mark.parametrize("name", hybridflow.__all__)
def test_a_public_name_and_its_methods_have_docstrings(name: str) -> None:
    value = vars(hybridflow).get(name) or hybridflow.__getattr__(name)
    text = inspect.getdoc(value) or ""
    assert text, name
    if not inspect.isclass(value):
        return
    assert vars(value).get("__doc__") and not text.startswith(f"{name}(*"), f"{name}: a signature"
    for base in value.__mro__:
        if base.__module__.partition(".")[0] not in PACKAGES:
            continue
        for method, member in vars(base).items():
            if inspect.isfunction(function_of(member)) and not method.startswith("_"):
                # A method that overrides one is documented where it is declared.
                assert inspect.getdoc(inspect.getattr_static(value, method)) or any(
                    vars(other)[method].__doc__ for other in value.__mro__ if method in vars(other)
                ), f"{name}.{method}"
