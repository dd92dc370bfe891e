"""/v1/responses without a store: every call brings its whole conversation."""
