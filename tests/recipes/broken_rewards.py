"""A reward module that cannot be imported."""

f = undefined  # noqa: F821
