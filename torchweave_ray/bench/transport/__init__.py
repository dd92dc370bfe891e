"""What a token costs on its way: the paths, an engine without a model, and the measuring."""
