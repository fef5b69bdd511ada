import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import slashpatch as sp
from slashpatch.data.prompts import PromptSet
from slashpatch.errors import OffsetError
from slashpatch.scanning.prompt_scores import prompt_scores

from ..tiny import random_tokens
from .test_scan import direct


@pytest.mark.parametrize("engine", ["bridge", "fused"])
@given(st.integers(0, 99), st.lists(st.integers(5, 20), min_size=1, max_size=5))
def test_scores_of_each_prompt_in_the_order_of_the_prompts(tiny, engine, seed, sizes):
    prompts = [random_tokens(1, n, seed + i)[0] for i, n in enumerate(sizes)]
    found = prompt_scores(tiny, PromptSet(tuple(prompts), "test"), (0, 1, 4), engine)
    torch.testing.assert_close(found, direct(tiny, prompts, [0, 1, 4]), atol=1e-5, rtol=0)
    scan = sp.scan(tiny, prompts, [0, 1, 4], engine)
    torch.testing.assert_close(found.mean(0), scan.scores, atol=1e-12, rtol=0)


def test_a_prompt_that_is_too_short_is_refused(tiny):
    prompts = PromptSet((random_tokens(1, 9)[0], random_tokens(1, 4)[0]), "test")
    with pytest.raises(OffsetError, match="at least 6 tokens each; the shortest has 4"):
        prompt_scores(tiny, prompts, (0, 5))
