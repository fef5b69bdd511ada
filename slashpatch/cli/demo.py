"""`slashpatch demo`."""

from __future__ import annotations

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


def demo(
    model: ModelOption = None,
    as_json: JsonOption = False,
    seed: SeedOption = 0,
    device: DeviceOption = None,
    dtype: DtypeOption = Dtype.float32,
) -> None:
    """Tell the story in about a minute: find a slash head, remove its diagonal, see the effect."""
    from .story import tell

    console = None if as_json else new_console()
    record = tell(load_bridge(model, device, dtype), console, seed)
    if as_json:
        print_json(record)
