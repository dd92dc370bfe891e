"""The HTTP API over any `Backend`: schemas, conversion, server-sent events. No torch, no Ray."""
