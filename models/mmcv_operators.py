"""Compiled operators of mmcv in plain PyTorch and torchvision, under the names and signatures its Python calls them by.

They run on any device. Backward operators compute the forward again, so that nothing is kept between the two.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

COMPILE = "pip uninstall mmcv-lite && MMCV_WITH_OPS=1 pip install -c constraints.txt --no-build-isolation --no-deps mmcv==2.1.0"
_SUPPRESSIONS = ("naive", "linear", "gaussian")


def _accumulate(call: Callable[..., Tensor], inputs: Sequence[Tensor], grad: Tensor, into: Sequence[Tensor]) -> None:
    """Add the gradients of `call` in its inputs to `into`."""
    with torch.enable_grad():
        leaves = [x.detach().requires_grad_() for x in inputs]
        gradients = torch.autograd.grad(call(*leaves), leaves, grad)
    for sum_of, gradient in zip(into, gradients, strict=True):
        sum_of.add_(gradient)


def deformable_attention(shapes: Sequence[Sequence[int]]) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """Attention to points sampled from maps of several levels (arXiv 2010.04159).

    Args:
        shapes: height and width of each level.

    Returns:
        value (b, cells of all levels, h, d), locations (b, q, h, levels, points, 2) as x, y in parts of the map, weights
        (b, q, h, levels, points) → (b, q, h · d).
    """

    def attend(value: Tensor, locations: Tensor, weights: Tensor) -> Tensor:
        batch, queries, heads = locations.shape[:3]
        grids = (2 * locations - 1).transpose(1, 2).flatten(0, 1)  # (b · h, q, levels, points, 2)
        weights = weights.transpose(1, 2).flatten(0, 1)[:, None]  # (b · h, 1, q, levels, points)
        levels = value.permute(0, 2, 3, 1).flatten(0, 1).split([rows * columns for rows, columns in shapes], dim=-1)
        total = value.new_zeros(batch * heads, value.shape[-1], queries)
        with torch.autocast(value.device.type, enabled=False):
            for level, (features, shape) in enumerate(zip(levels, shapes, strict=True)):
                sampled = F.grid_sample(features.unflatten(-1, tuple(shape)), grids[:, :, level], align_corners=False)
                total = total + (sampled * weights[..., level, :]).sum(-1)
        return total.unflatten(0, (batch, heads)).permute(0, 3, 1, 2).flatten(2)

    return attend


def ms_deform_attn_forward(
    value: Tensor, shapes: Tensor, starts: Tensor, locations: Tensor, weights: Tensor, im2col_step: int
) -> Tensor:
    return deformable_attention(shapes.tolist())(value, locations, weights)


def ms_deform_attn_backward(
    value: Tensor,
    shapes: Tensor,
    starts: Tensor,
    locations: Tensor,
    weights: Tensor,
    grad: Tensor,
    grad_value: Tensor,
    grad_locations: Tensor,
    grad_weights: Tensor,
    im2col_step: int,
) -> None:
    into = (grad_value, grad_locations, grad_weights)
    _accumulate(deformable_attention(shapes.tolist()), (value, locations, weights), grad, into)


def _focal(target: Tensor, weight: Tensor, gamma: float, alpha: float) -> Callable[[Tensor], Tensor]:
    def loss(logits: Tensor) -> Tensor:
        is_class = target[:, None] == torch.arange(logits.shape[1], device=target.device)
        chance = logits.sigmoid()
        miss = torch.where(is_class, alpha * (1 - chance) ** gamma, (1 - alpha) * chance**gamma)
        entropy = F.binary_cross_entropy_with_logits(logits, is_class.to(logits.dtype), reduction="none")
        return miss * entropy

    if len(weight):
        raise NotImplementedError(f"sigmoid_focal_loss with class weights needs mmcv's compiled code: {COMPILE}")
    return loss


def sigmoid_focal_loss_forward(
    logits: Tensor, target: Tensor, weight: Tensor, output: Tensor, gamma: float, alpha: float
) -> None:
    output.copy_(_focal(target, weight, gamma, alpha)(logits))


def sigmoid_focal_loss_backward(
    logits: Tensor, target: Tensor, weight: Tensor, grad_logits: Tensor, gamma: float, alpha: float
) -> None:
    _accumulate(_focal(target, weight, gamma, alpha), (logits,), torch.ones_like(logits), (grad_logits,))


def nms(boxes: Tensor, scores: Tensor, iou_threshold: float, offset: int) -> Tensor:
    from torchvision import ops

    return ops.nms(boxes + boxes.new_tensor([0, 0, offset, offset]), scores, iou_threshold)


def softnms(
    boxes: Tensor,
    scores: Tensor,
    dets: Tensor,
    iou_threshold: float,
    sigma: float,
    min_score: float,
    method: int,
    offset: int,
) -> Tensor:
    """Soft-NMS (arXiv 1704.04503): indices best first; `dets` (n, 5) takes the boxes and the scores they are left with."""
    from torchvision import ops

    wide = boxes + boxes.new_tensor([0, 0, offset, offset])
    overlaps = ops.box_iou(wide, wide)
    left, scores, kept = torch.arange(len(boxes)), scores.clone(), list[Tensor]()
    while len(left):
        best = left[scores[left].argmax()]
        dets[len(kept)] = torch.cat((boxes[best], scores[best, None]))
        kept.append(best)
        left = left[left != best]
        overlap = overlaps[best, left]
        match _SUPPRESSIONS[method]:
            case "naive":
                scores[left] *= overlap < iou_threshold
            case "linear":
                scores[left] *= torch.where(overlap < iou_threshold, 1, 1 - overlap)
            case "gaussian":
                scores[left] *= (-(overlap**2) / sigma).exp()
        left = left[scores[left] >= min_score]
    return torch.stack(kept) if kept else left


def _pooled(rois: Tensor, keys: Mapping[str, Any]) -> Callable[[Tensor], Tensor]:
    from torchvision import ops

    if keys["pool_mode"] != 1:
        raise NotImplementedError(f"roi_align by maxima needs mmcv's compiled code: {COMPILE}")
    size, scale = (keys["aligned_height"], keys["aligned_width"]), keys["spatial_scale"]
    return lambda x: ops.roi_align(x, rois, size, scale, keys["sampling_ratio"] or -1, keys["aligned"])


def roi_align_forward(x: Tensor, rois: Tensor, output: Tensor, *argmax: Tensor, **keys: Any) -> None:
    output.copy_(_pooled(rois, keys)(x))


def roi_align_backward(
    grad: Tensor, rois: Tensor, argmax_y: Tensor, argmax_x: Tensor, grad_x: Tensor, **keys: Any
) -> None:
    _accumulate(_pooled(rois, keys), (torch.zeros_like(grad_x),), grad, (grad_x,))  # linear in x: any x will do


def _convolve(stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int]) -> Callable[..., Tensor]:
    from torchvision import ops

    def convolve(x: Tensor, offset: Tensor, weight: Tensor, *mask_and_bias: Tensor) -> Tensor:
        mask, bias = (*mask_and_bias, None, None)[:2]
        return ops.deform_conv2d(x, offset, weight, bias, stride, padding, dilation, mask)

    return convolve


def _convolution(keys: Mapping[str, Any]) -> Callable[..., Tensor]:
    return _convolve(*((keys[f"{name}H"], keys[f"{name}W"]) for name in ("d", "pad", "dilation")))


def _modulated(keys: Mapping[str, Any]) -> Callable[..., Tensor]:
    return _convolve(*((keys[f"{name}_h"], keys[f"{name}_w"]) for name in ("stride", "pad", "dilation")))


def deform_conv_forward(
    x: Tensor, weight: Tensor, offset: Tensor, output: Tensor, *buffers: Tensor, **keys: Any
) -> None:
    output.copy_(_convolution(keys)(x, offset, weight))


def deform_conv_backward_input(
    x: Tensor,
    offset: Tensor,
    grad: Tensor,
    grad_x: Tensor,
    grad_offset: Tensor,
    weight: Tensor,
    *buffers: Tensor,
    **keys: Any,
) -> None:
    convolve = _convolution(keys)
    _accumulate(lambda x, offset: convolve(x, offset, weight), (x, offset), grad, (grad_x, grad_offset))


def deform_conv_backward_parameters(
    x: Tensor, offset: Tensor, grad: Tensor, grad_weight: Tensor, *buffers: Tensor, **keys: Any
) -> None:
    convolve, weight = _convolution(keys), torch.zeros_like(grad_weight)  # linear in it: any weight will do
    _accumulate(lambda weight: convolve(x, offset, weight), (weight,), grad, (grad_weight,))


def modulated_deform_conv_forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    ones: Tensor,
    offset: Tensor,
    mask: Tensor,
    output: Tensor,
    columns: Tensor,
    **keys: Any,
) -> None:
    output.copy_(_modulated(keys)(x, offset, weight, mask, *((bias,) if keys["with_bias"] else ())))


def modulated_deform_conv_backward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    ones: Tensor,
    offset: Tensor,
    mask: Tensor,
    columns: Tensor,
    grad_x: Tensor,
    grad_weight: Tensor,
    grad_bias: Tensor,
    grad_offset: Tensor,
    grad_mask: Tensor,
    grad: Tensor,
    **keys: Any,
) -> None:
    inputs, into = [x, offset, weight, mask], [grad_x, grad_offset, grad_weight, grad_mask]
    if keys["with_bias"]:
        inputs, into = [*inputs, bias], [*into, grad_bias]
    _accumulate(_modulated(keys), inputs, grad, into)


def _absent(operator: str) -> Callable[..., Any]:
    def refuse(*_: object, **__: object) -> None:
        raise NotImplementedError(f"{operator} is compiled code of mmcv, which isn't installed: {COMPILE}")

    return refuse


class StandIn(ModuleType):
    """A module that stands where mmcv's compiled one would: deformable attention, sigmoid focal loss, nms, soft-nms, roi_align
    by averages and deformable convolutions work, every other operator raises NotImplementedError with the command to compile.

    Args:
        name: of the module.
    """

    def __init__(self, name: str) -> None:
        super().__init__(name, type(self).__doc__)
        self.__spec__ = ModuleSpec(name, loader=None)
        for operator in (
            ms_deform_attn_forward,
            ms_deform_attn_backward,
            sigmoid_focal_loss_forward,
            sigmoid_focal_loss_backward,
            nms,
            softnms,
            roi_align_forward,
            roi_align_backward,
            deform_conv_forward,
            deform_conv_backward_input,
            deform_conv_backward_parameters,
            modulated_deform_conv_forward,
            modulated_deform_conv_backward,
        ):
            setattr(self, operator.__name__, operator)

    def __getattr__(self, name: str) -> Callable[..., Any]:
        if name.startswith("__"):
            raise AttributeError(name)
        return _absent(name)
