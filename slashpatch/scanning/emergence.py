"""emergence(): measure the checkpoints of a training run, one at a time."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from ..bridge.checkpoints import Checkpoint, checkpoints
from ..bridge.loading import load
from ..bridge.trained import bridge_of_copy, evaluating, require_same_logits, undisturbed
from ..data.progress import progress_over, without_progress
from ..errors import EmergenceError
from .emergence_result import Emergence
from .probe import Probe, probe_of, require_measures
from .record import Record, require_file, require_new

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge


def emergence(
    models: Any,
    prompts: Any = None,
    offsets: Any = range(16),
    *,
    measures: Iterable[str] = (),
    engine: str = "auto",
    random_tokens: bool = False,
    n_prompts: int = 8,
    max_tokens: int | None = None,
    seed: int = 0,
    device: Any = None,
    dtype: Any = None,
    tokenizer: Any = None,
    path: str | os.PathLike[str] | None = None,
    resume: bool = False,
    progress: bool | None = None,
) -> Emergence:
    """Measure the slash scores of every head at each checkpoint of a training run.

    Checkpoints are loaded one at a time, and each is freed before the next. All are measured on
    the same token ids, which the first one's tokenizer makes.

    Args:
        models: A folder that the Trainer wrote `checkpoint-N` folders to, a Transformers directory,
            a revision on the hub such as "EleutherAI/pythia-160m@step1000" (fetched into the hub's
            cache), a model in memory, or several of these, also from a generator. A Transformers
            model in memory is copied, not wrapped; a TransformerBridge is run as it is, active
            patches included. (step, model) gives a model's step. Where no step is known, models
            are counted from 0.
        prompts: As in `scan`.
        offsets: As in `scan`.
        measures: What to measure besides slash scores: "rank" (r1 of queries and keys), "cone",
            "bands" (shares of the frequency bands in the predicted peak), "prefix" (prefix
            matching on repeated random tokens), "copying" (loss on their second copy).
        engine: As in `scan`.
        random_tokens: Use uniform random tokens instead of natural text.
        n_prompts: As in `scan`; also the number of prompts of repeated random tokens.
        max_tokens: As in `scan`.
        seed: Random seed of natural and random prompts.
        device: Where checkpoints are loaded; None picks CUDA, then MPS, then CPU.
        dtype: Their dtype; None for float32.
        tokenizer: A tokenizer to use instead of the stored one.
        path: A .parquet file, written anew after each checkpoint.
        resume: Whether checkpoints that the file has already are left out.
        progress: Whether to show a progress bar; None: on a terminal only.

    Returns:
        An Emergence, with a row for each checkpoint and head.

    Raises:
        EmergenceError: Checkpoints of which only some have a step, or two have the same one; an
            unknown measure; models that differ in their heads; a file of another run.
        ModelError: No such checkpoint, or one that slashpatch does not support.
        PromptError: As in `scan`.
        OffsetError: As in `scan`.
    """
    names = require_measures(measures)
    require_file(path)
    if resume and path is None:
        raise EmergenceError("resume needs a path: the file of the run that is to be continued")
    require_new(path, "continue" if resume else "refuse")

    def make_probe(model: TransformerBridge) -> Probe:
        return probe_of(
            model,
            prompts,
            offsets,
            names,
            engine=engine,
            random_tokens=random_tokens,
            n_prompts=n_prompts,
            max_tokens=max_tokens,
            seed=seed,
        )

    def load_one(source: Any) -> TransformerBridge:
        if isinstance(source, Checkpoint):
            return source.load(device, dtype, tokenizer)
        return _bridge_of_model(source, tokenizer)

    run = _Run(make_probe, load_one, path, resume)
    for entry in _entries(models, progress):
        run.measure(*entry)
        del entry  # the next model is made when this one is gone
    return run.result()


class _Run:
    """One run of `emergence`: the record is begun with the first model that is loaded."""

    def __init__(
        self,
        make_probe: Callable[[TransformerBridge], Probe],
        load: Callable[[Any], TransformerBridge],
        path: str | os.PathLike[str] | None,
        resume: bool,
    ) -> None:
        self.make_probe, self.load = make_probe, load
        self.path, self.resume = path, resume
        self.record: Record | None = None
        self.skipped: Checkpoint | None = None
        self.before: Emergence | None = None
        if resume and path is not None and os.path.exists(path):
            self.before = Emergence.load(path)

    def measure(self, step: int, source: Any) -> None:
        """Measure one model, unless the file has it already."""
        checkpoint = source if isinstance(source, Checkpoint) else None
        name = f"model of step {step}" if checkpoint is None else checkpoint.name
        if checkpoint is not None and self._has(step, checkpoint):
            self.skipped = checkpoint
            return
        with without_progress():
            model = self.load(source)
            record = self._record(model)
            if checkpoint is not None:
                record.header |= {"model": checkpoint.run}
                # A file that SlashCallback began names none.
                record.header.setdefault("files", {})[name] = checkpoint.state()
            loss = None if checkpoint is None else checkpoint.loss()
            with undisturbed(model):
                record.add(step, name, model, loss)
        del model, source
        gc.collect()  # bridges hold themselves in circles

    def _has(self, step: int, checkpoint: Checkpoint) -> bool:
        """Whether the file that is resumed has a checkpoint. Raises EmergenceError if it changed"""
        if self.before is None:
            return False
        rows = self.before.frame.query("step == @step")
        if rows.empty:
            return False
        name = checkpoint.name
        same = self.before.provenance.get("files", {}).get(name) == checkpoint.state()
        if set(rows["checkpoint"]) != {name} or not same:
            raise EmergenceError(
                f"{os.fspath(self.path or '')!r} has another checkpoint of step {step} than "
                f"{name!r} is now; measure it anew with another file"
            )
        return True

    def _record(self, model: TransformerBridge) -> Record:
        """Return the record, which the first model begins."""
        if self.record is None:
            probe = self.make_probe(model)
            existing = "continue" if self.resume else "refuse"
            self.record = Record(probe, model, self.path, existing, files={})
        return self.record

    def result(self) -> Emergence:
        """Return the steps of this run. Raises EmergenceError if there were no models."""
        if self.skipped is not None and self.record is None:
            with without_progress():
                self._record(self.load(self.skipped))  # is the file of these prompts?
        if self.record is None:
            raise EmergenceError("no models were given; expected at least one checkpoint")
        return self.record.result


def _entries(models: Any, progress: bool | None) -> Iterator[tuple[int, Any]]:
    """Yield (step, checkpoint or model) of each model, while a bar is shown."""
    given = models if isinstance(models, Iterable) and not _is_one(models) else [models]
    if not isinstance(given, Sequence):  # a generator makes each model when it is asked for
        yield from _numbered(_expanded(given))
        return
    yield from progress_over(list(_numbered(_expanded(given))), "measuring", show=progress)


def _is_one(models: Any) -> bool:
    """Whether this is one model, although it could be iterated: a text, a path, a module."""
    return isinstance(models, (str, os.PathLike)) or hasattr(models, "forward")


def _numbered(entries: Iterable[tuple[int | None, Any]]) -> Iterator[tuple[int, Any]]:
    """Yield models with their steps; counted from 0 where none has one. Raises EmergenceError."""
    seen: set[int] = set()
    stepped: bool | None = None
    index = -1
    for step, source in entries:  # enumerate would keep the model before
        index += 1
        name = repr(source.name) if isinstance(source, Checkpoint) else f"model {index}"
        if stepped not in (None, step is not None):
            raise EmergenceError(
                f"{name} has {'no' if step is None else 'a'} step, unlike those before it; give "
                "(step, model) for each"
            )
        stepped = step is not None
        at = index if step is None else step
        if at in seen:
            raise EmergenceError(
                f"{name} has the step {at}, as another one has; give (step, model) for each"
            )
        seen.add(at)
        yield at, source
        del source


def _expanded(models: Iterable[Any]) -> Iterator[tuple[int | None, Any]]:
    """Yield (step or None, checkpoint or model); a folder of checkpoints stands for all of them."""
    for model in models:
        step = None
        if isinstance(model, tuple):
            if len(model) != 2 or type(model[0]) is not int or model[0] < 0:
                raise EmergenceError(
                    f"expected (step, model) with a step from 0; got a tuple of {len(model)} that "
                    f"begins with {model[0] if model else None!r}"
                )
            step, model = model
        if not isinstance(model, (str, os.PathLike)):
            yield step, model
            del model
            continue
        found = checkpoints(model)
        if step is not None and len(found) != 1:
            raise EmergenceError(
                f"{os.fspath(model)!r} holds {len(found)} checkpoints, which cannot all have the "
                f"step {step}"
            )
        for checkpoint in found:
            yield checkpoint.step if step is None else step, checkpoint


def _bridge_of_model(model: Any, tokenizer: Any) -> TransformerBridge:
    """Return a bridge around a copy of a Transformers model; a bridge as it is."""
    from transformers import PreTrainedModel

    if not isinstance(model, PreTrainedModel):
        return load(model)
    with undisturbed(model), evaluating(model):
        made = bridge_of_copy(model, tokenizer)
        require_same_logits(model, made)
        return made
