import dataclasses

import torch

from slashpatch.reporting.lines import lines_figure, lines_table
from slashpatch.reporting.tables import plain
from slashpatch.scanning.lines import LineSums

from . import samples


def scan_with_lines(n=6, n_tokens=400):
    """A scan of 3 × 4 heads in which L1H2 has lines at 50 and 300."""
    generator = torch.Generator().manual_seed(0)
    scores = 0.001 * torch.rand(n, 3, 4, n_tokens - 1, generator=generator, dtype=torch.float64)
    scores[:, 1, 2, 50] += 0.02
    scores[:, 1, 2, 300] += 0.005
    sums = torch.nn.functional.pad(scores * torch.arange(n_tokens - 1, 0, -1), (0, 1))
    lines = LineSums.of_prompts(sums, torch.zeros_like(sums), [n_tokens] * n)
    return dataclasses.replace(samples.scan(source=samples.HOSTILE), line_sums=lines)


def test_the_table_shows_lines_and_their_scores_on_random_tokens():
    scan = scan_with_lines()
    lines = scan.lines()
    shown = plain(lines_table(scan, lines, top=1, control=scan))
    assert "2 lines in 1 of 12 heads, of 381 offsets each" in shown
    row = next(line for line in shown.splitlines() if "L1H2" in line)
    assert "50" in row
    assert row.count(f"{lines[0].score:.4f}") == 2
    assert "and 1 more lines" in shown
    assert "0 lines" in plain(lines_table(scan, []))


def test_the_figure_marks_the_lines():
    scan = scan_with_lines()
    lines = scan.lines()
    figure = lines_figure(scan, lines)
    (axis,) = figure.axes
    curve, marks = axis.lines
    assert marks.get_xdata().tolist() == [50, 300]
    assert {50, 300} <= set(curve.get_xdata().tolist())  # thinned, but no line is lost
    assert len(curve.get_xdata()) < 381
    assert axis.get_xscale() == axis.get_yscale() == "log"
    lines_figure(scan, [])
