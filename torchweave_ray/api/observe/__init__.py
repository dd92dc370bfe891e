"""Metrics and traces of the HTTP side."""
