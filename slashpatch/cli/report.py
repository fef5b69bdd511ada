"""`slashpatch report`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..data.files import require_output
from ..errors import ReportError
from .length import announce_long_run, tokens_per_prompt
from .options import (
    DeviceOption,
    Dtype,
    DtypeOption,
    JsonOption,
    KappaOption,
    ModelOption,
    OffsetsOption,
    SeedOption,
    TextOption,
    load_bridge,
)
from .output import new_console, print_json, print_written

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge

    from ..scanning.result import Scan

#: Two scans, one of them with moments, and about what the explanations and the text take.
_PASSES = 15
#: Options that say how a model is run, and their defaults.
_OF_A_RUN: dict[str, Any] = {
    "--model": None,
    "--text": None,
    "--look-at": None,
    "--offsets": "0-15",
    "--heads": 8,
    "--prompts": 8,
    "--max-tokens": None,
    "--seed": 0,
    "--device": None,
    "--dtype": Dtype.float32,
}
#: Tokens of the built-in text of a report, and heads that it is read with.
_TEXT_TOKENS = 256


def _files(name: str, what: str) -> Any:
    return typer.Option(name, metavar="FILE", help=f"{what}; may be repeated.")


def report(
    out: Annotated[Path, typer.Option("--out", "-o", metavar="FILE", help="The page, as .html.")],
    model: ModelOption = None,
    text: TextOption = None,
    look_at: Annotated[
        list[Path] | None,
        _files("--look-at", "Text file to show token by token. Default: a built-in text"),
    ] = None,
    offsets: OffsetsOption = "0-15",
    kappa: KappaOption = 0.1,
    heads: Annotated[
        int, typer.Option(min=0, help="How many of the strongest slash heads to explain.")
    ] = 8,
    prompts: Annotated[int, typer.Option(min=1, help="Number of prompts.")] = 8,
    max_tokens: Annotated[
        int | None,
        typer.Option(min=2, help="Tokens per prompt. Default: 256, or the model's context."),
    ] = None,
    scan: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="A saved scan: the report is made of saved files alone, and no model is run.",
        ),
    ] = None,
    random: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="With --scan: a saved scan of random tokens."),
    ] = None,
    explanation: Annotated[
        list[Path] | None, _files("--explanation", "A saved explanation (explain --out)")
    ] = None,
    result: Annotated[
        list[Path] | None,
        _files("--result", "A saved result of measure, flow, copying or sweep (--out)"),
    ] = None,
    keys: Annotated[
        list[Path] | None, _files("--keys", "A text that sp.top_keys read and saved")
    ] = None,
    title: Annotated[str | None, typer.Option(help="Heading. Default: the model's name.")] = None,
    as_json: JsonOption = False,
    seed: SeedOption = 0,
    device: DeviceOption = None,
    dtype: DtypeOption = Dtype.float32,
) -> None:
    """Write an interactive page about a model's slash heads: one HTML file, no network."""
    from ..maths.offsets import as_offsets
    from ..reporting.page.assets import require_extra
    from ..reporting.page.report import SUFFIXES, command_line
    from ..reporting.page.report import report as write_report
    from ..scanning.result import require_kappa

    wanted = as_offsets(offsets)
    require_kappa(kappa)
    require_output(out, SUFFIXES)
    require_extra()
    parts: dict[str, Any] = {
        "explanations": list(explanation or ()),
        "results": list(result or ()),
        "texts": list(keys or ()),
    }
    if scan is not None:
        _refuse_options_of_a_run(
            model, text, look_at, offsets, heads, prompts, max_tokens, seed, device, dtype
        )
        parts |= {"scan": scan, "random": random}
    else:
        if random is not None:
            raise ReportError("--random goes with --scan; without it both scans are made")
        parts = _loaded(parts)
        bridge = load_bridge(model, device, dtype)
        _require_same_weights(bridge, parts)
        n_tokens = tokens_per_prompt(bridge, max_tokens, 256)
        announce_long_run(bridge, prompts, n_tokens, _PASSES)
        made = _run(bridge, text, look_at, wanted, kappa, heads, prompts, n_tokens, seed, parts)
        parts = {name: [*made.get(name, ()), *value] for name, value in parts.items()}
        parts |= {"scan": made["scan"], "random": made["random"]}
    write_report(out, **parts, kappa=kappa, title=title, command=command_line())
    if as_json:
        print_json({"path": str(out), "bytes": out.stat().st_size})
    else:
        print_written(new_console(), out)


def _refuse_options_of_a_run(*values: Any) -> None:
    """Raise ReportError for an option that says how to run a model, where none is run."""
    for (option, default), value in zip(_OF_A_RUN.items(), values, strict=True):
        if value not in (default, []):
            raise ReportError(f"with --scan no model is run, so {option} has no use; leave it out")


def _loaded(parts: dict[str, list[Path]]) -> dict[str, list[Any]]:
    """Return saved parts as objects, so that a damaged file is noticed before anything is run."""
    from ..effects.result import Result
    from ..explaining.result import Explanation
    from ..scanning.top_keys_result import TopKeys

    kinds: dict[str, Any] = {"explanations": Explanation, "results": Result, "texts": TopKeys}
    return {name: [kinds[name].load(path) for path in paths] for name, paths in parts.items()}


def _require_same_weights(bridge: TransformerBridge, parts: dict[str, list[Any]]) -> None:
    """Raise ReportError for a saved part of other weights, before the model is run."""
    from ..bridge.fingerprint import fingerprint

    mine = fingerprint(bridge)
    for name, objects in parts.items():
        for index, one in enumerate(objects):
            theirs = one.provenance.get("fingerprint")
            if theirs != mine:
                raise ReportError(
                    f"{name}[{index}] is of another model than {bridge.cfg.model_name}: "
                    f"{one.provenance.get('model')} (weights {str(theirs)[:12]} and {mine[:12]}); "
                    "a report is of one model"
                )


def _run(
    bridge: TransformerBridge,
    text: Path | None,
    look_at: list[Path] | None,
    offsets: tuple[int, ...],
    kappa: float,
    n_heads: int,
    n_prompts: int,
    n_tokens: int,
    seed: int,
    parts: dict[str, list[Any]],
) -> dict[str, Any]:
    """Return what a report of a model needs: two scans, explanations, texts."""
    from ..explaining.explain import explanations
    from ..scanning.scan import scan
    from ..scanning.top_keys import top_keys

    common: dict[str, Any] = {
        "offsets": offsets,
        "n_prompts": n_prompts,
        "max_tokens": n_tokens,
        "seed": seed,
    }
    natural = scan(bridge, text, **common)
    control = scan(bridge, random_tokens=True, moments=False, **common)
    known = {one.head for one in parts["explanations"]}
    strongest = _strongest(natural, kappa, max(n_heads, 1))
    wanted = [head for head in strongest[:n_heads] if head not in known]
    explained = (
        list(
            explanations(
                bridge,
                wanted,
                text,
                n_prompts=n_prompts,
                max_tokens=n_tokens,
                kappa=kappa,
                seed=seed,
            )
        )
        if wanted
        else []
    )
    reading: dict[str, Any] = {"heads": strongest, "offsets": offsets}
    if look_at:
        texts = [top_keys(bridge, path, **reading) for path in look_at]
    else:
        texts = [top_keys(bridge, None, **reading, max_tokens=min(_TEXT_TOKENS, n_tokens))]
    return {"scan": natural, "random": control, "explanations": explained, "texts": texts}


def _strongest(natural: Scan, kappa: float, n: int) -> list[Any]:
    """Return the heads with the highest scores; at least one, also if none reaches κ."""
    from ..reporting.tables import strongest

    heads = list(dict.fromkeys(entry.head for entry in natural.slash_heads(kappa)))
    return heads[:n] or [strongest(natural)[0]]
