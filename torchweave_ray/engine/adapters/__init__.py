"""LoRA adapters in the engine: which are loaded, and who uses them."""
