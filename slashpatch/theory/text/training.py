"""train_text: a small language model learns from text, and is measured while it does."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import TrainerCallback

from ...bridge.loading import load
from ...data.progress import busy, progress_over
from ...edits import parse_edit
from ...errors import TheoryError
from ...patching.patch import hooks, patch
from ...scanning.callback import SlashCallback
from ..settings import as_integer, as_settings
from ..training import with_threads
from .corpus import Rows, Sequences, chosen, new_tokenizer, python_text, split, token_ids, windows
from .folder import alone, last_checkpoint, require_folder
from .model import CentredEmbeddings, new_model
from .patterns import PatternCallback
from .run import CHECKPOINTS, MODEL, PATTERNS, RANDOM, SETTINGS, TEXT, TOKENIZER, TextRun
from .settings import TextSettings
from .weights import copy_weights, plain_weights

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

#: Held-out sequences of each evaluation, and prompts of each measurement.
_N_HELD_OUT, _N_PROMPTS = 64, 8
_WARMUP, _DECAY, _WEIGHT_DECAY = 50, 0.3, 0.1
#: Offsets of the slash scores.
_OFFSETS = range(16)


def train_text(
    folder: str | os.PathLike[str],
    settings: TextSettings | None = None,
    *,
    resume: bool = False,
    watch: bool = False,
    threads: int | None = None,
    progress: bool | None = None,
    **knobs: Any,
) -> TextRun:
    """Train a small Llama on the text that comes with Python, and measure its heads meanwhile.

    Transformers' model and Trainer, AdamW, next-token loss; about six minutes of processor time at
    the default settings. Every `every` steps the held-out loss is taken, and `SlashCallback`
    measures slash scores, r1, the cone, band shares, prefix matching and the copying loss, on
    held-out text and on uniform random tokens.

    Args:
        folder: Where everything about the run is written; see `TextRun`.
        settings: A `TextSettings`; or give its fields by name.
        resume: Continue a run in the folder that was interrupted, from its last checkpoint. On the
            same machine, with as many threads, the final weights are bit for bit those of a run
            that was not. A finished run is loaded.
        watch: Whether to draw the heads on the terminal as they change.
        threads: Threads of torch meanwhile; None leaves their number as it is.
        progress: Whether to show a progress bar; None: on a terminal only.
        **knobs: Fields of `TextSettings`.

    Returns:
        The finished run.

    Raises:
        TheoryError: Invalid settings, a folder with another run or in which another process trains,
            more tokens or longer sequences than the text has, or weights that are not finite.
        OutputError: A folder that cannot be made or written to.
        EditError, HeadError, OffsetError or ModelError: Edits that do not fit the model.
    """
    settings = as_settings(TextSettings, settings, knobs)
    if threads is not None:
        threads = as_integer("threads", threads, 1, 1024)
    root = Path(folder)
    with with_threads(threads), torch.inference_mode(False), torch.enable_grad(), _quiet_trainer():
        if settings.edits and not (root / SETTINGS).exists():
            hooks(load(new_model(settings)), *settings.edits)  # refused now, before minutes of work
        require_folder(root, settings, resume)
        with alone(root):
            if not (root / MODEL).exists():
                _train(root, settings, watch, progress)
    return TextRun.load(root)


@contextlib.contextmanager
def _quiet_trainer() -> Iterator[None]:
    """Keep the notes and bars of Transformers' own off the terminal."""
    from transformers.utils import logging

    before, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(before)
        if bars:
            logging.enable_progress_bar()


def _tokenizer(root: Path, texts: list[str], settings: TextSettings) -> PreTrainedTokenizerFast:
    """Return the run's tokenizer, trained the first time and read afterwards."""
    from transformers import PreTrainedTokenizerFast

    folder = root / TOKENIZER
    if not folder.exists():
        with busy("training a tokenizer"):
            made = new_tokenizer(texts, settings.vocabulary, settings.length)
        if len(made) < settings.vocabulary:
            raise TheoryError(
                f"the text has no more than {len(made)} tokens; got vocabulary="
                f"{settings.vocabulary}. Use a smaller one"
            )
        unfinished = root / "tokenizer.unfinished"
        made.save_pretrained(unfinished)
        unfinished.rename(folder)
    return PreTrainedTokenizerFast.from_pretrained(folder)


def _train(root: Path, settings: TextSettings, watch: bool, progress: bool | None) -> None:
    from transformers import PrinterCallback, TrainingArguments

    from .trainer import FiniteWeights, PlainTrainer

    with busy("reading the text"):
        training, held_out = split(python_text())
        tokenizer = _tokenizer(root, training, settings)
        ids = token_ids(tokenizer, training)
        rows = windows(ids, settings.length)
        held = windows(token_ids(tokenizer, held_out), settings.length)
    held = chosen(held, _N_HELD_OUT + _N_PROMPTS)
    model = new_model(settings)
    edits = [parse_edit(text) for text in settings.edits]
    bridge = load(model, tokenizer=tokenizer) if edits else None
    checkpoint = last_checkpoint(root / CHECKPOINTS)
    arguments = TrainingArguments(
        output_dir=str(root / CHECKPOINTS),
        use_cpu=True,
        report_to=[],
        max_steps=settings.steps,
        per_device_train_batch_size=settings.batch_size,
        per_device_eval_batch_size=settings.batch_size,
        train_sampling_strategy="sequential",  # the sequences are in random order already
        learning_rate=settings.learning_rate,
        adam_beta2=0.95,
        weight_decay=_WEIGHT_DECAY,
        warmup_steps=min(_WARMUP, settings.steps // 4),
        lr_scheduler_type="warmup_stable_decay",
        lr_scheduler_kwargs={
            "num_decay_steps": round(_DECAY * settings.steps),
            "decay_type": "linear",
            "min_lr_ratio": 0.1,
        },
        logging_steps=settings.every,
        eval_strategy="steps",
        eval_steps=settings.every,
        eval_on_start=checkpoint is None,
        save_strategy="steps",
        save_steps=4 * settings.every,
        save_total_limit=2,
        disable_tqdm=True,
        seed=settings.seed,
    )
    callbacks: list[Any] = [_Bar(False if watch else progress), FiniteWeights(settings.every)]
    if settings.centred:
        counts = torch.bincount(ids, minlength=settings.vocabulary).float()
        callbacks.append(CentredEmbeddings(counts / counts.sum()))
    callbacks += _measurements(root, settings, held[_N_HELD_OUT:], bridge, watch)
    trainer = PlainTrainer(
        model=model,
        args=arguments,
        train_dataset=Sequences(rows, settings),
        eval_dataset=Rows(held[:_N_HELD_OUT]),
        processing_class=tokenizer,
        callbacks=callbacks,
    )
    trainer.remove_callback(PrinterCallback)  # which would print each loss
    with patch(bridge, *edits) if bridge is not None else contextlib.nullcontext():
        trainer.train(resume_from_checkpoint=checkpoint)
    _finish(root, settings, model, tokenizer)


def _measurements(
    root: Path, settings: TextSettings, prompts: Any, bridge: Any, watch: bool
) -> list[Any]:
    """Return the callbacks that measure: held-out text, random tokens, and patterns to look at.

    Where edits give heads keys of their own, queries and keys are not measured: `scan` refuses to.
    """
    measures = ["prefix", "copying"]
    if not any(parse_edit(text).uses_per_head_keys for text in settings.edits):
        bands = ["bands"] if settings.positions == "rope" else []
        measures = ["rank", "cone", *bands, *measures]
    shared = {"every": settings.every, "offsets": _OFFSETS, "bridge": bridge, "overwrite": True}
    return [
        SlashCallback(prompts=prompts, measures=measures, path=root / TEXT, live=watch, **shared),
        SlashCallback(
            random_tokens=True,
            n_prompts=_N_PROMPTS,
            max_tokens=settings.length,
            measures=measures[:-2],
            path=root / RANDOM,
            live=False,
            **shared,
        ),
        PatternCallback(root / PATTERNS, settings, bridge),
    ]


def _finish(
    root: Path, settings: TextSettings, model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast
) -> None:
    """Write the final model, whole or not at all, and delete the checkpoints."""
    final = new_model(settings)
    copy_weights(final, plain_weights(model))
    unfinished = root / "model.unfinished"
    final.save_pretrained(unfinished)
    tokenizer.save_pretrained(unfinished)
    unfinished.rename(root / MODEL)
    shutil.rmtree(root / CHECKPOINTS, ignore_errors=True)


class _Bar(TrainerCallback):
    """A progress bar over the steps."""

    def __init__(self, show: bool | None) -> None:
        self.show = show
        self.steps: Iterator[int] = iter(())

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        left = range(state.global_step, state.max_steps)
        self.steps = iter(progress_over(left, "training", show=self.show))
        next(self.steps, None)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        next(self.steps, None)
