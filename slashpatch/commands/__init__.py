"""Commands of `slashpatch` that have a file of their own; heavy imports inside them only."""
