import math

import pytest
import torch

import slashpatch as sp
from slashpatch.effects.metrics import by_name as metrics
from slashpatch.errors import MetricError, PromptError

from ..tiny import D_VOCAB, random_tokens


def some(batch=2, pos=9, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, pos, D_VOCAB, generator=generator), random_tokens(batch, pos, seed)


def copies(batch=2, n=5, first=True):
    once = random_tokens(batch, n)
    return torch.cat([torch.zeros(batch, int(first), dtype=torch.long), once, once], dim=1)


def test_losses_by_definition():
    logits, tokens = some()
    p = logits.double().softmax(-1)
    expected = torch.tensor(
        [[-math.log(p[b, i, tokens[b, i + 1]]) for i in range(8)] for b in range(2)]
    )
    torch.testing.assert_close(
        metrics.loss_by_position(logits, tokens), expected.double(), atol=1e-5, rtol=0
    )
    torch.testing.assert_close(
        metrics.next_token_loss(logits, tokens), expected.double().mean(1), atol=1e-5, rtol=0
    )


def test_comparisons_with_the_clean_model():
    logits, _ = some()
    other, _ = some(seed=1)
    assert torch.equal(metrics.kl_to_clean(logits, logits), torch.zeros(2).double())
    assert torch.equal(metrics.top1_agreement(logits, logits), torch.ones(2).double())
    p, q = (x.double().log_softmax(-1) for x in (other, logits))
    expected = (p.exp() * (p - q)).sum(-1).mean(-1)
    torch.testing.assert_close(metrics.kl_to_clean(logits, other), expected, atol=1e-5, rtol=0)
    rate = (logits.argmax(-1) == other.argmax(-1)).double().mean(1)
    assert torch.equal(metrics.top1_agreement(logits, other), rate)


@pytest.mark.parametrize("first", [True, False])
def test_copying_by_definition(first):
    tokens = copies(first=first)
    logits, _ = some(2, tokens.shape[1])
    p = logits.double().softmax(-1)
    start = tokens.shape[1] - 5
    wanted = [
        [-math.log(p[b, i, tokens[b, i + 1]]) for i in range(start, start + 4)] for b in range(2)
    ]
    expected = torch.tensor(wanted).double().mean(1)
    torch.testing.assert_close(metrics.copying_loss(logits, tokens), expected, atol=1e-5, rtol=0)
    # Logits of the last positions are enough.
    kept = metrics.kept_positions([metrics.copying_loss, metrics.copying_top1], tokens)
    assert kept == 5
    assert torch.equal(
        metrics.copying_loss(logits[:, -kept:], tokens), metrics.copying_loss(logits, tokens)
    )
    perfect = torch.nn.functional.one_hot(tokens.roll(-1, 1), D_VOCAB).float()
    assert torch.equal(metrics.copying_top1(perfect, tokens), torch.ones(2).double())
    assert torch.equal(metrics.copying_top1(-perfect, tokens), torch.zeros(2).double())


def test_copying_needs_copies():
    logits, tokens = some()
    for metric in (metrics.copying_loss, metrics.copying_top1):
        with pytest.raises(PromptError, match="same tokens twice over"):
            metric(logits, tokens)


def test_prefix_matching_by_definition():
    tokens = copies(2, 5)
    pattern = torch.rand(2, 3, 11, 11)
    for lag in (0, 1, 3):
        expected = (
            torch.stack([pattern[:, :, i, i - 5 + lag] for i in range(6, 11)], dim=-1)
            .double()
            .mean(-1)
        )
        found = metrics.PrefixMatching(lag=lag).read(pattern, tokens)
        torch.testing.assert_close(found, expected)
    with pytest.raises(PromptError, match="lags in copies of 5 tokens"):
        metrics.PrefixMatching(lag=5).read(pattern, tokens)


def test_slash_scores_are_those_of_a_scan(tiny):
    tokens = random_tokens(3, 12)
    found = sp.measure(tiny, "KnockOut(L0H1, 2)", sp.SlashScores(offset=2), tokens)
    rows = found.frame.set_index("of")
    with sp.patch(tiny, "KnockOut(L0H1, 2)"):
        edited = sp.scan(tiny, tokens, [2]).scores
    clean = sp.scan(tiny, tokens, [2]).scores
    for name in ("L0H0", "L0H1", "L1H3"):
        head = sp.Head.parse(name)
        assert rows.loc[name, "baseline"] == pytest.approx(float(clean[head.layer, head.head]))
        assert rows.loc[name, "edited"] == pytest.approx(float(edited[head.layer, head.head]))
    assert rows.loc["L0H1", "edited"] == 0
    some_heads = sp.measure(tiny, "KnockOut(L0H1, 2)", sp.SlashScores("L1H0, L1H2", 2), tokens)
    assert list(some_heads.frame["of"]) == ["L1H0", "L1H2"]
    with pytest.raises(PromptError, match="offset 12 needs prompts of at least 13 tokens"):
        sp.measure(tiny, "KnockOut(L0H1, 2)", sp.SlashScores(offset=12), tokens)


def test_logit_differences():
    logits, _ = some(3)
    index = torch.tensor([2, 0, 1])
    metric = sp.LogitDifference((4, 5, 6), 7, position=-2)
    expected = torch.stack(
        [logits[row, -2, 4 + prompt] - logits[row, -2, 7] for row, prompt in enumerate([2, 0, 1])]
    )
    torch.testing.assert_close(metric(logits, index, 3), expected.double())
    for wrong, said in (
        (sp.LogitDifference((4, 5), 7), "one answer for each of 3 prompts, or one for all; got 2"),
        (sp.LogitDifference(D_VOCAB, 7), "token ids from 0 to 79"),
        (sp.LogitDifference(-1, 7), "token ids from 0 to 79"),
        (sp.LogitDifference(1, 7, position=9), "position 9 is outside a prompt of 9 tokens"),
    ):
        with pytest.raises(MetricError, match=said):
            wrong(logits, index, 3)


@pytest.mark.usefixtures("unchecked")
def test_what_is_no_metric():
    with pytest.raises(MetricError, match="no metric 'lossy'; expected one of loss, kl"):
        metrics.as_metric("lossy")
    with pytest.raises(MetricError, match="unknown arguments patterns; expected some of"):
        metrics.as_metric(lambda logits, patterns: logits)
    for wrong in (3, None, sp.SlashScores):
        with pytest.raises(MetricError, match="a metric must be a name, a function"):
            metrics.as_metric(wrong)
    for wrong in (max, lambda **given: given, lambda: 0):
        with pytest.raises(MetricError, match="has no arguments; expected some of"):
            metrics.as_metric(wrong)
    for make, said in (
        (lambda: sp.SlashScores([]), "at least one head"),
        (lambda: sp.SlashScores(offset=-1), "offset must be an integer of at least 0"),
        (lambda: sp.SlashScores(offset=1.5), "offset must be an integer of at least 0"),
        (lambda: sp.PrefixMatching(lag=-1), "lag must be an integer of at least 0"),
        (lambda: sp.LogitDifference("a", 4), "right must be a token id"),
        (lambda: sp.LogitDifference(4, (5.7,)), "wrong must be a token id"),
        (lambda: sp.LogitDifference(4, 5, 0.5), "position must be an integer"),
    ):
        with pytest.raises(MetricError, match=said):
            make()
