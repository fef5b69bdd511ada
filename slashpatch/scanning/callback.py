"""SlashCallback: measure slash scores while the Hugging Face Trainer trains."""

from __future__ import annotations

import atexit
import gc
import logging
import os
import sys
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from transformers import PreTrainedTokenizerBase, TrainerCallback

from ..bridge.trained import (
    bridge_of_copy,
    evaluating,
    require_same_logits,
    undisturbed,
    unwrapped,
)
from ..data import display
from ..data.files import said
from ..errors import EmergenceError, SlashpatchError
from .emergence_result import Emergence
from .probe import probe_of, require_measures
from .record import Record, require_file
from .result import require_kappa

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge
    from transformers import Trainer, TrainerControl, TrainerState, TrainingArguments

_log = logging.getLogger(__name__)


class SlashCallback(TrainerCallback):
    """Measure the slash scores of every head every n steps of training, on fixed prompts.

    A callback of the Hugging Face Trainer. It measures before the first step, every `every` steps,
    and after the last. The model is not touched: each time its weights are copied into a second
    model on the same device, which is freed afterwards. So while it measures, the weights need
    their memory once more. Losses, weights and random numbers are bit for bit those of a run
    without it. Weights that are spread over processes (FSDP, DeepSpeed ZeRO-3) are refused.

    A model that slashpatch does not support is refused before the first step. Where a measurement
    fails later, as with weights that have become NaN, a warning is logged and training goes on.

    The highest score and the number of slash heads go to `trainer.state.log_history`, as
    `slash/...`. Loggers such as TensorBoard read their numbers before other callbacks do: for them,
    call `attach(trainer)`.

    Args:
        every: Number of steps between measurements.
        prompts: As in `scan`. None: natural text, tokenised by the Trainer's `processing_class`.
        offsets: As in `scan`.
        measures: What to measure besides slash scores, as in `emergence`.
        kappa: Least score of a slash head, in the log and in the view.
        engine: As in `scan`.
        random_tokens: Use uniform random tokens instead of natural text; needs no tokenizer.
        n_prompts: As in `scan`; also the number of prompts of repeated random tokens.
        max_tokens: As in `scan`.
        seed: Random seed of natural and random prompts.
        path: A .parquet file that always holds all measurements so far. A run that continues from a
            checkpoint (`resume_from_checkpoint`) continues the file: rows of steps after the
            checkpoint are replaced. A new run refuses a file that exists.
        overwrite: Whether a new run may replace an existing file.
        bridge: A TransformerBridge around the trained model itself, which is then measured in
            place, active patches included.
        live: Whether to show the heads on the terminal; None: if stderr is one.

    Attributes:
        every: Number of steps between measurements.

    Raises:
        EmergenceError: An unknown measure; when training begins, a file of another run.
        ScanError: κ outside [0, 1].
        ModelError: When training begins, a model that slashpatch does not support.
        PromptError: When training begins, prompts as in `scan`.
    """

    def __init__(
        self,
        every: int = 100,
        prompts: Any = None,
        offsets: Any = range(16),
        *,
        measures: Iterable[str] = (),
        kappa: float = 0.1,
        engine: str = "auto",
        random_tokens: bool = False,
        n_prompts: int = 8,
        max_tokens: int | None = None,
        seed: int = 0,
        path: str | os.PathLike[str] | None = None,
        overwrite: bool = False,
        bridge: TransformerBridge | None = None,
        live: bool | None = None,
    ) -> None:
        if isinstance(every, bool) or not isinstance(every, int) or every < 1:
            raise EmergenceError(f"every is a number of steps from 1; got {every!r}")
        require_kappa(kappa)
        require_file(path)
        self.every = every
        self.kappa = kappa
        self._path, self._overwrite = path, overwrite
        self._bridge = bridge
        self._live = sys.stderr.isatty() if live is None else live
        self._probe = {
            "prompts": prompts,
            "offsets": offsets,
            "measures": require_measures(measures),
            "engine": engine,
            "random_tokens": random_tokens,
            "n_prompts": n_prompts,
            "max_tokens": max_tokens,
            "seed": seed,
        }
        self._record: Record | None = None
        self._view: Any = None
        self._trainer: Trainer | None = None
        self._without_loss: list[int] = []
        self._loss: float | None = None
        self._failed: int | None = None

    def attach(self, trainer: Trainer) -> SlashCallback:
        """Add this callback to a trainer, and log through `trainer.log`, which reaches all loggers.

        Returns the callback.
        """
        if self not in trainer.callback_handler.callbacks:
            trainer.add_callback(self)
        self._trainer = trainer
        return self

    @property
    def result(self) -> Emergence:
        """The measurements so far. Raises EmergenceError before training begins."""
        if self._record is None:
            raise EmergenceError("nothing was measured yet; train first")
        return self._record.result

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Verify the model, continue the file, and measure before the first step."""
        if not state.is_world_process_zero:
            return
        self._end_view()
        self._without_loss, self._loss, self._failed = [], None, None
        model = unwrapped(kwargs["model"])
        with undisturbed(model):
            self._begin(model, state.global_step, kwargs.get("processing_class"))
        gc.collect()
        if self._live:
            self._view = display.live(self.result, total=state.max_steps, kappa=self.kappa)
            atexit.register(self._end_view)  # the Trainer does not say that it was interrupted
            self._view.start()
            self._show(state.global_step)
        if self._without_loss:
            self._log_numbers(state, control)

    def _begin(self, model: Any, step: int, tokenizer: Any) -> None:
        """Make the probe and the record. Raises what `scan` raises for this model."""
        if not isinstance(tokenizer, PreTrainedTokenizerBase):
            tokenizer = None
        if self._bridge is None:
            made = bridge_of_copy(model, tokenizer)
            require_same_logits(model, made)
        elif self._bridge.original_model is not model:
            raise EmergenceError(
                "the bridge is around another model than the trained one; wrap the model that the "
                "Trainer gets with slashpatch.load(model)"
            )
        else:
            made = self._bridge
        # A second start at step 0 in this process is the Trainer's search for a batch size.
        again = self._overwrite or self._record is not None
        existing = "continue" if step else "replace" if again else "refuse"
        with evaluating(made):
            probe = probe_of(made, **self._probe)
            details = {"every": self.every, "kappa": self.kappa}
            self._record = Record(probe, made, self._path, existing, **details)
            self._record.keep(found for found in self._record.rows if found <= step)
            if step in self._record.rows or step % self.every:
                probe.measure(made)  # what cannot be measured is refused now, not later
            else:
                self._record.add(step, f"step {step}", made)
                self._without_loss.append(step)

    def _measure(self, model: Any, state: TrainerState, control: TrainerControl) -> None:
        """Measure the model as it is now, and log the numbers. Failures are logged."""
        record, step = self._record, state.global_step
        if record is None or step in record.rows or step == self._failed:
            return
        model = unwrapped(model)
        try:
            with undisturbed(model):
                made = bridge_of_copy(model) if self._bridge is None else self._bridge
                with evaluating(made):
                    record.add(step, f"step {step}", made)
        except Exception as error:  # whatever it is, days of training are worth more
            self._failed = step
            why = said(error)
            _log.warning("slashpatch could not measure step %d: %s", step, why)
        finally:
            made = None
            gc.collect()
        if step in record.rows:
            self._without_loss.append(step)
            self._log_numbers(state, control)
            self._show(step)

    def _log_numbers(self, state: TrainerState, control: TrainerControl) -> None:
        """Put the newest numbers into the Trainer's log."""
        assert self._record is not None
        newest = Emergence(self._record.rows[state.global_step], self._record.header)
        row = newest.summary(self.kappa).iloc[0]
        best = newest.best()
        top = best.iloc[int(best["score"].argmax())]
        numbers: dict[str, float] = {
            "slash/heads": int(row["slash_heads"]),
            "slash/highest_score": float(row["score"]),
            "slash/highest_layer": int(top["layer"]),
            "slash/highest_head": int(top["head"]),
            "slash/highest_offset": int(top["offset"]),
        }
        for column in ("prefix_matching", "copying_loss"):
            if column in row:
                numbers[f"slash/{column}"] = float(row[column])
        if self._trainer is None:
            epoch = {} if state.epoch is None else {"epoch": state.epoch}
            state.log_history.append({**numbers, **epoch, "step": state.global_step})
            return
        wanted = control.should_log  # which logging sets to False, and the loss would not be logged
        self._trainer.log(numbers)
        control.should_log = wanted

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Measure, if it is time."""
        last = control.should_training_stop or state.global_step >= state.max_steps
        if last or state.global_step % self.every == 0:
            self._measure(kwargs["model"], state, control)

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Measure the last step, where another callback stopped the training."""
        if control.should_training_stop:
            self._measure(kwargs["model"], state, control)

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Take the loss, which the Trainer logs as a mean over the steps since it logged last."""
        loss = (kwargs.get("logs") or {}).get("loss")
        if self._record is None or loss is None:
            return
        self._loss = float(loss)
        # Step 0 has no loss: the mean is over the steps after it.
        waiting = [step for step in self._without_loss if step]
        self._without_loss = []
        if waiting:
            self._record.note("loss", self._loss, waiting)
            self._write()
        self._show(state.global_step)

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Take the evaluation's loss, where this step was measured."""
        loss = (kwargs.get("metrics") or {}).get("eval_loss")
        if self._record is not None and loss is not None and state.global_step in self._record.rows:
            self._record.note("eval_loss", float(loss), [state.global_step])
            self._write()

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Measure the last step if it was not yet, and end the view."""
        if self._record is None:
            return
        # By now the model may be the best one instead of the last.
        if state.best_model_checkpoint is None or not args.load_best_model_at_end:
            self._measure(kwargs["model"], state, control)
        self._end_view()

    def _end_view(self) -> None:
        """Leave the last view on the terminal, and give the terminal back."""
        atexit.unregister(self._end_view)
        if self._view is not None:
            self._view.stop()
            self._view = None

    def _write(self) -> None:
        """Write the file; where that fails, as on a full disk, training goes on."""
        assert self._record is not None
        try:
            self._record.write()
        except SlashpatchError as error:
            _log.warning("slashpatch could not write its measurements: %s", error)

    def _show(self, step: int | None = None) -> None:
        """Draw the view anew."""
        if self._view is not None and self._record is not None:
            self._view.update(self._record.result, step, self._loss)
