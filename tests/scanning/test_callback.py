import json
import logging
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pandas as pd
import pytest
import torch
from transformers import TrainerCallback

import slashpatch as sp
from slashpatch.bridge import trained

from ..tiny import llama, tokenizer
from ..training import trainer

ROOT = Path(__file__).parents[2]
SMALL = {"random_tokens": True, "n_prompts": 2, "max_tokens": 40, "offsets": range(4)}
ALL = ("rank", "cone", "bands", "prefix", "copying")


def watch(every=4, **options):
    return sp.SlashCallback(every, live=False, **{**SMALL, **options})


def run(code, *arguments):
    """Run code in a new process, from the root of the repository."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), *map(str, arguments)],
        cwd=ROOT, capture_output=True, text=True, check=False, env=environment,
    )  # fmt: skip


TWO_RUNS = """
    import hashlib, json, random, sys
    import numpy, torch
    torch.set_num_threads(1)
    from tests.tiny import llama
    from tests.training import trainer

    folder, watched = sys.argv[1], sys.argv[2] == "watched"
    assert "slashpatch" not in sys.modules
    runs = {
        "plain": {},
        "dropout": {"gradient_checkpointing": True, "gradient_accumulation_steps": 2},
        "bf16": {"bf16": True},
        "tied": {"eval_strategy": "steps", "eval_steps": 5},
    }
    told = {}
    for name, options in runs.items():
        callbacks = []
        if watched:
            import slashpatch as sp
            measures = ("rank", "cone", "bands", "prefix", "copying")
            callbacks = [sp.SlashCallback(3, measures=measures, random_tokens=True, n_prompts=2,
                                          max_tokens=40, live=False,
                                          path=f"{folder}/{name}.parquet")]
        config = {"attention_dropout": 0.2} if name == "dropout" else {}
        config |= {"tie_word_embeddings": True} if name == "tied" else {}
        model = llama(sharpness=1.0, attn_implementation="sdpa", **config).train()
        made = trainer(folder, callbacks, model, steps=8, logging_steps=1, **options)
        made.train()
        sha = hashlib.sha256()
        for weight in model.state_dict().values():
            sha.update(weight.numpy().tobytes())
        logged = [
            {key: row[key] for key in ("step", "loss", "grad_norm", "eval_loss") if key in row}
            for row in made.state.log_history
        ]
        told[name] = {
            "logged": [row for row in logged if len(row) > 1],
            "weights": sha.hexdigest(),
            "torch": hashlib.sha256(torch.get_rng_state().numpy().tobytes()).hexdigest(),
            "random": hashlib.sha256(repr(random.getstate()).encode()).hexdigest(),
            "numpy": hashlib.sha256(repr(numpy.random.get_state()).encode()).hexdigest(),
            "training": [model.training, model.model.layers[0].self_attn.training],
            "attention": model.config._attn_implementation,
            "modules": [type(module).__name__ for module in model.modules()],
            "gradients": torch.is_grad_enabled(),
        }
    print(json.dumps(told))
"""


def test_a_watched_run_is_bit_for_bit_the_run_without(tmp_path):
    """Losses, weights and random numbers, in processes of which only one loads slashpatch."""
    told = []
    for how in ("alone", "watched"):
        done = run(TWO_RUNS, tmp_path, how)
        assert done.returncode == 0, done.stderr
        told.append(json.loads(done.stdout.splitlines()[-1]))
    alone, watched = told
    assert list(alone) == ["plain", "dropout", "bf16", "tied"]
    for name in alone:
        assert alone[name] == watched[name], name
        assert len(alone[name]["logged"]) >= 8
        assert sp.Emergence.load(tmp_path / f"{name}.parquet").steps == (0, 3, 6, 8)
    assert len({alone[name]["weights"] for name in alone}) == 4


def test_it_measures_what_emergence_measures_of_the_checkpoints(tmp_path):
    watched = watch(4, measures=ALL)
    trainer(tmp_path, [watched], steps=12, save_strategy="steps", save_steps=4).train()
    found = watched.result
    assert found.steps == (0, 4, 8, 12)
    stored = sp.emergence(tmp_path, measures=ALL, device="cpu", **SMALL)
    assert stored.steps == (4, 8, 12)
    same = found.frame[found.frame["step"] > 0].reset_index(drop=True)
    differ = ["checkpoint", "eval_loss"]
    pd.testing.assert_frame_equal(stored.frame.drop(columns=differ), same.drop(columns=differ))
    assert found.frame["loss"].isna().sum() == 8  # step 0 has none
    assert same["fingerprint"].nunique() == 3


def test_it_measures_what_scan_measures(tmp_path):
    watched = watch(5, measures=("rank", "cone"))
    model = llama(sharpness=1.0).train()
    made = trainer(tmp_path, [watched], model, steps=5)
    made.train()
    bridge = sp.load(model)
    found = sp.scan(bridge, **SMALL, seed=0)
    assert torch.equal(watched.result.scores[-1], found.scores)
    now = watched.result.frame.query("step == 5").reset_index(drop=True)
    columns = ["r1_q", "r1_k", "cone_q", "cone_k", "cone_x"]
    pd.testing.assert_frame_equal(now[columns], found.rank_one[columns])


class Recorded(TrainerCallback):
    """What the events were, and what a logger would have got."""

    def __init__(self):
        self.steps, self.logs = 0, []

    def on_step_end(self, args, state, control, **kwargs):
        self.steps += 1

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.logs.append({**logs, "step": state.global_step})


def test_numbers_are_in_the_log_history_and_where_attached_reach_every_logger(tmp_path):
    watched, seen = watch(4, measures=("prefix", "copying")), Recorded()
    made = trainer(tmp_path, [seen, watched], steps=8)
    made.train()
    rows = [row for row in made.state.log_history if "slash/heads" in row]
    assert [row["step"] for row in rows] == [0, 4, 8]
    row, last = rows[-1], watched.result.summary().iloc[-1]
    assert row["slash/highest_score"] == last["score"]
    assert row["slash/copying_loss"] == last["copying_loss"]
    name = f"L{row['slash/highest_layer']}H{row['slash/highest_head']}"
    assert (name, row["slash/highest_offset"]) == (last["head"], last["offset"])
    assert not any("slash/heads" in logs for logs in seen.logs)

    logger = Recorded()
    made = trainer(tmp_path, [logger], steps=8)
    watched = watch(4).attach(made)
    assert watched.attach(made) is watched
    assert made.callback_handler.callbacks.count(watched) == 1
    made.train()
    assert [logs["step"] for logs in logger.logs if "slash/heads" in logs] == [0, 4, 8]
    assert [logs["step"] for logs in logger.logs if "loss" in logs] == [2, 4, 6, 8]
    assert sum("slash/heads" in row for row in made.state.log_history) == 3


KILLED = """
    import os, signal, sys
    import torch
    torch.set_num_threads(1)
    from transformers import TrainerCallback
    import slashpatch as sp
    from tests.training import trainer

    folder, step = sys.argv[1], int(sys.argv[2])

    class Kill(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == step:
                os.kill(os.getpid(), signal.SIGKILL)

    watched = sp.SlashCallback(3, measures=("rank", "copying"), random_tokens=True, n_prompts=2,
                               max_tokens=40, offsets=range(4), live=False,
                               path=f"{folder}/run.parquet")
    callbacks = [watched, Kill()]
    trainer(folder, callbacks, steps=14, save_strategy="steps", save_steps=4).train()
"""


def test_a_killed_run_loses_nothing_and_continues_the_file(tmp_path):
    """Killed at step 11, after the measurement of step 9, whose rows the resumed run replaces."""
    done = run(KILLED, tmp_path, 11)
    assert done.returncode == -signal.SIGKILL, done.stderr
    path = tmp_path / "run.parquet"
    left = sp.Emergence.load(path)
    assert left.steps == (0, 3, 6, 9)
    options = {"measures": ("rank", "copying"), "path": path}
    (tmp_path / "whole").mkdir()
    whole = watch(3, **{**options, "path": tmp_path / "whole.parquet"})
    trainer(tmp_path / "whole", [whole], steps=14).train()
    expected = whole.result.frame
    upto = expected[expected["step"] <= 9].reset_index(drop=True)
    known = left.frame.drop(columns=["loss"])
    pd.testing.assert_frame_equal(known, upto.drop(columns="loss"))

    resumed = watch(3, **options)
    made = trainer(tmp_path, [resumed], steps=14, save_strategy="steps", save_steps=4)
    made.train(resume_from_checkpoint=str(tmp_path / "checkpoint-8"))
    assert resumed.result.steps == (0, 3, 6, 9, 12, 14)
    pd.testing.assert_frame_equal(resumed.result.frame, expected)
    pd.testing.assert_frame_equal(sp.Emergence.load(path).frame, expected)


def test_rows_after_the_checkpoint_are_replaced(tmp_path):
    path = tmp_path / "run.parquet"
    made = trainer(tmp_path, [watch(4, path=path)], steps=8, save_strategy="steps", save_steps=4)
    made.train()
    again = watch(4, path=path)
    made = trainer(tmp_path, [again], steps=12, learning_rate=1e-2)
    made.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    found = sp.Emergence.load(path)
    assert found.steps == (0, 4, 8, 12)
    pd.testing.assert_frame_equal(found.frame, again.result.frame)


def test_files_that_are_not_continued(tmp_path):
    path = tmp_path / "run.parquet"
    kept = {"save_strategy": "steps", "save_steps": 4}
    trainer(tmp_path, [watch(4, path=path)], steps=4, **kept).train()
    before = path.read_bytes()
    seen = Recorded()
    with pytest.raises(sp.SlashpatchError, match="holds a run already"):
        trainer(tmp_path, [seen, watch(4, path=path)], steps=4).train()
    other = watch(4, path=path, n_prompts=3)
    with pytest.raises(sp.SlashpatchError, match="its prompts is"):
        trainer(tmp_path, [seen, other], steps=8).train(
            resume_from_checkpoint=str(tmp_path / "checkpoint-4")
        )
    other = watch(4, path=path, measures=("rank",))
    with pytest.raises(sp.SlashpatchError, match="its measures is"):
        trainer(tmp_path, [seen, other], steps=8).train(
            resume_from_checkpoint=str(tmp_path / "checkpoint-4")
        )
    assert (seen.steps, path.read_bytes()) == (0, before)
    trainer(tmp_path, [watch(2, path=path, overwrite=True)], steps=4).train()
    assert sp.Emergence.load(path).steps == (0, 2, 4)
    foreign = tmp_path / "table.parquet"
    pd.DataFrame({"a": [1]}).to_parquet(foreign)
    with pytest.raises(sp.SlashpatchError, match="holds nothing of the format"):
        trainer(tmp_path, [watch(path=foreign, overwrite=True)], steps=2).train()
    assert pd.read_parquet(foreign)["a"].tolist() == [1]


def refused(tmp_path, model, message, **options):
    seen = Recorded()
    with pytest.raises(sp.SlashpatchError, match=message):
        trainer(tmp_path, [seen, watch(**options)], model, steps=4).train()
    assert seen.steps == 0


def test_models_are_refused_before_the_first_step(tmp_path):
    from transformers import GPT2Config, GPT2LMHeadModel

    gpt2 = GPT2Config(vocab_size=80, n_positions=64, n_embd=32, n_layer=2, n_head=4)
    refused(tmp_path, GPT2LMHeadModel(gpt2).train(), "layer 0 has no RoPE", measures=("bands",))
    grown = llama(sharpness=1.0).train()
    grown.extra = torch.nn.Linear(2, 2)
    refused(tmp_path, grown, "the model has extra.bias")
    hooked = llama(sharpness=1.0).train()
    hooked.model.layers[0].register_forward_hook(lambda module, args, output: 1.01 * output)
    refused(tmp_path, hooked, "computes other logits")
    spread = llama(sharpness=1.0).train()
    spread.model.norm.weight.ds_id = 3
    refused(tmp_path, spread, "spread over processes")
    wrapped = llama(sharpness=1.0)
    sp.load(wrapped)
    refused(tmp_path, wrapped, "pass the bridge itself")
    refused(tmp_path, None, "the model has no tokenizer", random_tokens=False)
    refused(tmp_path, None, "offset 50 needs a prompt", offsets=[50])


def test_a_module_that_is_no_transformers_model_is_not_copied(unchecked):
    with pytest.raises(sp.SlashpatchError, match="expected a Transformers model"):
        trained.bridge_of_copy(torch.nn.Linear(2, 2))


def test_arguments_that_are_refused(unchecked, tmp_path):
    for options, message in (
        ({"every": 0}, "every is a number of steps from 1"),
        ({"every": True}, "every is a number"),
        ({"measures": ("rank", "rnk")}, "unknown measure 'rnk'; expected one of slash, rank"),
        ({"kappa": 2}, "kappa must be a score"),
        ({"path": tmp_path / "a.csv"}, "saved as a .parquet file"),
        ({"path": tmp_path / "absent" / "a.parquet"}, "there is no directory"),
    ):
        with pytest.raises(sp.SlashpatchError, match=message):
            sp.SlashCallback(**options)
    with pytest.raises(sp.SlashpatchError, match="nothing was measured yet"):
        _ = sp.SlashCallback(live=False).result


class Spoil(TrainerCallback):
    """Weights that diverge at step 4."""

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        if state.global_step == 3:
            with torch.no_grad():
                model.model.layers[0].self_attn.q_proj.weight.fill_(float("nan"))


def test_what_cannot_be_measured_later_is_a_warning(tmp_path, caplog):
    watched = watch(2)
    made = trainer(tmp_path, [Spoil(), watched], steps=4, learning_rate=0.0)
    with caplog.at_level(logging.WARNING):
        made.train()
    assert made.state.global_step == 4
    assert watched.result.steps == (0, 2)
    assert caplog.text.count("could not measure") == 1
    assert "could not measure step 4" in caplog.text
    assert "holds NaN or infinite" in caplog.text


def test_whatever_fails_later_does_not_end_the_training(tmp_path, caplog, monkeypatch):
    """Also an error that nobody foresaw; the steps before and after it are measured."""
    from slashpatch.scanning import record

    watched = watch(2, path=tmp_path / "run.parquet")
    write = record.Record.add

    def fails(self, step, *arguments):
        if step == 2:
            raise KeyError("no\nsuch thing")
        write(self, step, *arguments)

    monkeypatch.setattr(record.Record, "add", fails)
    made = trainer(tmp_path, [watched], steps=6)
    with caplog.at_level(logging.WARNING):
        made.train()
    assert made.state.global_step == 6
    assert sp.Emergence.load(tmp_path / "run.parquet").steps == (0, 4, 6)
    assert [text for text in caplog.messages if "slashpatch" in text] == [
        "slashpatch could not measure step 2: KeyError: 'no\\nsuch thing'"
    ]


class Stop(TrainerCallback):
    def __init__(self, event):
        self.event = event

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop |= self.event == "step" and state.global_step == 5

    def on_evaluate(self, args, state, control, **kwargs):
        control.should_training_stop |= self.event == "evaluation" and state.global_step == 6


@pytest.mark.parametrize(("event", "last"), [("step", 5), ("evaluation", 6)])
def test_the_last_step_is_measured_where_training_stops_early(tmp_path, event, last):
    watched = watch(4)
    made = trainer(tmp_path, [watched, Stop(event)], steps=20, eval_strategy="steps", eval_steps=2)
    made.train()
    assert watched.result.steps == (0, 4, last)
    known = watched.result.frame.query("step == 4")["eval_loss"]
    assert known.notna().all()


def test_the_best_model_is_not_taken_for_the_last_step(tmp_path):
    """Where the best weights are loaded at the end, they are not those of the last step."""
    watched = watch(4)
    made = trainer(tmp_path, [watched, Stop("evaluation")], steps=20, eval_strategy="steps",
                   eval_steps=2, save_strategy="steps", save_steps=2,
                   load_best_model_at_end=True)  # fmt: skip
    made.train()
    prints = watched.result.frame.drop_duplicates("step").set_index("step")["fingerprint"]
    for step in prints.index[1:]:
        saved = tmp_path / f"checkpoint-{step}"
        if saved.exists():
            stored = sp.emergence(saved, device="cpu", **SMALL)
            assert stored.frame["fingerprint"].iloc[0] == prints[step]


def test_a_bridge_is_measured_in_place_with_its_patches(tmp_path):
    model = llama(sharpness=1.0).train()
    bridge = sp.load(model)
    watched = watch(4, bridge=bridge)
    head = sp.Head(0, 1)
    with sp.patch(bridge, sp.KnockOut(head, 1)):
        trainer(tmp_path, [watched], model, steps=4).train()
        assert model.training
    frame = watched.result.frame.set_index(["step", "name"])
    assert (frame["score_1"].loc[[(0, "L0H1"), (4, "L0H1")]] == 0).all()
    assert (frame["score_1"].loc[[(0, "L0H2"), (4, "L0H2")]] > 0).all()
    other = watch(4, bridge=sp.load(llama()))
    with pytest.raises(sp.SlashpatchError, match="another model than the trained one"):
        trainer(tmp_path, [other], llama(), steps=4).train()


def test_natural_text_is_made_by_the_trainers_tokenizer(tmp_path):
    """Also by one that was made in memory; and the tokenizer is left as it is."""
    from transformers import PreTrainedTokenizerFast

    in_memory = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer().backend_tokenizer, bos_token="<s>", unk_token="<unk>"
    )
    watched = sp.SlashCallback(4, n_prompts=2, max_tokens=40, offsets=range(4), live=False)
    made = trainer(tmp_path, [watched], steps=4)
    made.callback_handler.processing_class = in_memory
    made.train()
    prompts = watched.result.provenance["prompts"]
    assert prompts["source"] == "natural text, seed 0"
    assert in_memory.name_or_path == ""


def test_only_the_first_process_measures(tmp_path):
    watched = watch(2)
    made = trainer(tmp_path, [watched], steps=2)
    made.is_world_process_zero = lambda: False
    made.train()
    with pytest.raises(sp.SlashpatchError, match="nothing was measured"):
        _ = watched.result


def test_wrappers_are_taken_off():
    model = llama()
    assert trained.unwrapped(model) is model
    assert trained.unwrapped(torch.nn.DataParallel(model)) is model
    assert trained.unwrapped(torch.compile(model)) is model


def test_modes_come_back_module_by_module():
    model = llama().train()
    model.model.layers[0].eval()
    before = [module.training for module in model.modules()]
    with pytest.raises(KeyError), trained.evaluating(model):
        assert not any(module.training for module in model.modules())
        raise KeyError
    assert [module.training for module in model.modules()] == before
