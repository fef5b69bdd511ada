"""evidence(): every claim of the paper on one model, with a verdict by rules written before."""

from __future__ import annotations

import os
import platform
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import bridge
from ..bridge.provenance import provenance
from ..bridge.workers.options import Workers, as_workers
from ..data.files import require_output
from ..data.journal import Journal, require_same
from ..data.progress import under_title
from ..effects.running.conditions import require_options
from .interventions import run_interventions
from .measured import Measured, attempted
from .moving import MOVED, moved_copying, planted
from .pairs import ON_PAIRS, on_pairs
from .passing import (
    ON_NATURAL_TEXT,
    ON_REPEATED_TOKENS,
    on_natural_text,
    on_repeated_tokens,
    self_repair,
)
from .result import SUFFIXES, Evidence
from .rules import RULES, rules_of
from .scores import existence, near_rank_one, predicted, scans
from .settings import FULL, QUICK
from .subjects import Subjects, subjects

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge


def evidence(
    model: TransformerBridge,
    prompts: Any = None,
    quick: bool = False,
    *,
    path: str | os.PathLike[str] | None = None,
    resume: bool = False,
    seed: int = 0,
    progress: bool | None = None,
    workers: int | str | Workers | None = None,
) -> Evidence:
    """Test the claims of arXiv 2601.08297 on a model, each with a verdict.

    Slash heads, their offsets and directions are picked on some prompts and tested on others. Every
    test has an interval over prompts, most have a control, and each can come out as supported,
    contradicted or cannot tell, by the rules and thresholds of `slashpatch.claims.rules`. Those are
    *ours*, and so are the tests: the paper's own thresholds and numbers are not used.

    Args:
        model: A TransformerBridge in evaluation mode; active patches are part of the clean run.
        prompts: Natural text, as for `scan`; at least 16 prompts, else there are no intervals.
            None: built-in prose and code.
        quick: Fewer and shorter prompts: about a sixth of the time, wider intervals.
        path: A .json, .html or .md file to write. Finished steps are written next to it while it
            runs, to a file with ".unfinished" after its name.
        resume: Continue from that file, or load a finished .json file.
        seed: Random seed of prompts, controls and resamples.
        progress: Whether to show progress bars; None: on a terminal only.
        workers: Number of worker processes for the runs under edits, or a `Workers`.

    Returns:
        An Evidence: `frame` has a row per claim, `tests` a row per test.

    Raises:
        ModelError: A model that slashpatch does not support.
        PromptError: Fewer than 4 different prompts, one of fewer than 16 tokens, or prompts that
            do not fit the model.
        OutputError: A path that cannot be written.
        SweepError: The file at `path` holds another run.
        WorkerError: Workers that cannot start, or differ from this process.
        ExtraError: `workers` without the extra `slashpatch[ray]`.
    """
    require_options(seed, 0.95)
    target = None if path is None else Path(path)
    require_output(target, SUFFIXES)
    settings = (QUICK if quick else FULL).fitting(bridge.read(model).n_ctx)
    pool_of = as_workers(workers)
    on = subjects(model, prompts, settings, seed, pool_of, progress)
    origin = provenance(
        model,
        prompts=[on.picking.record, on.natural.record, on.random.record],
        settings=on.settings.to_dict(),
        slashes=[str(slash) for slash in on.slashes],
        quick=quick,
        seed=seed,
    )
    if target is None:
        return _run(on, origin, None)
    unfinished = target.with_name(target.name + ".unfinished")
    if resume and target.exists() and not unfinished.exists() and target.suffix == ".json":
        done = Evidence.load(target)
        require_same(origin, done.provenance, target)
        return done
    with Journal(unfinished, origin, resume, STEPS, None) as journal:
        found = _run(on, origin, journal)
        found.save(target)
        journal.remove()
    return found


def _run(on: Subjects, origin: dict[str, Any], journal: Journal | None) -> Evidence:
    """Run the steps that the journal does not hold, and put all tests together."""
    found: list[Measured] = []
    for number, (name, step) in enumerate(STEPS.items(), start=1):
        rows = None if journal is None else journal.rows.get(name)
        if rows is None:
            with under_title(f"{number} of {len(STEPS)}, {name}"):
                tests = step(on)
            if journal is not None:
                journal.write({name: [test.to_dict() for test in tests]})
        else:
            tests = [Measured(**row) for row in rows]
        found += tests
    order = list(RULES)
    found.sort(key=lambda test: order.index(test.test))
    machine = {"machine": f"{platform.machine()}, {os.cpu_count()} cores, {platform.system()}"}
    return Evidence(tuple(found), {**origin, **machine})


def _from_scans(on: Subjects) -> list[Measured]:
    """Return the tests of claims 1, 2 and 5."""
    natural = scans(on, on.natural, True, "scanning natural text")
    random = scans(on, on.random, False, "scanning random tokens")
    return [
        *existence(on, natural, random),
        *attempted(rules_of(2), lambda: near_rank_one(on, natural)),
        *attempted(rules_of(5), lambda: predicted(on, natural)),
    ]


def _step(tests: Sequence[str], measure: Callable[[Subjects], list[Measured]]) -> Any:
    """Return a step that tells why its tests could not be measured, if the model refuses."""
    return lambda on: attempted(tests, lambda: measure(on))


#: The steps of a run, by name.
STEPS: dict[str, Callable[[Subjects], list[Measured]]] = {
    "scores, ranks and profiles": _from_scans,
    "edited heads": run_interventions,
    "predictions on natural text": _step(ON_NATURAL_TEXT, on_natural_text),
    "copying": _step(ON_REPEATED_TOKENS, on_repeated_tokens),
    "self-repair": _step(("self-repair",), self_repair),
    "clean/corrupt pairs": _step(tuple(ON_PAIRS.values()), on_pairs),
    "shifted slashes": _step(MOVED, moved_copying),
    "planted slashes": _step(rules_of(9), planted),
}
