"""A reward in a module without imports, which a task process loads in no time."""


def by_length(*, response: str, **columns: object) -> float:
    """A reward that differs between responses."""
    return float(len(response) % 5)
