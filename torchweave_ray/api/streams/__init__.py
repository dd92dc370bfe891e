"""Streams that a client can open again: ids of their events, records of their requests."""
