"""A loaded model: how it describes itself, and its memory, let go and taken again."""
