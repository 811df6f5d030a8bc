"""Automatic device mapping: which models share devices, in which layouts, how long a step takes, and why.

Start at auto.choose_placement and judge.judge; docs/mapping.md says how it works. Pure Python and NumPy: no
torch, no Ray.
"""
