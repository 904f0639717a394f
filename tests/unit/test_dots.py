"""The dot product of rows gives torch's bits, forward and backward."""

import pytest
import torch

from embedshard.models.dots import row_dots


@pytest.mark.parametrize("dim", [1, 4, 32, 33, 100])
@pytest.mark.parametrize("is_expanded", [False, True])
@pytest.mark.parametrize("is_slice", [False, True])
def test_products_and_gradients_are_torchs(dim, is_expanded, is_slice):
    torch.manual_seed(dim)
    leaves = [torch.randn(50, dim + 3 * is_slice, requires_grad=True) for _ in range(2)]
    gradient = torch.tensor(0.7).expand(50) if is_expanded else torch.randn(50)
    found = []
    for product in (row_dots, lambda left, right: (left * right).sum(dim=1)):
        out = product(*(leaf[:, :dim] for leaf in leaves))
        found.append([out, *torch.autograd.grad(out, leaves, gradient)])
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(*found, strict=True))


@pytest.mark.parametrize("needs", [(True, False), (False, True), (False, False)])
def test_one_side_alone_may_have_a_gradient(needs):
    left, right = (torch.randn(5, 4, requires_grad=need) for need in needs)
    assert torch.equal(row_dots(left, right), (left * right).sum(dim=1))
    assert row_dots(left, right).requires_grad == any(needs)
