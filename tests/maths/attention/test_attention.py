"""Attention without its matrix, against attention by the matrix."""

import math
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from slashpatch.maths.attention import edited as module
from slashpatch.maths.attention import flash
from slashpatch.maths.attention.edited import EditedAttention as Attention
from slashpatch.maths.attention.mask import Mask
from slashpatch.maths.diagonals import DiagonalChange

SCALE = 0.3
change = st.one_of(
    st.builds(
        DiagonalChange,
        st.just("scores"),
        st.lists(st.integers(0, 6), min_size=1, max_size=3).map(tuple),
        st.sampled_from([-math.inf, math.log(5), -3.0, 0.0]),
        st.just(0.0),
    ),
    st.builds(
        DiagonalChange,
        st.just("scores"),
        st.lists(st.integers(0, 6), min_size=1, max_size=3).map(tuple),
        st.just(0.0),
        st.just(-math.inf),
    ),
    st.builds(
        DiagonalChange,
        st.just("pattern"),
        st.lists(st.integers(0, 6), min_size=1, max_size=3).map(tuple),
        st.sampled_from([0.0, 0.5, 3.0]),
        st.sampled_from([0.0, 1.0]),
    ),
)
changes = st.lists(
    st.tuples(st.lists(st.integers(0, 2), min_size=1, max_size=3, unique=True), change), max_size=3
)


def drawn(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def mask_of(n_queries, n_keys, window=None, padding=None):
    """A causal mask; the first of three prompts is padded by 3 on one side."""
    real = None
    if padding is not None:
        real = torch.ones(3, n_keys, dtype=torch.bool)
        real[0, :3] = padding != "left"
        real[0, -3:] = padding != "right"
    return Mask(
        allows=lambda p, q, k: (k <= q) & (k > q - (window or n_keys)),
        batch=3,
        n_queries=n_queries,
        n_keys=n_keys,
        first_key=0,
        causal=True,
        window=window,
        plain=window is None,
        real=real,
        device=torch.device("cpu"),
    )


def by_matrix(q, k, v, mask, softcap, sinks, made):
    """Return output and pattern computed by the matrix in float64, as TransformerLens does."""
    q, k, v = q.double(), k.double(), v.double()
    logits = SCALE * q @ k.mT
    if softcap is not None:
        logits = softcap * torch.tanh(logits)
    n_queries, n_keys = logits.shape[-2:]
    past = n_keys - n_queries
    rows, columns = torch.arange(n_queries)[:, None], torch.arange(n_keys)
    allowed = mask.allows(0, rows + past, columns)
    if mask.real is not None:
        allowed = allowed & mask.real[:, None, None]
    logits = logits.masked_fill(~allowed, -math.inf)
    for heads, one in made:
        if one.stage == "scores":
            logits[:, heads] = one.on_matrix(logits[:, heads], past)
    whole = logits
    if sinks is not None:
        column = sinks.double()[None, :, None, None].expand(len(q), -1, n_queries, 1)
        whole = torch.cat([logits, column], dim=-1)
    empty = (whole == -math.inf).all(-1, keepdim=True)
    pattern = whole.masked_fill(empty, 0).softmax(-1).masked_fill(empty, 0)[..., :n_keys]
    for heads, one in made:
        if one.stage == "pattern":
            pattern[:, heads] = one.on_matrix(pattern[:, heads], past)
    return pattern @ v, pattern


def diagonals_of(pattern, offsets):
    """[batch, head, query, offset] of a matrix, 0 where there is no key."""
    n_queries, n_keys = pattern.shape[-2:]
    found = torch.zeros(*pattern.shape[:3], len(offsets), dtype=pattern.dtype)
    for row in range(n_queries):
        for column, offset in enumerate(offsets):
            key = n_keys - n_queries + row - offset
            if key >= 0:
                found[:, :, row, column] = pattern[:, :, row, key]
    return found


@settings(max_examples=60)
@given(
    seed=st.integers(0, 99),
    size=st.tuples(st.sampled_from([1, 7, 40]), st.sampled_from([0, 5])),
    window=st.sampled_from([None, 4]),
    padding=st.sampled_from([None, "left", "right"]),
    softcap=st.sampled_from([None, 2.0]),
    with_sinks=st.booleans(),
    made=changes,
)
def test_equals_the_matrix(seed, size, window, padding, softcap, with_sinks, made):
    n_queries, n_keys = size[0], sum(size)
    if n_keys < 5 or (padding == "right" and size[0] < 4):
        padding = None
    q, k, v = (drawn(seed + i, 3, 3, n, 8) for i, n in enumerate((n_queries, n_keys, n_keys)))
    q = 3 * q
    sinks = drawn(seed + 3, 3) if with_sinks else None
    mask = mask_of(n_queries, n_keys, window, padding)
    ours = Attention(q, k, v, mask, SCALE, softcap, sinks)
    for heads, one in made:
        ours.change(heads, one)
    out, pattern = by_matrix(q, k, v, mask, softcap, sinks, made)
    rows = torch.ones(3, n_queries, dtype=torch.bool)
    if mask.real is not None:
        rows = mask.real[:, -n_queries:]
    real = rows[:, None, :, None]
    assert ours.output().isfinite().all()
    close = {"atol": 5e-5, "rtol": 1e-4}
    torch.testing.assert_close(ours.output() * real, (out * real).float(), **close)
    offsets = (0, 1, 2, 5)
    expected = diagonals_of(pattern, offsets) * real
    torch.testing.assert_close(ours.weights(offsets) * real, expected.float(), **close)
    every = range(n_keys)
    sums = (diagonals_of(pattern, every) * real).sum(-2)
    torch.testing.assert_close(ours.weight_sums(every, rows), sums, **close)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_MOST_OFFSETS", 0)  # by whole rows
        torch.testing.assert_close(ours.weight_sums(every, rows), sums, **close)


def test_rows_with_a_small_denominator_are_recomputed():
    """A head attends to one key alone: what knocking it out leaves is far below rounding."""
    k = torch.nn.functional.normalize(drawn(0, 1, 1, 20, 8), dim=-1)
    q = 400 * k.roll(1, dims=2)
    mask = mask_of(20, 20)
    q, k, v = (x.expand(3, 3, 20, 8).clone() for x in (q, k, drawn(1, 1, 1, 20, 8)))
    ours = Attention(q, k, v, mask, SCALE)
    gone = DiagonalChange("scores", (1,), -math.inf, 0.0)
    ours.change([0, 2], gone)
    out, pattern = by_matrix(q, k, v, mask, None, None, [([0, 2], gone)])
    assert float(Attention(q, k, v, mask, SCALE).weights((1,))[0, 0, 1:].min()) > 1 - 1e-6
    torch.testing.assert_close(ours.output(), out.float(), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(
        ours.weights((0, 1, 2)), diagonals_of(pattern, (0, 1, 2)).float(), atol=1e-4, rtol=1e-4
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_within_its_rounding(dtype):
    q, k, v = (drawn(i, 3, 3, 50, 16).to(dtype) for i in range(3))
    mask = mask_of(50, 50)
    gone = DiagonalChange("scores", (1,), -math.inf, 0.0)
    ours = Attention(q, k, v, mask, SCALE)
    ours.change([1], gone)
    out, pattern = by_matrix(q, k, v, mask, None, None, [([1], gone)])
    assert ours.output().dtype == dtype
    # The output is rounded once (eps/2), as is each weight before its value (eps/2 of their mean);
    # as much again for the kernel's running sums.
    limit = 2 * torch.finfo(dtype).eps * float(v.abs().max())
    assert float((ours.output().double() - out).abs().max()) < limit
    # Logits are of float32; the terms of the kernel's log-sum-exp are rounded, by eps/2 each.
    off = (ours.weights((0, 1)).double() - diagonals_of(pattern, (0, 1))).abs().max()
    assert float(off) < torch.finfo(dtype).eps / 2


@pytest.mark.parametrize("made", [[], [([1], DiagonalChange("scores", (1,), -math.inf, 0.0))]])
def test_gradients_equal_those_of_attention_by_the_matrix(made):
    tensors = [drawn(i, 3, 3, 12, 8).requires_grad_() for i in range(3)]
    mask = mask_of(12, 12)
    ours = Attention(*tensors, mask, SCALE)
    for heads, one in made:
        ours.change(heads, one)
    out, _ = by_matrix(*tensors, mask, None, None, made)
    upstream = drawn(9, 3, 3, 12, 8)
    expected = torch.autograd.grad((out * upstream).sum(), tensors)
    found = torch.autograd.grad((ours.output() * upstream).sum(), tensors)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other.float(), atol=1e-4, rtol=1e-4)
    assert not ours.weights((1,)).requires_grad


def test_per_head_keys():
    q, k, v = (drawn(i, 3, 3, 12, 8) for i in range(3))
    per_head = drawn(5, 3, 12, 1, 8)
    whole = k.clone()
    whole[:, 1] = per_head[:, :, 0]
    ours = Attention(q, k, v, mask_of(12, 12), SCALE)
    ours.set_keys([1], per_head)
    out, _ = by_matrix(q, whole, v, mask_of(12, 12), None, None, [])
    torch.testing.assert_close(ours.output(), out.float(), atol=1e-5, rtol=1e-5)
    assert not torch.equal(k, whole)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("d_head", [5, 8, 64])
def test_the_cpu_kernel_equals_plain_softmax(dtype, d_head):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert flash.kernel_works("cpu", dtype, d_head)


def broken(q, k, v, scale):
    out, lse = flash.plain_attention(q, k, v, 2 * scale)
    return out.to(q), lse.to(q)


def missing(q, k, v, scale):
    return torch.ops.aten._no_such_operator(q, k, v)


@pytest.mark.parametrize("kernel", [broken, missing])
def test_a_kernel_that_fails_is_not_used_and_warned_of_once(kernel, monkeypatch):
    monkeypatch.setitem(flash._KERNELS, "cpu", kernel)
    flash.kernel_works.cache_clear()
    q, k, v = (drawn(i, 3, 3, 12, 8) for i in range(3))
    mask = mask_of(12, 12)
    out, _ = by_matrix(q, k, v, mask, None, None, [])
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for _ in range(3):
                ours = Attention(q, k, v, mask, SCALE)
                torch.testing.assert_close(ours.output(), out.float(), atol=1e-5, rtol=1e-5)
                assert ours.computed_by == "blocks"
    finally:
        flash.kernel_works.cache_clear()
    assert len(caught) == 1
    assert "computes attention in blocks of rows" in str(caught[0].message)


def test_other_devices_have_no_kernel():
    assert not flash.kernel_works("mps", torch.float32, 64)
