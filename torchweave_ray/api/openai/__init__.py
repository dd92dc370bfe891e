"""/v1/completions, /v1/chat/completions and /v1/models, as the official clients expect them."""
