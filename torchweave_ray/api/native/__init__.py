"""/v1/generate and /v1/generate_nobatch, as the server before this one had them."""
