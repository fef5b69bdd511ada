import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import slashpatch as sp
from slashpatch.data.files import load_tensors, save_tensors
from slashpatch.errors import ScanError
from slashpatch.maths.lines import all_slash_sums, contrasts_and_ranks, sum_of_ranks_p
from slashpatch.scanning.lines import LineSums

from ..maths.test_lines import by_hand, contrasts_by_hand
from ..planted import planted_model
from ..tiny import bridge, llama, random_tokens, tiny_model


def sums_of(scores, lengths=None):
    """LineSums whose line scores are `scores` [prompt, layer, head, offset]."""
    n = scores.shape[-1] + 1
    sums = torch.nn.functional.pad(scores * torch.arange(n - 1, 0, -1), (0, 1)).double()
    return LineSums.of_prompts(sums, torch.zeros_like(sums), lengths or [n] * len(scores))


@pytest.mark.parametrize("engine", ["bridge", "fused"])
@given(st.integers(0, 99), st.lists(st.integers(15, 45), min_size=1, max_size=4))
def test_sums_are_those_of_the_whole_pattern(tiny, engine, seed, sizes):
    prompts = [random_tokens(1, n, seed + i)[0] for i, n in enumerate(sizes)]
    found = sp.scan(tiny, prompts, [1], engine, lines=True, moments=False).line_sums
    n = max(max(sizes) - 19, 0)
    assert found.scores.shape == (2, 4, n)
    assert found.counts.tolist() == [sum(size - 19 > at for size in sizes) for at in range(n)]
    expected = torch.zeros(3, 2, 4, n, dtype=torch.float64)
    for prompt in prompts:
        _, cache = tiny.run_with_cache(prompt[None])
        for layer in range(2):
            for head in range(4):
                scores = by_hand(cache["pattern", layer][0, head])
                for at, (before, after, _) in enumerate(contrasts_by_hand(scores)):
                    row = torch.tensor([scores[at], before, after], dtype=torch.float64)
                    expected[:, layer, head, at] += row
    got = torch.stack([found.scores, found.before, found.after])
    torch.testing.assert_close(got, expected, atol=1e-5 * len(sizes), rtol=0)


def test_slash_scores_do_not_depend_on_whether_lines_are_gathered(tiny):
    prompts = [random_tokens(1, n, n)[0] for n in (30, 12, 22)]
    with_lines = sp.scan(tiny, prompts, [0, 3, 25], lines=True)
    without = sp.scan(tiny, prompts, [0, 3, 25])
    torch.testing.assert_close(with_lines.scores, without.scores, atol=1e-6, rtol=0)
    assert without.line_sums is None


@given(st.integers(0, 99), st.integers(1, 4), st.integers(1, 4))
def test_line_sums_add(tiny, seed, n, m):
    prompts = [random_tokens(1, 22 + 5 * i, seed + i)[0] for i in range(n + m)]
    parts = [sp.scan(tiny, p, [1], lines=True) for p in (prompts[:n], prompts[n:])]
    added, whole = parts[1] + parts[0], sp.scan(tiny, prompts, [1], lines=True)
    for name, tensor in whole.line_sums.tensors().items():
        torch.testing.assert_close(
            added.line_sums.tensors()[name], tensor, atol=1e-5 * (n + m), rtol=0
        )
    assert (parts[0] + sp.scan(tiny, prompts[n:], [1])).line_sums is None


def test_other_windows_do_not_add(tiny):
    one = sums_of(torch.rand(1, 1, 1, 30))
    other = LineSums(*one.tensors().values(), window=4)
    with pytest.raises(ScanError, match="16 without 2, and 4 without 2"):
        one + other


def test_intervals_are_student_t_on_the_nearer_side_and_q_is_of_the_ranks():
    from scipy.stats import t as student

    generator = torch.Generator().manual_seed(0)
    scores = 0.01 * torch.rand(6, 1, 2, 60, generator=generator, dtype=torch.float64)
    scores[:, 0, 1, 30] += 0.01
    found = sums_of(scores).statistics(0.9)
    before, after, ranks = contrasts_and_ranks(scores)
    n = before.shape[-1]
    for head in range(2):
        for at in range(1, n):
            sides = [x[:, 0, head, at] for x in (before, after)]
            nearer = min(sides, key=lambda x: float(x.mean()))
            half = student.ppf(0.95, 5) * float(nearer.std()) / math.sqrt(6)
            assert float(found["contrast"][0, head, at]) == pytest.approx(float(nearer.mean()))
            low, high = (float(found[end][0, head, at]) for end in ("low", "high"))
            assert low == pytest.approx(float(nearer.mean()) - half)
            assert high == pytest.approx(float(nearer.mean()) + half)
    p = sum_of_ranks_p(ranks.sum(0), torch.tensor(6.0, dtype=torch.float64))
    # Benjamini-Hochberg by its definition.
    known = p[..., 1:].flatten().sort().values
    m = len(known)
    adjusted = (known * m / torch.arange(1, m + 1)).flip(0).cummin(0).values.flip(0).clamp(max=1)
    got = found["q"][..., 1:].flatten().sort().values
    torch.testing.assert_close(got, adjusted, rtol=1e-6, atol=0)
    assert bool(found["q"][..., 0].isnan().all())
    assert int(found["q"][0, 1].nan_to_num(1).argmin()) == 30


@given(st.integers(0, 999), st.sampled_from([4, 5, 8]), st.floats(0, 1.5))
def test_noise_without_lines_has_none(seed, n, spread):
    """Skewed, heavy-tailed scores over a decay: the share of small q keeps its level."""
    generator = torch.Generator().manual_seed(seed)
    noise = (spread * torch.randn(n, 1, 4, 400, generator=generator, dtype=torch.float64)).exp()
    decay = 1 / (torch.arange(400) + 2.0)
    found = sums_of(noise * decay).find(0.001, 0.0, 0.0, 1, 0.95)
    assert len(found) == 0


@given(st.integers(0, 99), st.sampled_from([20, 77, 150, 300, 350]))
def test_faint_lines_are_found_over_noise(seed, offset):
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(8, 1, 4, 400, generator=generator, dtype=torch.float64).exp()
    scores = noise * 0.002 / (torch.arange(400) + 2.0).sqrt()
    scores[:, 0, 2, offset] += 0.005 * (0.3 * torch.randn(8, generator=generator)).exp()
    found = sums_of(scores).find(0.05, 0.001, 1.5, 1, 0.95)
    best, *others = [(line.head.head, line.offset) for line in found]
    assert best == (2, offset)
    assert len(others) <= 1  # by chance one of the other 1,599 is a line too, in few draws


def test_planted_slashes_of_a_model_are_found_and_nothing_else():
    offsets = [60, 250, 411, None]
    model = planted_model(offsets, d_head=128, n_ctx=512)
    prompts = random_tokens(5, 512)
    scan = sp.scan(model, prompts, lines=True, moments=False)
    found = [(str(line.head), line.offset) for line in scan.lines(least=0.05)]
    assert sorted(found) == [("L0H0", 60), ("L0H1", 250), ("L0H2", 411)]
    assert [str(x.head) for x in scan.lines(min_offset=400) if x.offset == 411] == ["L0H2"]
    frame = scan.lines_to_dataframe(least=0.05)
    assert set(zip(frame["name"], frame["offset"], strict=True)) == set(found)
    best = scan.lines()[0]
    assert best.interval[0] < best.contrast < best.interval[1]
    assert best.contrast < best.score <= 1


@pytest.mark.parametrize("sharpness", [0.1, 1.0, 4.0])
def test_heads_of_random_weights_have_no_lines(sharpness):
    """RoPE itself makes faint ripples in a few heads; of these, at most the level's share."""
    with_lines = 0
    for seed in range(3):
        made = llama(seed=seed, heads=8, kv_heads=8, sharpness=sharpness, n_ctx=512)
        scan = sp.scan(bridge(made), random_tokens(8, 300, seed), lines=True, moments=False)
        with_lines += len({line.head for line in scan.lines()})
    assert with_lines <= 0.05 * 3 * 16


def test_a_shift_moves_the_line():
    model = planted_model([100, None], d_head=128)
    with sp.patch(model, sp.ShiftSlash("L0H0", 17)):
        scan = sp.scan(model, random_tokens(4, 200), lines=True, moments=False)
    assert [(str(x.head), x.offset) for x in scan.lines(least=0.05)] == [("L0H0", 117)]


def test_attention_to_the_first_token_is_no_line():
    pattern = torch.zeros(4, 1, 1, 64, 64)
    pattern[..., 0] = 1
    pattern[:, :, :, 40, 0] = 0
    pattern[:, :, :, 40, 1] = 1
    sums, first = all_slash_sums(pattern[:, 0], torch.ones(4, 64, dtype=torch.bool))
    found = LineSums.of_prompts(sums[:, None], first[:, None], [64] * 4)
    assert float(found.scores[0, 0, :39].max()) == 0


def test_files(tiny, tmp_path):
    prompts = [random_tokens(1, n, n)[0] for n in (30, 24, 22, 40)]
    scan = sp.scan(tiny, prompts, lines=True, moments=False)
    scan.save(tmp_path / "a.safetensors")
    loaded = sp.Scan.load(tmp_path / "a.safetensors")
    assert loaded.lines(ratio=0.0, least=0.0) == scan.lines(ratio=0.0, least=0.0)
    for name, tensor in scan.line_sums.tensors().items():
        assert torch.equal(loaded.line_sums.tensors()[name], tensor)

    def rewritten(change):
        def build(header, tensors):
            change(header, tensors)
            return header, tensors

        load = ("slashpatch-scan-4",)
        header, tensors = load_tensors(tmp_path / "a.safetensors", load, build, ScanError)
        save_tensors(tmp_path / "b.safetensors", header, tensors)
        return sp.Scan.load(tmp_path / "b.safetensors")

    def of_the_third_format(header, tensors):
        header["format"] = "slashpatch-scan-3"
        del header["lines"]
        for name in [name for name in tensors if name.startswith("lines.")]:
            del tensors[name]

    old = rewritten(of_the_third_format)
    assert torch.equal(old.scores, scan.scores)
    with pytest.raises(ScanError, match="scan with lines=True"):
        old.lines()
    damages = [
        lambda h, t: t.pop("lines.after"),
        lambda h, t: h.pop("lines"),
        lambda h, t: h["lines"].pop("gap"),
        lambda h, t: h["lines"].update(window=0),
        lambda h, t: t.update({"lines.before": t["lines.before"][..., :-1].contiguous()}),
        lambda h, t: t.update({"lines.scores": t["lines.scores"].float()}),
        lambda h, t: t.update({"lines.scores": t["lines.scores"] * math.nan}),
        lambda h, t: t.update({"lines.counts": t["lines.counts"] - 4}),
    ]
    for damage in damages:
        with pytest.raises(ScanError):
            rewritten(damage)


@pytest.mark.parametrize(
    ("lengths", "options", "message"),
    [
        ([40] * 3, {}, "at least 4 prompts.*this scan has 3"),
        ([19] * 5, {}, "too short for lines: they need more than 19 tokens"),
        ([40] * 5, {"level": 2}, "level must be a number from 0 to below 1; got 2"),
        ([40] * 5, {"ratio": -1}, "ratio must be a number from 0; got -1"),
    ],
)
def test_scans_that_tell_of_no_lines(unchecked, lengths, options, message):
    model = tiny_model(seed=0)
    prompts = [random_tokens(1, n, i)[0] for i, n in enumerate(lengths)]
    scan = sp.scan(model, prompts, [0], lines=True, moments=False)
    with pytest.raises(ScanError, match=message):
        scan.lines(**options)
