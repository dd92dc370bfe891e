"""Draws of tokens: the generator behind all of them, and the twins of `runner/sampler.py`."""
