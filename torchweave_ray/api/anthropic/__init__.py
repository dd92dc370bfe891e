"""/v1/messages and its count_tokens, as Anthropic's clients expect them."""
