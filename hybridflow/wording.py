"""Small words of messages: the article before a type, the singular and plural of a noun."""

from __future__ import annotations


def kind_of(value: object) -> str:
    """The value's type with its article.

    >>> kind_of(3), kind_of("x")
    ('an int', 'a str')
    """
    name = type(value).__name__
    if name[0].lower() in "aeiou":
        return f"an {name}"
    return f"a {name}"


def counted(number: int, nouns: str) -> str:
    """A number and its noun, which is given in the plural.

    >>> counted(1, "steps"), counted(5, "steps")
    ('1 step', '5 steps')
    """
    if number == 1:
        nouns = nouns.removesuffix("s")
    return f"{number} {nouns}"
