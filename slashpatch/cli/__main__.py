"""`python -m slashpatch.cli` is the `slashpatch` command."""

from .app import main

main()
