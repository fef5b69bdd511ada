"""Run the `slashpatch` command: `python -m slashpatch.cli`."""

from .app import main

main()
