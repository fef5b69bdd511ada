import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import slashpatch as sp
from slashpatch.bridge import info
from slashpatch.errors import OffsetError, PatchError, PromptError
from slashpatch.maths.slash_scores import slash_rows

from ..tiny import N_CTX, padded, random_tokens, tiny_model


def all_rows(model, tokens, offsets):
    """Attention i → i−Δ of every row, from a plain run: [layer, batch, head, query, offset]."""
    with torch.no_grad():
        _, cache = model.run_with_cache(tokens)
    return torch.stack(
        [slash_rows(cache["pattern", layer].double(), torch.tensor(offsets)) for layer in (0, 1)]
    )


@given(st.integers(0, 99), st.integers(1, 3), st.integers(2, 20))
def test_a_forward_pass_gives_the_scores_of_a_scan(tiny, seed, batch, pos):
    tokens = random_tokens(batch, pos, seed)
    with sp.SlashMonitor(tiny, [0, 1]) as monitor:
        tiny(tokens)
    scan = sp.scan(tiny, tokens, [0, 1], "bridge")
    torch.testing.assert_close(monitor.scores, scan.scores, atol=1e-6, rtol=0)
    assert monitor.n_rows.tolist() == [[batch * pos, batch * (pos - 1)]] * 2


def test_generation_counts_prefill_rows_and_one_row_per_step(tiny):
    prompt = random_tokens(2, 6)
    with sp.SlashMonitor(tiny, [0, 1, 3]) as monitor:
        out = tiny.generate(
            prompt, max_new_tokens=5, do_sample=False, stop_at_eos=False, verbose=False
        )
    seen = out[:, :-1]  # the last token is never read
    rows = all_rows(tiny, seen, [0, 1, 3])
    n = torch.tensor([seen.shape[1] - offset for offset in (0, 1, 3)]) * 2
    assert monitor.n_rows.tolist() == [n.tolist()] * 2
    torch.testing.assert_close(monitor.scores, rows.sum((1, 3)) / n, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(monitor.newest, rows[:, :, :, -1].mean(1), atol=1e-6, rtol=1e-5)


def test_outputs_stay_bit_for_bit(tiny):
    tokens = random_tokens(2, 12)
    before = tiny(tokens)
    text = tiny.generate(tokens, max_new_tokens=8, do_sample=False, verbose=False)
    with sp.SlashMonitor(tiny, kappa=0.0, on_detect=lambda *_: None):
        inside = tiny(tokens)
        again = tiny.generate(tokens, max_new_tokens=8, do_sample=False, verbose=False)
    assert torch.equal(inside, before)
    assert torch.equal(again, text)
    assert torch.equal(tiny(tokens), before)


def test_nothing_stays_attached():
    model = tiny_model(seed=4)
    with sp.SlashMonitor(model):
        model(random_tokens(1, 4))
        assert not any(point.fwd_hooks for point in model.hook_points())
    assert not any(point._forward_hooks for point in model.hook_points())
    assert not model.original_model._forward_pre_hooks
    assert not model.original_model._forward_hooks


def test_an_exception_in_the_pass_leaves_nothing(tiny):
    def fail(tensor, hook):
        raise ZeroDivisionError

    monitor = sp.SlashMonitor(tiny, [1])
    with pytest.raises(ZeroDivisionError), monitor:
        tiny.run_with_hooks(random_tokens(1, 6), fwd_hooks=[("blocks.1.attn.hook_q", fail)])
    assert not any(point._forward_hooks for point in tiny.hook_points())
    assert monitor.n_rows.tolist() == [[5], [0]]  # layer 1 never ran
    assert monitor.scores[1].isnan().all()


@pytest.mark.parametrize("monitor_first", [True, False])
def test_it_reads_the_pattern_after_edits_whatever_the_nesting(tiny, monitor_first):
    monitor, patch = sp.SlashMonitor(tiny, [1, 2]), sp.patch(tiny, "KeepOnly(L1H1, 2)")
    first, second = (monitor, patch) if monitor_first else (patch, monitor)
    with first, second:
        tiny(random_tokens(1, 12))
    assert monitor.scores[1, 1].tolist() == pytest.approx([0, 1])
    late, unnormalised = sp.SlashMonitor(tiny, [1]), "KnockOut(L0H1, 1, renormalize=False)"
    with late, sp.patch(tiny, unnormalised):
        tiny(random_tokens(1, 12))
    assert float(late.scores[0, 1, 0]) == 0


def test_monitors_nest(tiny):
    tokens = random_tokens(1, 9)
    with sp.SlashMonitor(tiny, [1]) as outer:
        tiny(tokens)
        with sp.SlashMonitor(tiny, [1]) as inner:
            tiny(tokens)
    assert (int(outer.n_rows[0]), int(inner.n_rows[0])) == (16, 8)
    with pytest.raises(PatchError, match="already running"), outer, outer:
        pass
    with outer:  # and a second time, on top of the first
        tiny(tokens)
    assert int(outer.n_rows[0]) == 24


@given(st.sampled_from(["left", "right"]), st.integers(0, 99))
def test_padding_is_left_out(tiny, side, seed):
    rows = [random_tokens(1, n, seed + n)[0] for n in (5, 11, 8)]
    tokens, mask = padded(rows, side)
    with sp.SlashMonitor(tiny, [0, 1, 6]) as batch:
        tiny(tokens, attention_mask=mask)
    with sp.SlashMonitor(tiny, [0, 1, 6]) as single:
        for row in rows:
            tiny(row[None])
    assert torch.equal(batch.n_rows, single.n_rows)
    torch.testing.assert_close(batch.scores, single.scores, atol=1e-6, rtol=1e-5)


def test_texts_padded_on_the_right_without_a_mask(tiny):
    texts = ["w1 w2 w3", "w4 w5 w6 w7 w8 w9"]
    with sp.SlashMonitor(tiny, [0, 1]) as batch:
        tiny(texts)
    with sp.SlashMonitor(tiny, [0, 1]) as single:
        for text in texts:
            tiny(text)
    assert torch.equal(batch.n_rows, single.n_rows)
    torch.testing.assert_close(batch.scores, single.scores, atol=1e-6, rtol=1e-5)


def test_generation_of_texts_of_different_lengths(tiny):
    texts = ["w1 w2 w3", "w4 w5 w6 w7 w8 w9"]
    with sp.SlashMonitor(tiny, [0, 1]) as monitor:
        tiny.generate(texts, max_new_tokens=4, do_sample=False, stop_at_eos=False, verbose=False)
    assert monitor.n_rows.tolist() == [[(4 + 3) + (7 + 3), (4 + 2) + (7 + 2)]] * 2


def test_a_mask_with_a_gap_is_refused(tiny):
    mask = torch.tensor([[1, 1, 0, 1, 1]])
    with pytest.raises(PromptError, match="gap inside a prompt"), sp.SlashMonitor(tiny):
        tiny(random_tokens(1, 5), attention_mask=mask)


def test_a_head_is_detected_once_when_it_is_sure(tiny):
    """Compared with a loop over rows: at least 16 rows, and three standard errors above κ."""
    found = []
    tokens = random_tokens(1, 40)
    rows = all_rows(tiny, tokens, [0, 1])[:, 0]
    with sp.patch(tiny, "KeepOnly(L1H1, 1)"):
        rows_edited = all_rows(tiny, tokens, [0, 1])[:, 0]
        with sp.SlashMonitor(tiny, [0, 1], 0.3, lambda *a: found.append(a)) as monitor:
            cache, fired = None, {}
            for step in range(40):
                _, cache = tiny(
                    tokens[:, step : step + 1],
                    return_type="logits_and_cache",
                    past_key_values=cache,
                    use_cache=True,
                )
                for detection in found[len(fired) :]:
                    fired[detection[0]] = (step, *detection[1:])
    assert rows.shape == rows_edited.shape
    assert [tuple(d) for d in monitor.detections] == found
    step, offset, score, n_rows = fired[sp.Head(1, 1)]
    assert (step, offset, n_rows) == (16, 1, 16)  # row 0 does not count for Δ=1
    assert score == pytest.approx(1)
    expected = {}
    for step in range(40):
        for layer in range(2):
            for head in range(4):
                for offset in (0, 1):
                    seen = rows_edited[layer, head, offset : step + 1, offset]
                    sure = len(seen) >= 16 and (
                        seen.mean() - 3 * seen.std() / len(seen) ** 0.5 >= 0.3
                    )
                    if sure:
                        expected.setdefault(sp.Head(layer, head), step)
    assert {head: step for head, (step, *_) in fired.items()} == expected
    assert len(found) == len(fired)


def test_an_exception_in_on_detect_ends_the_run(tiny):
    def stop(head, offset, score, n_rows):
        raise KeyboardInterrupt

    monitor = sp.SlashMonitor(tiny, [1], 0.5, stop)
    with pytest.raises(KeyboardInterrupt), sp.patch(tiny, "KeepOnly(L0H0, 1)"), monitor:
        tiny(random_tokens(1, 30))
    assert not any(point._forward_hooks for point in tiny.hook_points())


def test_slash_heads_now(tiny):
    with sp.SlashMonitor(tiny, [0, 1]) as monitor:
        tiny(random_tokens(1, 9))
    found = monitor.slash_heads(0.2)
    assert len(found) == int((monitor.scores >= 0.2).sum())
    assert found[0].score == float(monitor.scores.max())


def test_bad_offsets(tiny):
    with pytest.raises(OffsetError, match="no offsets"):
        sp.SlashMonitor(tiny, [])
    with pytest.raises(OffsetError, match=f"offset {N_CTX} does not fit"):
        sp.SlashMonitor(tiny, [N_CTX])


def test_our_own_passes_are_not_watched(tiny):
    """The passes of reference prompts and of a model's verification are not counted."""
    tokens = random_tokens(1, 12)
    with sp.SlashMonitor(tiny, [1]) as monitor:
        with sp.patch(tiny, sp.AblateHeads("L0H1", mode="mean", reference="random")):
            tiny(tokens)
        info._known.pop(tiny)
        sp.hooks(tiny, "KnockOut(L0H1, 1)")
    assert monitor.n_rows.tolist() == [[11], [11]]


def test_filler_after_eos_is_left_out(tiny):
    """Of two prompts the first ends at once, and then generates only EOS."""

    def force(logits, hook):
        logits = logits.clone()
        logits[0, :, 1] = 1e4  # EOS
        logits[1, :, 1] = -1e4
        return logits

    tokens = random_tokens(2, 6)
    with sp.SlashMonitor(tiny, [0]) as monitor, tiny.hooks([("unembed.hook_out", force)]):
        out = tiny.generate(tokens, max_new_tokens=5, do_sample=False, verbose=False)
    assert out[0, 6:].tolist() == [1] * 5
    assert monitor.n_rows.tolist() == [[(6 + 1) + (6 + 4)]] * 2


def test_passes_in_several_threads_are_counted_each_by_itself():
    from concurrent.futures import ThreadPoolExecutor

    model = tiny_model(seed=1)
    prompts = [random_tokens(1, 8 + seed, seed) for seed in range(6)]

    def gather(run):
        with sp.SlashMonitor(model, range(3)) as monitor:
            run(lambda tokens: [model.original_model(tokens) for _ in range(4)])
        return monitor

    with torch.no_grad(), ThreadPoolExecutor(3) as pool:
        alone = gather(lambda each: [each(tokens) for tokens in prompts])
        together = gather(lambda each: list(pool.map(each, prompts)))
    assert torch.equal(alone.n_rows, together.n_rows)
    torch.testing.assert_close(alone.scores, together.scores, atol=1e-12, rtol=0)
    assert not any(point.fwd_hooks for point in model.hook_points())
