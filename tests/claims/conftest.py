"""The command, run in this process on a tiny model, as the tests of the commands have it."""

from ..cli.conftest import call, model  # noqa: F401
