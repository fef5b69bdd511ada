"""Effects beyond a control's draws: intervals over prompts and draws, and ranks among draws."""

import math

import pytest
import torch

from slashpatch.maths import crossed, resampling
from slashpatch.maths.crossed import beyond_draws
from slashpatch.maths.resampling import LEAST, mean_inference


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=seeded(seed), dtype=torch.float64)


def effects_of(n_draws, n_prompts, cells, seed, of_draws=1.0):
    """Effects of an edit and of draws whose mean effects are the same: both kinds of chance."""
    shared = normal(n_prompts, cells, seed=seed)
    edit = shared + normal(n_prompts, cells, seed=seed + 1)
    draws = shared / 2 + normal(n_draws, n_prompts, cells, seed=seed + 2)
    return edit, draws + of_draws * normal(n_draws, 1, cells, seed=seed + 3)


def slow(edit, draws, seed, confidence):
    """The interval of one column by a loop over resamples, as the text defines it."""
    from scipy.stats import t as student

    (d, p), estimate = draws.shape, edit.mean() - draws.mean()
    generator, b, h = seeded(seed), crossed.RESAMPLES, resampling.NOISE
    drawn = []
    for n in (p, d):
        drawn.append(torch.randint(0, n, (b, n), generator=generator))
        drawn.append(h * torch.randn(b, n, generator=generator, dtype=torch.float64))
    s_p, s_d = (edit - draws.mean(0)).std(), draws.mean(1).std()

    def moments(edit, draws, of_prompts, of_draws):
        by_prompt = edit - draws.mean(0) + s_p * of_prompts
        by_draw = draws.mean(1) + s_d * of_draws
        mean = by_prompt.mean() - s_d * of_draws.mean()
        return mean, by_prompt.var() / p, by_draw.var() / d

    ts = []
    for i, e, j, f in zip(*drawn, strict=True):
        mean, of_p, of_d = moments(edit[i], draws[j][:, i], e, f)
        ts.append((mean - estimate) / (of_p + of_d).sqrt())
    ts = torch.stack(ts).sort().values
    _, of_p, of_d = moments(edit, draws, torch.zeros(p), torch.zeros(d))
    df = float((of_p + of_d) ** 2 / (of_p**2 / (p - 1) + of_d**2 / (d - 1)))
    tail = (1 - confidence) / 2
    k = max(1, math.floor(tail * (df + 1) / (df + 1 + resampling.FEW) * (b + 1)))
    limit, se = float(student.ppf(1 - tail, df)), float((of_p + of_d).sqrt())
    low = float(estimate) - max(float(ts[-k]), limit) * se
    return low, float(estimate) - min(float(ts[k - 1]), -limit) * se


@pytest.mark.parametrize(("d", "p"), [(6, 8), (9, 6)])
def test_all_columns_at_once_are_what_the_definition_says_of_each(d, p, monkeypatch):
    monkeypatch.setattr(crossed, "RESAMPLES", 499)
    edit, draws = effects_of(d, p, 4, seed=p)
    found = beyond_draws(edit.exp().view(p, 2, 2), draws.view(d, p, 2, 2), 3, 0.9)
    for at in range(4):
        by_hand = slow(edit.exp()[:, at], draws[:, :, at], 3, 0.9)
        low, high = found.low.flatten()[at], found.high.flatten()[at]
        assert (float(low), float(high)) == pytest.approx(by_hand)


@pytest.mark.parametrize(("d", "p"), [(8, 16), (19, 8)])
@pytest.mark.parametrize("of_draws", [0.0, 3.0])
def test_intervals_cover_over_prompts_and_draws(d, p, of_draws, monkeypatch):
    monkeypatch.setattr(crossed, "RESAMPLES", 1_999)
    edit, draws = effects_of(d, p, 600, 40, of_draws)
    found = beyond_draws(edit, draws, seed=1)
    assert float(((found.low <= 0) & (found.high >= 0)).double().mean()) >= 0.93
    if of_draws:  # an interval over prompts alone takes these draws for all there are
        low, high, _ = mean_inference(edit - draws.mean(0), seed=1)
        assert float(((low <= 0) & (high >= 0)).double().mean()) < 0.92


def test_rank_among_draws():
    edit = torch.full((8, 3), 2.0)
    draws = torch.zeros(19, 8, 3)
    draws[0, :, 1], draws[1, :, 1] = -2.0, 1.9  # as large, with the other sign; smaller
    draws[:, :, 2] = 5.0
    found = beyond_draws(edit, draws)
    assert found.p_rank.tolist() == pytest.approx([1 / 20, 2 / 20, 1])
    assert found.estimate[0] == found.low[0] == found.high[0] == 2
    assert found.low[1] < found.estimate[1] < found.high[1]


def test_few_prompts_or_draws_have_no_interval():
    for d, p in ((LEAST - 1, 9), (9, LEAST - 1), (1, 1)):
        edit, draws = effects_of(d, p, 2, seed=0)
        found = beyond_draws(edit, draws)
        assert found.low.isnan().all()
        assert found.high.isnan().all()
        assert not found.p_rank.isnan().any()
    one = beyond_draws(torch.ones(8), torch.zeros(8, 8))
    assert one.estimate.shape == one.low.shape == one.p_rank.shape == ()
