"""Environments and tools of other people's packages, as episodes. Each package is imported when its
first episode begins; none of them is a dependency of this project."""
