"""A scan in workers: the sums of one process, bit for bit."""

import torch

import slashpatch as sp

from ..tiny import random_tokens, tiny_model


def same(a, b):
    """Whether two tensors have the same bits; NaN for a layer without RoPE."""
    return torch.equal(a.nan_to_num(7.5), b.nan_to_num(7.5))


def test_a_scan_is_that_of_one_process(cluster):
    """Batches of several chunks of tokens, prompts of unequal lengths, and an edit."""
    model = tiny_model(seed=2, layers=3, n_ctx=400)
    lengths = (400, 33, 390, 40, 12, 12, 300, 400, 39)
    prompts = [row[:n] for row, n in zip(random_tokens(9, 400), lengths, strict=True)]
    with sp.patch(model, "KnockOut(L0H1, 1)"):
        alone = sp.scan(model, prompts, range(5), batch_size=3)
        shared = sp.scan(model, prompts, range(5), batch_size=3, workers=2)
    for name in ("sums", "squares", "counts"):
        assert torch.equal(getattr(shared, name), getattr(alone, name))
    found = shared.moments.tensors()
    assert all(same(tensor, found[name]) for name, tensor in alone.moments.tensors().items())
    assert shared.provenance == {**alone.provenance, "workers": 2, "threads": 1}
    both = shared + alone
    assert both.n_tokens == 2 * alone.n_tokens
