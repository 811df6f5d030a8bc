"""The training losses, one noun a file: each builds a LossFn of workers/engines/base.py.

A loss is a sum over scored tokens (or pairs of rows) with weights that hold the global
normalisation (aggregation.py), so it does not depend on how rows are cut into micro-batches and
ranks. Advantages and rewards are the controllers' business.
"""
