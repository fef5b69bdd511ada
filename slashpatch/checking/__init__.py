"""The contract that slashpatch keeps, tried on the user's own model."""
