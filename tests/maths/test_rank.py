import torch
from hypothesis import given
from hypothesis import strategies as st

from slashpatch.maths.rank import basis, project, r1, r95

sizes = st.tuples(st.integers(1, 30), st.integers(1, 8), st.integers(0, 99))


def matrix(rows, columns, seed):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, columns, generator=generator).double()
    return x * torch.rand(columns, generator=generator).double() + 0.5


@given(sizes)
def test_r1_and_r95_from_the_gram_matrix_equal_those_from_the_svd(size):
    x = matrix(*size)
    squares = torch.linalg.svdvals(x) ** 2
    torch.testing.assert_close(r1(x.T @ x), squares[0] / squares.sum())
    share = (squares / squares.sum()).cumsum(0)
    assert int(r95(x.T @ x)) == int((share < 0.95).sum()) + 1


@given(sizes, st.integers(1, 4))
def test_projection_is_the_best_approximation_of_its_rank(size, rank):
    x = matrix(*size)
    rank = min(rank, x.shape[1])
    u, s, v = torch.linalg.svd(x, full_matrices=False)
    best = u[:, :rank] * s[:rank] @ v[:rank]
    found = project(x, basis(x.T @ x, rank))
    torch.testing.assert_close((x - found).norm(), (x - best).norm(), atol=1e-7, rtol=1e-6)


@given(sizes)
def test_full_rank_is_the_identity(size):
    x = matrix(*size)
    torch.testing.assert_close(project(x, basis(x.T @ x, x.shape[1])), x)


def test_rank_one():
    x = torch.outer(torch.arange(1.0, 6.0), torch.tensor([1.0, -2.0, 0.5])).double()
    assert float(r1(x.T @ x)) == 1.0
    assert int(r95(x.T @ x)) == 1
    torch.testing.assert_close(project(x, basis(x.T @ x)), x)
    assert r1(torch.zeros(2, 3, 3)).isnan().all()


def test_each_head_is_projected_onto_its_own_basis():
    x = torch.randn(4, 3, 5).double()  # [pos, head, d_head]
    gram = torch.einsum("phd,phe->hde", x, x)
    found = project(x, basis(gram, 2))
    for head in range(3):
        expected = project(x[:, head], basis(gram[head], 2))
        torch.testing.assert_close(found[:, head], expected)
