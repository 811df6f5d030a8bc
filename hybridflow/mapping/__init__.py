"""Automatic device mapping: which models share devices, in which layouts, how long a step takes,
and why.

Five folders, each of which imports only the ones before it: question, simulate, search, answer,
calibrate. Start at answer/auto.py (choose_placement) and answer/judge.py (judge); docs/mapping.md
says how it works. Pure Python and NumPy: no torch, no Ray.
"""
