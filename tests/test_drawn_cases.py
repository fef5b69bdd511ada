"""Cases drawn over families, edits and ways to run them, against a reference of whole matrices.

`python -m tests.drawn_cases --cases 10000` runs as many as one likes.
"""

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from .drawn_cases import (
    BASIS_RANK,
    N_HEADS,
    N_LAYERS,
    NAMES,
    allowed,
    basis_of,
    case_number,
    family_of,
    largest,
    outcome_of,
    package_model,
    reference_model,
    simplest,
)
from .tiny import random_tokens
from .zoo import build

pytestmark = pytest.mark.filterwarnings("ignore:run_with_hooks. skipped")
#: Cases of the series 0, by number: `python -m tests.drawn_cases --only NUMBER` runs one again.
numbers = st.integers(0, 999_999)
#: A wrong case is simplified by `simplest`: smaller numbers are no simpler cases.
phases = [Phase.explicit, Phase.reuse, Phase.generate]


def check(number):
    """Fail where the package and the reference differ by more than rounding."""
    case = case_number(0, number)
    _, problem = outcome_of(case)
    if problem:
        least = simplest(case)
        pytest.fail(
            f"case {number}: {problem}\nin {case}\n"
            f"at its simplest: {outcome_of(least)[1]}\nin {least}"
        )


@given(numbers)
@settings(max_examples=200, phases=phases)
def test_drawn_cases(number):
    check(number)


@pytest.mark.exhaustive
@given(numbers)
@settings(max_examples=1000, phases=phases)
def test_many_drawn_cases(number):
    check(number)


@pytest.mark.parametrize("name", NAMES)
def test_without_edits_the_reference_is_the_model(name):
    """Transformers' own attention, float32, and the bridge's, against the reference's."""
    tokens = random_tokens(1, 20)
    own = build(family_of(name))
    own.config._attn_implementation = "eager"
    exact, single = (
        reference_model(name, dtype).run(tokens[0]) for dtype in (torch.float64, torch.float32)
    )
    limit = allowed(largest(single - exact), largest(exact))
    with torch.no_grad():
        assert largest(own(tokens).logits[0] - exact) <= limit
        assert largest(package_model(name)(tokens)[0] - exact) <= limit


@pytest.mark.parametrize("name", NAMES)
def test_a_fitted_basis_is_that_of_all_tokens(name):
    """Drawn cases take the package's basis; here it is fitted again, by an SVD."""
    rows = []
    for tokens in random_tokens(2, 12):
        reference_model(name).run(tokens)
        rows.append(dict(reference_model(name).vectors))
    basis = basis_of(name)
    for number, (layer, head) in enumerate(
        (layer, head) for layer in range(N_LAYERS) for head in range(N_HEADS)
    ):
        for part, found in enumerate((basis.q, basis.k)):
            x = torch.cat([vectors[layer][part] for vectors in rows])
            x = x[:, head * x.shape[1] // N_HEADS]
            expected = torch.linalg.svd(x, full_matrices=False)
            # A direction is known as well as its singular value stands apart from the next.
            gap = float((expected.S[:-1] - expected.S[1:])[:BASIS_RANK].min() / expected.S[0])
            cosines = (found[number].double() * expected.Vh[:BASIS_RANK].T).sum(0).abs()
            assert float((1 - cosines).max()) < (1e-5 / gap) ** 2 + 1e-6
