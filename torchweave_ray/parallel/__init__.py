"""Tensor parallelism inside one replica: a model's layers cut into slices, one process a rank.

Rank 0 is the process with the engine; `ranks.py` has the others and its word to them.
"""
