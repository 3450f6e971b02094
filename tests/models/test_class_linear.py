"""A linear map for every class of agent: each row goes through the map of its class, whichever way it is computed."""

import pytest
import torch

from models.motion_head import CLASSES, ClassLinear


@pytest.mark.parametrize("types", [(0, 1, 2), (1,), (2, 0)])
@pytest.mark.parametrize("shape", [(40,), (3, 4, 5), (0,), (2, 0, 3)])
def test_rows_by_class_are_those_of_all_maps(types, shape):
    torch.manual_seed(0)
    linear = ClassLinear(6, 9).double()
    hidden = torch.randn(*shape, 6, dtype=torch.float64, requires_grad=True)
    type = torch.tensor(types)[torch.randint(len(types), shape)]
    results = []
    for way in (linear.all_classes, linear.by_class):
        linear.zero_grad()
        hidden.grad = None
        out = way(hidden, type)
        out.cos().sum().backward()
        # All maps take part in the one way, the other leaves a class that isn't there without a gradient or with zero.
        grads = [p.new_zeros(p.shape) if p.grad is None else p.grad for p in linear.parameters()]
        results.append([out.detach(), hidden.grad, *grads])
    for all_classes, by_class in zip(*results, strict=True):
        torch.testing.assert_close(by_class, all_classes, rtol=1e-12, atol=1e-12)
    assert len(linear.maps) == len(CLASSES)
