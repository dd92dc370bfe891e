"""Offline batches over a Ray cluster."""
