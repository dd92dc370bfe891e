"""LoRA adapters: their files, and what they add to the products of a model that runs."""
