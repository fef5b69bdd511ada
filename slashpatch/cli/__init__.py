"""The `slashpatch` command: the app, and one file for each group of commands."""
