"""API keys across processes: one ledger for several ingresses, and a warning where none are."""
