"""The stand-in's operators: torchvision's focal loss, sums by hand and plain convolutions are the oracles."""

import pytest
import torch
from torch.nn.functional import conv2d, grid_sample, pad
from torchvision import ops

from models import mmcv_operators
from models.mmcv_operators import StandIn, deformable_attention


def sampled_convolution(x, offset, weight, bias=None, stride=(1, 1), padding=(0, 0), dilation=(1, 1), mask=None):
    """Deformable convolution by its definition, with the signature of torchvision's: taps are sampled one by one."""
    height, width = x.shape[2:]
    channels, narrow, high, wide = weight.shape
    rows, columns = offset.shape[2:]
    groups, parts, taps = offset.shape[1] // (2 * high * wide), x.shape[1] // narrow, []
    y0 = torch.arange(rows, dtype=x.dtype)[:, None] * stride[0] - padding[0]
    x0 = torch.arange(columns, dtype=x.dtype)[None] * stride[1] - padding[1]
    shifts = offset.unflatten(1, (groups, high * wide, 2))
    masks = None if mask is None else mask.unflatten(1, (groups, high * wide))
    for tap in range(high * wide):
        of_groups = []
        for group, part in enumerate(x.chunk(groups, dim=1)):
            dy, dx = shifts[:, group, tap].unbind(1)
            at_y, at_x = y0 + tap // wide * dilation[0] + dy, x0 + tap % wide * dilation[1] + dx
            grid = torch.stack(((2 * at_x + 1) / width - 1, (2 * at_y + 1) / height - 1), dim=-1)
            value = grid_sample(part, grid, align_corners=False)
            of_groups.append(value if masks is None else value * masks[:, group, tap, None])
        taps.append(torch.cat(of_groups, dim=1))
    columns_of = torch.stack(taps, dim=2).unflatten(1, (parts, narrow))  # (b, groups, c / groups, taps, h, w)
    kernels = weight.flatten(2).unflatten(0, (parts, channels // parts))
    out = torch.einsum("bgcthw,goct->bgohw", columns_of, kernels).flatten(1, 2)
    return out if bias is None else out + bias[:, None, None]


@pytest.fixture
def convolutions(monkeypatch):
    if not hasattr(torch.ops.torchvision, "deform_conv2d"):  # a torchvision of another build than torch
        monkeypatch.setattr(ops, "deform_conv2d", sampled_convolution)


def test_every_other_operator_names_itself_and_the_remedy():
    stand_in = StandIn("mmcv._ext")
    with pytest.raises(NotImplementedError, match=r"^carafe_forward is .*pip install .*mmcv==2\.1\.0"):
        stand_in.carafe_forward(torch.zeros(1), scale_factor=2)
    assert not hasattr(stand_in, "__path__")  # or import would take it for a package


def test_a_point_on_a_cell_gives_the_cell():
    value = torch.randn(2, 3 * 4 + 2 * 2, 2, 5)
    shapes, at = (
        [(3, 4), (2, 2)],
        torch.tensor([[2.5 / 4, 1.5 / 3], [0.5 / 2, 1.5 / 2]]),
    )  # x, y of cells (1, 2), (1, 0)
    locations = at[None, None, None, :, None].expand(2, 1, 2, 2, 1, 2)
    weights = torch.tensor([0.25, 0.75])[None, None, None, :, None].expand(2, 1, 2, 2, 1)
    expected = 0.25 * value[:, 1 * 4 + 2] + 0.75 * value[:, 12 + 1 * 2 + 0]
    torch.testing.assert_close(deformable_attention(shapes)(value, locations, weights)[:, 0], expected.flatten(1))


def test_gradients_of_deformable_attention():
    shapes = torch.tensor([[3, 4], [2, 2]])
    value = torch.randn(1, 16, 2, 3, dtype=torch.float64, requires_grad=True)
    locations = torch.rand(1, 5, 2, 2, 3, 2, dtype=torch.float64, requires_grad=True)
    weights = torch.rand(1, 5, 2, 2, 3, dtype=torch.float64, requires_grad=True)
    inputs = (value, locations, weights)
    assert torch.autograd.gradcheck(deformable_attention(shapes.tolist()), inputs)
    grad = torch.randn(1, 5, 6, dtype=torch.float64)
    expected = torch.autograd.grad(deformable_attention(shapes.tolist())(*inputs), inputs, grad)
    found = [torch.zeros_like(x) for x in inputs]
    with torch.no_grad():
        mmcv_operators.ms_deform_attn_backward(value, shapes, shapes, locations, weights, grad, *found, im2col_step=64)
    torch.testing.assert_close(found, list(expected))


def test_focal_loss_is_torchvisions():
    logits = torch.randn(7, 4, requires_grad=True)
    target = torch.tensor([0, 1, 2, 3, 4, 4, 0])  # 4 is background
    one_hot = torch.nn.functional.one_hot(target, 5)[:, :4].float()
    expected = ops.sigmoid_focal_loss(logits, one_hot, alpha=0.3, gamma=1.5)
    (slope,) = torch.autograd.grad(expected.sum(), logits)
    loss, grad, no_weight = torch.zeros(7, 4), torch.zeros(7, 4), torch.zeros(0)
    with torch.no_grad():
        mmcv_operators.sigmoid_focal_loss_forward(logits, target, no_weight, loss, gamma=1.5, alpha=0.3)
        mmcv_operators.sigmoid_focal_loss_backward(logits, target, no_weight, grad, gamma=1.5, alpha=0.3)
    torch.testing.assert_close((loss, grad), (expected.detach(), slope))


def test_weights_of_classes_are_refused():
    with pytest.raises(NotImplementedError, match="class weights"):
        mmcv_operators.sigmoid_focal_loss_forward(
            torch.zeros(1, 2), torch.tensor([0]), torch.ones(2), torch.zeros(1, 2), gamma=2.0, alpha=0.25
        )


def some_boxes(count):
    corner = torch.rand(count, 2) * 20
    return torch.cat((corner, corner + 5 + torch.rand(count, 2) * 20), dim=1), torch.rand(count)


def test_naive_soft_suppression_is_plain_suppression():
    boxes, scores = some_boxes(60)
    dets = torch.zeros(60, 5)
    kept = mmcv_operators.softnms(boxes, scores, dets, 0.4, 0.5, 1e-3, 0, 0)
    assert torch.equal(kept, mmcv_operators.nms(boxes, scores, iou_threshold=0.4, offset=0))
    torch.testing.assert_close(dets[: len(kept)], torch.cat((boxes[kept], scores[kept, None]), dim=1))


@pytest.mark.parametrize(("method", "factor"), [(1, 1 - 1 / 3), (2, torch.tensor(-(1 / 9) / 0.5).exp().item())])
def test_soft_suppression_by_hand(method, factor):
    boxes = torch.tensor([[0.0, 0.0, 4.0, 4.0], [0.0, 2.0, 4.0, 6.0], [50.0, 50.0, 60.0, 60.0]])  # overlap 8 / 24
    dets = torch.zeros(3, 5)
    kept = mmcv_operators.softnms(boxes, torch.tensor([0.9, 0.8, 0.1]), dets, 0.3, 0.5, 1e-3, method, 0)
    assert kept.tolist() == [0, 1, 2]
    torch.testing.assert_close(dets[:, 4], torch.tensor([0.9, 0.8 * factor, 0.1]))


def test_an_offset_widens_boxes_by_a_pixel():
    boxes = torch.tensor([[0.0, 0.0, 1.0, 1.0], [1.0, 0.0, 2.0, 1.0]])  # 2 × 2 pixels each, one column shared: 2 / 6
    scores = torch.tensor([0.9, 0.8])
    assert mmcv_operators.nms(boxes, scores, 0.3, offset=0).tolist() == [0, 1]
    assert mmcv_operators.nms(boxes, scores, 0.3, offset=1).tolist() == [0]


@pytest.mark.slow  # torchvision compiles its Python form where its operator is missing
def test_regions_of_a_slope_are_its_middle():
    rows, columns = torch.meshgrid(torch.arange(16.0), torch.arange(16.0), indexing="ij")
    x, rois = torch.stack((rows, columns))[None], torch.tensor([[0.0, 4.0, 8.0, 20.0, 24.0]])
    keys = {
        "aligned_height": 2, "aligned_width": 2, "spatial_scale": 0.5, "sampling_ratio": 2, "pool_mode": 1, "aligned": True,
    }  # fmt: skip
    output, grad_x = torch.zeros(1, 2, 2, 2), torch.zeros_like(x)
    mmcv_operators.roi_align_forward(x, rois, output, x, x, **keys)
    y, across = (
        torch.tensor([5.5, 9.5]),
        torch.tensor([3.5, 7.5]),
    )  # middles of the quarters of rows 4 … 12, columns 2 … 10
    torch.testing.assert_close(output[0], torch.stack((y[:, None].expand(2, 2), across[None].expand(2, 2))))
    mmcv_operators.roi_align_backward(torch.ones_like(output), rois, x, x, grad_x, **keys)
    torch.testing.assert_close(grad_x.sum(), torch.tensor(8.0))  # every average passes its gradient on whole
    with pytest.raises(NotImplementedError, match="maxima"):
        mmcv_operators.roi_align_forward(x, rois, output, x, x, **{**keys, "pool_mode": 0})


GEOMETRY = {"stride": (2, 1), "padding": (1, 2), "dilation": (1, 2)}


def test_without_offsets_deformable_convolution_is_convolution(convolutions):
    x = torch.randn(2, 4, 9, 11, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(6, 2, 3, 3, dtype=torch.float64, requires_grad=True)
    expected = conv2d(x, weight, **GEOMETRY, groups=2)
    offset = torch.zeros(2, 2 * 2 * 9, *expected.shape[2:], dtype=torch.float64)
    keys = {"dH": 2, "dW": 1, "padH": 1, "padW": 2, "dilationH": 1, "dilationW": 2, "kW": 3, "kH": 3}
    with torch.no_grad():
        output = torch.zeros_like(expected)
        mmcv_operators.deform_conv_forward(x, weight, offset, output, x, x, **keys)
    torch.testing.assert_close(output, expected.detach())
    grad = torch.randn_like(output)
    slopes = torch.autograd.grad(expected, (x, weight), grad)
    grad_x, grad_offset, grad_weight = torch.zeros_like(x), torch.zeros_like(offset), torch.zeros_like(weight)
    mmcv_operators.deform_conv_backward_input(x, offset, grad, grad_x, grad_offset, weight, x, **keys)
    mmcv_operators.deform_conv_backward_parameters(x, offset, grad, grad_weight, x, x, **keys)
    torch.testing.assert_close((grad_x, grad_weight), slopes)


def test_an_offset_of_a_pixel_shifts_the_image(convolutions):
    x, weight = torch.randn(1, 3, 8, 8), torch.randn(2, 3, 3, 3)
    offset = torch.zeros(1, 2 * 9, 6, 6)
    offset[:, 1::2] = 1  # y, x of each tap: one pixel to the right
    output = torch.zeros(1, 2, 6, 6)
    keys = {"dH": 1, "dW": 1, "padH": 0, "padW": 0, "dilationH": 1, "dilationW": 1}
    mmcv_operators.deform_conv_forward(x, weight, offset, output, **keys)
    # float32 sums in another order
    torch.testing.assert_close(output, conv2d(pad(x, (0, 1))[..., 1:], weight), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("with_bias", [False, True])
def test_masks_scale_the_taps(convolutions, with_bias):
    x = torch.randn(2, 4, 9, 11, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(6, 2, 3, 3, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(6, dtype=torch.float64, requires_grad=True)
    expected = conv2d(x, weight, **GEOMETRY, groups=2) / 2 + (bias[:, None, None] if with_bias else 0)
    offset = torch.zeros(2, 18, *expected.shape[2:], dtype=torch.float64)
    mask = torch.full((2, 9, *expected.shape[2:]), 0.5, dtype=torch.float64)
    keys = {
        "stride_h": 2, "stride_w": 1, "pad_h": 1, "pad_w": 2, "dilation_h": 1, "dilation_w": 2, "with_bias": with_bias,
    }  # fmt: skip
    with torch.no_grad():
        output = torch.zeros_like(expected)
        mmcv_operators.modulated_deform_conv_forward(x, weight, bias, x, offset, mask, output, x, **keys)
    torch.testing.assert_close(output, expected.detach())
    grad, wanted = torch.randn_like(output), (x, weight, bias) if with_bias else (x, weight)
    slopes = torch.autograd.grad(expected, wanted, grad)
    found = [torch.zeros_like(value) for value in (x, weight, bias, offset, mask)]
    mmcv_operators.modulated_deform_conv_backward(x, weight, bias, x, offset, mask, x, *found, grad, **keys)
    torch.testing.assert_close(tuple(found[: len(wanted)]), slopes)
    # the taps of a bin, weighted by the gradient, add to what they gave
    given = (output - (bias[:, None, None] if with_bias else 0)).detach()
    torch.testing.assert_close((found[4] * mask).sum(), (given * grad).sum())
