"""Stopping without losing a request: the ingress's gate, and who closes it from outside."""
