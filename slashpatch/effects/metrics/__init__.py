"""What is measured of a run: numbers per prompt, from logits or attention."""
