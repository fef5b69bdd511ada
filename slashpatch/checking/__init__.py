"""Check slashpatch's promises on the user's own model."""
