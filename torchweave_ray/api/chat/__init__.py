"""Conversations, whatever the protocol: messages to a prompt, an answer's text to its parts."""
