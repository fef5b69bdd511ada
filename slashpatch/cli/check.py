"""`slashpatch check`."""

from __future__ import annotations

import typer

from .options import (
    DeviceOption,
    Dtype,
    DtypeOption,
    JsonOption,
    ModelOption,
    SeedOption,
    load_bridge,
)
from .output import new_console, print_json


def check(
    model: ModelOption = None,
    as_json: JsonOption = False,
    seed: SeedOption = 0,
    device: DeviceOption = None,
    dtype: DtypeOption = Dtype.float32,
) -> None:
    """Check on a model all that slashpatch promises: pass, refused (why) or fail (exit code 1)."""
    from ..checking.check import check as check_model

    report = check_model(load_bridge(model, device, dtype), seed=seed)
    if as_json:
        print_json(report.to_dict())
    else:
        from ..reporting.checks import check_table

        new_console().print(check_table(report))
    if not report.ok:
        raise typer.Exit(1)
