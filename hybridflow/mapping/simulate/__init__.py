"""Simulators: how long a call takes and how much memory it needs, for a model with a layout."""
