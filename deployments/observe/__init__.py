"""Metrics handed to Ray."""
