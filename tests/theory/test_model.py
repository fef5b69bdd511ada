"""The shallow transformer and its tasks, against definitions written out in loops."""

import math

import pytest
import torch

from slashpatch.errors import OffsetError, TheoryError
from slashpatch.maths.spectrum import margin
from slashpatch.theory import Settings, ShallowTransformer
from slashpatch.theory.data import embed, sample, seeded

SMALL = {"vocabulary": 16, "length": 20, "segment": 6, "n_pairs": 4}


def examples(n=5, seed=0, **knobs):
    settings = Settings(**{**SMALL, **knobs})
    return settings, sample(settings, n, seeded(seed, "test"))


def test_embeddings_are_orthonormal_apart_from_the_common_direction():
    for cone in (0.0, 0.5, 2.0):
        settings = Settings(cone=cone, **SMALL)
        x = embed(settings, torch.arange(16)[None])[0]
        torch.testing.assert_close(x @ x.T, torch.eye(16) + cone**2)


@pytest.mark.parametrize("offset", [1, 3])
def test_copying_has_the_token_offset_positions_further_on_as_target(offset):
    settings, found = examples(50, offset=offset)
    tokens = found.x[..., :16].argmax(-1)
    gaps = set()
    for row in range(50):
        queries, answers = found.keys[row].nonzero().T
        assert len(queries) == 6 - offset
        for query, answer in zip(queries.tolist(), answers.tolist(), strict=True):
            assert answer < query
            assert tokens[row, answer] == found.targets[row, query]
            earlier = (tokens[row, :query] == tokens[row, query]).nonzero()[:, 0].tolist()
            assert earlier == [answer - offset]  # one earlier occurrence, so one answer
        gaps.add(int(queries[0] - answers[0]))
    assert len(gaps) > 3  # at a random distance
    assert int(tokens.max()) < settings.seen == 8


@pytest.mark.parametrize("offset", [1, 2])
def test_regression_has_the_label_as_target(offset):
    _, found = examples(20, task="regression", offset=offset, length=40)
    labels = found.x[..., 16]
    for row in range(20):
        queries, answers = found.keys[row].nonzero().T
        assert len(queries) == 6
        assert torch.equal(labels[row, answers], found.targets[row, queries])
        x = found.x[row, :, :16]
        assert torch.equal(x[queries], x[answers - offset])
        assert bool((x[answers] == 0).all())
        assert len(set(x[queries].argmax(-1).tolist())) == 6


@pytest.mark.parametrize("task", ["copying", "regression"])
def test_out_of_distribution_tokens_are_not_used_in_training(task):
    settings = Settings(**{**SMALL, "task": task, "length": 60})
    for outside in (False, True):
        found = sample(settings, 300, seeded(0, "test"), outside)
        tokens = found.x[..., :16].argmax(-1)[found.x[..., :16].sum(-1) > 0]
        assert bool(((tokens >= 8) == outside).all())
        counts = tokens.bincount(minlength=16).double()
        share = counts.max() / counts[counts > 0].min()
        assert (share > 1.5) == outside  # Zipf's law, and not uniform
        # Both halves start anywhere.
        asked = found.asked.nonzero()[:, 1]
        assert int(asked.max()) > 50
        distances = {int(q - a) for row in found.keys for q, a in row.nonzero()}
        assert len(distances) > 20


@pytest.mark.parametrize("task", ["copying", "regression"])
def test_forward_equals_a_loop_over_positions(task):
    """Attention, rotation and loss computed position by position."""
    settings, found = examples(2, task=task, frequencies=[0.7, 0.1, 2.0], length=24, seed=3)
    model = ShallowTransformer.initial(settings)
    model.w_q, model.w_k = 8 * model.w_q, 8 * model.w_k
    model.w_m = model.w_m + 0.3 * torch.randn(16, 16, generator=seeded(0, "noise"))
    given = model.forward(settings, found)
    losses = []
    for row in range(2):
        x = found.x[row].double()
        w_q, w_k, w_m = (weight.double() for weight in model.weights.values())
        copied = []
        for i in range(24):
            logits = []
            for j in range(i + 1):
                q, k = (
                    torch.view_as_complex((x[i] @ w_q).view(2, 3).T.contiguous()),
                    (torch.view_as_complex((x[j] @ w_k).view(2, 3).T.contiguous())),
                )
                rotation = torch.polar(torch.ones(3).double(), (i - j) * settings.thetas())
                logits.append((q * k.conj() * rotation).real.sum() / math.sqrt(6))
            weights = torch.stack(logits).softmax(0)
            torch.testing.assert_close(
                given.slash[row, i, : i + 1].double(), weights, atol=1e-5, rtol=0
            )
            copied.append(weights @ x[: i + 1, :16])
        for i in found.asked[row].nonzero()[:, 0].tolist():
            weights = torch.stack([x[i, :16] @ w_m @ copied[j] for j in range(i + 1)]).softmax(0)
            output = weights @ x[: i + 1]
            if task == "copying":
                logits = settings.output_scale * output[:16]
                losses.append(logits.logsumexp(0) - logits[int(found.targets[row, i])])
            else:
                losses.append((output[16] - found.targets[row, i].double()) ** 2)
    assert float(given.loss) == pytest.approx(float(torch.stack(losses).mean()), rel=1e-4)
    assert float(given.slash.triu(1).abs().max()) == 0


def test_frequencies():
    every = Settings(n_pairs=6).thetas()
    torch.testing.assert_close(every, 10_000.0 ** (-torch.arange(6).double() / 6))
    bands = [Settings(n_pairs=6, frequencies=band).thetas() for band in ("high", "medium", "low")]
    assert torch.equal(torch.cat(bands), every)
    assert torch.equal(
        Settings(frequencies=[0.5, 0.1]).thetas(), torch.tensor([0.5, 0.1], dtype=torch.float64)
    )
    assert Settings(frequencies=torch.tensor([0.5])).rotary().scale == 2**-0.5


@pytest.mark.usefixtures("unchecked")
def test_numbers_of_other_libraries():
    import numpy as np

    settings = Settings(
        offset=np.int64(1), cone=np.float32(0.5), seed=np.int64(3), frequencies=np.array([1.0, 0.5])
    )
    assert (settings.seed, settings.cone, settings.frequencies) == (3, 0.5, (1.0, 0.5))
    assert type(settings.seed) is int
    assert settings == Settings(cone=0.5, seed=3, frequencies=[1.0, 0.5])


def test_margin():
    profile = torch.tensor([1.0, 4.0, 2.5, -1.0])
    assert margin(profile, 1) == 1.5
    assert margin(profile, 2) == -1.5
    assert margin(profile[:1], 0) == math.inf
    for wrong in (-1, 4):
        with pytest.raises(OffsetError, match=f"a profile of 4 offsets has no index {wrong}"):
            margin(profile, wrong)


@pytest.mark.parametrize(
    ("knobs", "message"),
    [
        ({"offset": 16}, "offset 16 is beyond a segment of 16 tokens"),
        ({"length": 31}, "length 31 is too short for offset 1.*at least 32"),
        ({"task": "regression", "offset": 3}, "is too short for offset 3.*at least 128"),
        ({"frequencies": []}, "no θ is left"),
        ({"frequencies": [4.0]}, "from −π to π"),
        ({"frequencies": [float("nan")]}, "from −π to π"),
        ({"frequencies": "middle"}, "frequencies is one of all, high, medium, low"),
        ({"frequencies": "high", "n_pairs": 2}, "a third of the pairs"),
        ({"cone": -0.1}, "cone is a number from 0 to 2"),
        ({"frequencies": 0.5}, "frequencies are a band's name or a list"),
        ({"frequencies": ["a"]}, "frequencies are a band's name or a list"),
        ({"frequencies": torch.eye(2)}, "frequencies are a band's name or a list"),
        ({"frequencies": [True]}, "frequencies are a band's name or a list"),
        ({"seed": 1.5}, "seed is an integer from 0"),
        ({"seed": -1}, "seed is an integer from 0"),
        ({"length": 6_000_000}, "length is an integer from 4 to 4096"),
        ({"cone": float("nan")}, "cone is a number from 0 to 2"),
        ({"segment": 32, "length": 64}, "half of the vocabulary, 32 tokens"),
        ({"cone": 2.1}, "cone is a number from 0 to 2"),
        ({"segment": 49}, "half of the vocabulary, 32 tokens"),
        ({"task": "sorting"}, "task is one of copying, regression"),
        ({"optimizer": "sgd"}, "optimizer is one of gd, adam"),
        ({"learning_rate": -1.0}, "learning_rate is a number from 0"),
        ({"batch_size": 0}, "batch_size is an integer from 1"),
        ({"steps": -1}, "steps is an integer from 0"),
        ({"n_sequences": 0}, "n_sequences is an integer from 1"),
    ],
)
@pytest.mark.usefixtures("unchecked")
def test_settings_that_do_not_fit(knobs, message):
    with pytest.raises(TheoryError, match=message):
        Settings(**knobs)
