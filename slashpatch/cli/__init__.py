"""The `slashpatch` command: the app, and one file a group of commands."""
