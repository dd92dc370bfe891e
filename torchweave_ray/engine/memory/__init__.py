"""What an engine does with its memory when it has no work: saved to a disk, given back."""
