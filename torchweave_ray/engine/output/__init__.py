"""What becomes of a step: results to sequences, tokens to text."""
