import pytest
from matplotlib.figure import Figure

from slashpatch.reporting.margins_figure import margins_figure
from slashpatch.theory import frequency_margins

from .test_plots import texts


@pytest.mark.filterwarnings("error:.*layout")
def test_margins_stand_at_their_frequencies():
    frame = frequency_margins([1.0, 0.25, 0.0], n_offsets=20)
    frame["score"] = [0.87, 0.05, 0.51, 0.0, 0.0, 0.0]
    figure = margins_figure({"trained": frame, "other": frame.drop(columns="score")})
    assert isinstance(figure, Figure)
    written = texts(figure)
    assert {"trained", "other", "1\n6", "0.2\n25", "0\n∞", ".87", ".51"} <= set(written)
    assert ".05" not in written
    assert sum("slash score after training" in text for text in written) == 1
    image = figure.axes[0].images[0].get_array()
    for row in frame.itertuples():
        place, column = ([1.0, 0.25, 0.0].index(end) for end in (row.highest, row.lowest))
        assert image[place, column] == row.margin
    circles = figure.axes[0].collections[0]
    assert circles.get_offsets()[2].tolist() == [2, 0]
    assert circles.get_sizes()[2] / circles.get_sizes()[0] == pytest.approx(0.51 / 0.87)


def test_margins_that_are_all_unknown_are_drawn():
    frame = frequency_margins([1.0, 0.5], n_offsets=20, amplitudes=[0.0, 0.0])
    assert frame["margin"].isna().all()
    figure = margins_figure({"nothing": frame})
    texts(figure)
    assert figure.axes[0].images[0].get_clim() == (-0.1, 0.1)
