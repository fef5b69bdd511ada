"""Patches and threads: hooks are on the model, so they act in every thread that runs it."""

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

import slashpatch as sp
from slashpatch.errors import PatchError

from ..tiny import padded, random_tokens, tiny_model

EDITS = ("KnockOut(L0H1, 1)", "FreezeBand(L1H2, high)", "AblateHeads(L0H3, mode=resample)")


def in_another_thread(function):
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(function).result()


def test_a_second_thread_cannot_patch_while_a_patch_is_active():
    model = tiny_model(seed=1)

    def attach():
        with sp.patch(model, "KnockOut(L0H1, 1)"):
            return model(random_tokens(1, 9))

    with sp.patch(model, "AblateHeads(L1H0)"):
        with sp.patch(model, "AblateHeads(L1H1)"):  # nested in one thread
            model(random_tokens(1, 9))
        with pytest.raises(PatchError, match=r"another thread has a patch.*one model for each"):
            in_another_thread(attach)
        model(random_tokens(1, 9))
    with sp.patch(model, "KnockOut(L0H1, 1)"):
        here = model(random_tokens(1, 9))
    assert torch.equal(in_another_thread(attach), here)  # the first thread's patch is gone
    with sp.patch(model, "KnockOut(L0H1, 1)"):
        assert torch.equal(model(random_tokens(1, 9)), here)


def test_a_patch_that_cannot_be_attached_does_not_keep_others_out():
    model = tiny_model(seed=1)
    with pytest.raises(sp.SlashpatchError, match="L9H9 does not exist"):
        with sp.patch(model, "AblateHeads(L9H9)"):
            pass

    def attach():
        with sp.patch(model, "AblateHeads(L1H0)"):
            model(random_tokens(1, 9))

    in_another_thread(attach)


def test_each_of_two_threads_patches_a_model_of_its_own():
    models = [tiny_model(seed=1), tiny_model(seed=1)]
    tokens = random_tokens(2, 11)
    barrier = threading.Barrier(2, timeout=60)

    def run(place):
        with sp.patch(models[place], EDITS[place]):
            barrier.wait()
            found = models[place](tokens)
            barrier.wait()
        return found

    with ThreadPoolExecutor(2) as pool:
        together = list(pool.map(run, range(2)))
    for model, edit, found in zip(models, EDITS, together, strict=False):
        with sp.patch(model, edit):
            assert torch.equal(model(tokens), found)


def test_threads_that_run_under_one_patch_do_not_mix_their_passes():
    """Prompts of other lengths and padding in each thread, all under the patch of the first."""
    model = tiny_model(seed=1).original_model
    bridge = tiny_model(seed=1)
    inputs = []
    for seed in range(6):
        rows = [random_tokens(1, 5 + seed, seed)[0], random_tokens(1, 9 + 2 * seed, seed)[0]]
        tokens, mask = padded(rows, "left" if seed % 2 else "right")
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        inputs.append({"input_ids": tokens, "attention_mask": mask, "position_ids": positions})

    def run(kwargs):
        with torch.no_grad():
            return [bridge.original_model(**kwargs).logits for _ in range(4)]

    with sp.patch(bridge, *EDITS):
        alone = [run(kwargs) for kwargs in inputs]
        with ThreadPoolExecutor(3) as pool:
            together = list(pool.map(run, inputs))
    for one, other, kwargs in zip(alone, together, inputs, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
        with torch.no_grad():
            assert not torch.equal(one[0], model(**kwargs).logits)
