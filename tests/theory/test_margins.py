import math

import pytest
import torch

from slashpatch import theory
from slashpatch.errors import OffsetError, TheoryError
from slashpatch.maths.interference import margins_by_cutoff


def test_a_row_for_each_range():
    theta, amplitudes, phases = [0.1, 1.0, 0.5], [1.0, 2.0, 3.0], [0.0, -1.0, 0.5]
    found = theory.frequency_margins(
        theta, offset=2, n_offsets=20, amplitudes=amplitudes, phases=phases
    )
    assert found["highest"].tolist() == [1.0, 1.0, 1.0, 0.5, 0.5, 0.1]
    assert found["lowest"].tolist() == [1.0, 0.5, 0.1, 0.5, 0.1, 0.1]
    assert found["n_frequencies"].tolist() == [1, 2, 3, 1, 2, 1]
    as_tensors = [torch.tensor(values) for values in (theta, amplitudes, phases)]
    margins = margins_by_cutoff(as_tensors[0], 2, 20, *as_tensors[1:])
    expected = margins[torch.ones(3, 3).triu().bool()]
    assert found["margin"].tolist() == pytest.approx(expected.tolist())


def test_the_frequencies_of_settings():
    found = theory.frequency_margins(theory.Settings().thetas())
    assert len(found) == 16 * 17 / 2
    assert found["margin"].max() < 1


@pytest.mark.parametrize(
    "given", ["high", [], [[1.0]], [math.nan], [-1.0], [1.0, "x"], None, 1.0, [math.inf]]
)
def test_other_frequencies_are_refused(given):
    with pytest.raises(TheoryError, match="frequencies are"):
        theory.frequency_margins(given)


def test_other_values_are_refused():
    with pytest.raises(TheoryError, match="phases are"):
        theory.frequency_margins([1.0], phases=["x"])
    with pytest.raises(TheoryError, match="amplitudes are one for each of the 2"):
        theory.frequency_margins([1.0, 0.5], amplitudes=[1.0])
    with pytest.raises(TheoryError, match="offset is"):
        theory.frequency_margins([1.0], offset=-1)
    with pytest.raises(OffsetError):
        theory.frequency_margins([1.0], offset=64)
