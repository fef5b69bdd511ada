"""`slashpatch theory predict`."""

from __future__ import annotations

import math

from .options import JsonOption, KappaOption, SeedOption
from .output import new_console, print_json
from .theory import (
    ConeOption,
    FrequenciesOption,
    LengthOption,
    OffsetOption,
    RateOption,
    SeedsOption,
    StepsOption,
    as_frequencies,
)


def predict(
    cone: ConeOption = 1.0,
    frequencies: FrequenciesOption = "all",
    offset: OffsetOption = 1,
    learning_rate: RateOption = None,
    steps: StepsOption = 500,
    length: LengthOption = 64,
    seeds: SeedsOption = 3,
    kappa: KappaOption = 0.5,
    as_json: JsonOption = False,
    seed: SeedOption = 0,
) -> None:
    """Predict when a slash forms and at which offset, without training (copying, plain descent)."""
    from ..theory import Settings
    from ..theory import predict as predicted

    settings = [
        Settings(
            cone=cone,
            frequencies=as_frequencies(frequencies),
            offset=offset,
            learning_rate=learning_rate,
            steps=steps,
            length=length,
            seed=number,
        )
        for number in range(seed, seed + seeds)
    ]
    found = [predicted(setting, kappa=kappa) for setting in settings]
    if as_json:
        runs = [
            {
                "seed": one.settings.seed,
                "slash": one.slash._asdict(),
                "closed_form": one.closed_form._asdict(),
                "rates": one.rates,
                "history": one.rows,
            }
            for one in found
        ]
        print_json({"settings": settings[0].to_dict(), "kappa": kappa, "runs": runs})
        return
    console = new_console()
    console.print(f"predicted: the slash score at Δ={offset} passes {kappa:g}", highlight=False)
    for one in found:
        where = "no slash forms" if one.offset is None else f"a slash forms at Δ={one.offset}"
        console.print(
            f"seed {one.settings.seed}: {_when(one.step, steps)}; {where}; closed form: "
            f"{_when(one.closed_form.step, steps)}; the fastest pair grows by "
            f"{max(one.rates):.2%} a step",
            highlight=False,
        )


def _when(step: float | int, steps: int) -> str:
    return f"after {step:.0f} steps" if math.isfinite(step) else f"not within {steps} steps"
