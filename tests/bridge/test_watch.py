"""The current forward pass, and those that follow it."""

import copy

import pytest
import torch
from transformers import DynamicCache

import slashpatch as sp
from slashpatch.bridge.watch import watch
from slashpatch.errors import PatchError

from ..tiny import random_tokens, tiny_model

KEYS = "FreezeBand(L0H1, high)"


class Follower:
    def __init__(self, fails=""):
        self.seen, self.fails = [], fails

    def on_pass_start(self, call):
        self.seen.append("start")
        if self.fails == "start":
            raise ValueError("start")

    def on_pass_end(self, call, output):
        self.seen.append("end")
        if self.fails == "end":
            raise ValueError("end")


@pytest.mark.parametrize("fails", ["start", "end"])
def test_each_follower_that_saw_the_start_sees_the_end(fails):
    model = tiny_model(seed=1)
    followers = [Follower(), Follower(fails), Follower()]
    for follower in followers:
        watch(model).follow(follower)
    with pytest.raises(ValueError, match=fails):
        model(random_tokens(1, 5))
    pair = ["start", "end"]
    assert [follower.seen for follower in followers] == [
        pair,
        pair,
        pair if fails == "end" else [],  # the pass never began for the last
    ]
    assert watch(model).current is None
    for follower in followers:
        watch(model).unfollow(follower)
    assert not model.original_model._forward_pre_hooks


def test_a_callback_that_fails_leaves_other_monitors_whole():
    model = tiny_model(seed=1)

    def fails(*args):
        raise ValueError("callback")

    with (
        sp.SlashMonitor(model, range(3), 0.0, fails),
        sp.SlashMonitor(model, range(3), 0.0) as other,
    ):
        with pytest.raises(ValueError, match="callback"):
            model(random_tokens(1, 20))
        assert other.detections
        assert not any(point.fwd_hooks for point in model.hook_points())


def test_a_pass_inside_a_hook_is_a_pass_of_its_own():
    model = tiny_model(seed=1)
    tokens = random_tokens(1, 20)
    clean = model(tokens)

    def run_again(x, hook):
        if not inside:
            inside.append(1)
            model(tokens[:, :5])

    for edits in ((), ("KnockOut(L1H1, 1)",), (KEYS, "KnockOut(L1H1, 1)")):
        inside = []
        with sp.patch(model, *edits), sp.SlashMonitor(model, range(3)) as monitor:
            expected = model(tokens)
            with model.hooks(fwd_hooks=[("blocks.0.hook_out", run_again)]):
                found = model(tokens)
        assert torch.equal(found, expected)
        assert inside
        assert monitor.n_rows.tolist() == [[45, 42, 39], [45, 42, 39]]  # 20, 20 and 5 tokens
        assert torch.equal(expected, clean) == (not edits)


def test_nothing_is_kept_of_a_pass_that_ctrl_c_ended():
    model = tiny_model(seed=1)
    cache = DynamicCache()

    def interrupt(x, hook):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), sp.patch(model, KEYS), sp.SlashMonitor(model):
        model.hook_dict["blocks.1.hook_out"].add_hook(interrupt)
        model.original_model(random_tokens(1, 5), past_key_values=cache, use_cache=True)
    model.reset_hooks()
    assert watch(model).current is None
    assert not any(point.fwd_hooks for point in model.hook_points())
    with sp.patch(model, KEYS):
        model(random_tokens(1, 5))


def test_a_copy_of_a_patched_model_says_how_to_go_on():
    model = tiny_model(seed=1)
    tokens = random_tokens(1, 9)
    clean = model(tokens)
    with sp.patch(model, "KnockOut(L0H1, 1)"):
        model(tokens)
        copied = copy.deepcopy(model)
    with pytest.raises(PatchError, match=r"copy .* call\s+reset_hooks\(including_permanent=True\)"):
        copied(tokens)
    copied.reset_hooks(including_permanent=True)
    assert torch.equal(copied(tokens), clean)
    with sp.patch(copied, "KnockOut(L0H1, 1)"):
        assert not torch.equal(copied(tokens), clean)
