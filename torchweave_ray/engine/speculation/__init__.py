"""Guesses at the next tokens, verified by the steps that compute them."""
