import pytest
import torch

import slashpatch as sp
from slashpatch.errors import PromptError
from slashpatch.prompts import repeated_random_tokens

from ..tiny import tiny_model


def test_it_is_the_loss_on_the_second_copy(tiny):
    losses = sp.copying_losses(tiny, n_prompts=3, n_tokens=10, seed=5)
    tokens = repeated_random_tokens(tiny, 3, 10, seed=5)
    with torch.no_grad():
        logprobs = tiny(tokens).log_softmax(-1)
    expected = []
    for prompt in range(3):
        # Tokens 12 to 20 repeat tokens 2 to 10; each is predicted one position earlier.
        own = [-logprobs[prompt, at - 1, tokens[prompt, at]] for at in range(12, 21)]
        assert len(own) == 9
        expected.append(torch.stack(own).mean())
    torch.testing.assert_close(losses, torch.stack(expected), atol=1e-5, rtol=1e-5)


def test_it_sees_active_patches():
    model = tiny_model(seed=3)
    intact = sp.copying_losses(model, 2, 10)
    with sp.patch(model, "AblateHeads([L0H0, L1H1])"):
        edited = sp.copying_losses(model, 2, 10)
    assert not torch.equal(intact, edited)
    assert torch.equal(sp.copying_losses(model, 2, 10), intact)


@pytest.mark.parametrize("sizes", [(0, 10), (2, 1), (2, 0), (2, -1), (2, 32)])
def test_sizes_that_make_no_copy(tiny, sizes):
    with pytest.raises(PromptError, match="2 to 31 tokens"):
        sp.copying_losses(tiny, *sizes)


def test_copied_lags_by_hand(tiny):
    tokens = repeated_random_tokens(tiny, 2, 10, seed=3)
    with torch.no_grad():
        guesses = tiny(tokens).argmax(-1)
    expected = torch.zeros(2, 2)
    for prompt in range(2):
        for column, lag in enumerate((1, 4)):
            hits = [guesses[prompt, at] == tokens[prompt, at + lag] for at in range(11, 21 - lag)]
            expected[prompt, column] = sum(hits) / len(hits)
    found = sp.copied_lags(tiny, (1, 4), 2, 10, seed=3)
    torch.testing.assert_close(found, expected.double())


@pytest.mark.parametrize("lags", [(), (0,), (10,), (-1,)])
def test_lags_that_the_copy_cannot_hold(tiny, lags):
    with pytest.raises(PromptError, match="lags are integers from 1 to 9"):
        sp.copied_lags(tiny, lags, 2, 10)
