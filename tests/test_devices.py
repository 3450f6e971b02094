"""The same weights and inputs on a CPU and on a GPU: each system's answers, losses and gradients, and a step in bfloat16."""

import copy
from collections.abc import Mapping
from typing import NamedTuple

import pytest
import torch
from hydra.utils import instantiate
from test_configs import composed
from torch import Tensor

pytestmark = pytest.mark.gpu

DEVICE = "cuda"


@pytest.fixture(autouse=True)
def whole_float32():
    with torch.backends.cudnn.flags(allow_tf32=False):
        yield


class Boxes(NamedTuple):
    boxes: Tensor
    labels: Tensor


def images(*shape):
    return torch.randn(2, 3, *shape)


def classification(model, device):
    return {"loss": model(images(32, 32).to(device)).square().mean()}


def language(model, device):
    tokens = torch.randint(1, 200, (2, 4 * model.chunk + 5)).to(device)  # four chunks and a part
    return {"loss": model(tokens)[0].square().mean()}


def detection(model, device):
    objects = [
        Boxes(torch.tensor([[8.0, 9.0, 60.0, 50.0], [30.0, 20.0, 90.0, 80.0]]), torch.tensor([1, 3])),
        Boxes(torch.zeros(0, 4), torch.zeros(0, dtype=torch.long)),
    ]
    sizes = torch.tensor([[96, 128], [80, 100]])
    there = [Boxes(*(value.to(device) for value in one)) for one in objects]
    return model(images(96, 128).to(device), sizes.to(device), there)


def segmentation(model, device):
    targets = torch.randint(0, 5, (2, 6, 6)).repeat_interleave(16, 1).repeat_interleave(16, 2)
    targets[:, :20] = 255
    return model(images(96, 96).to(device), targets.to(device))


def pixels(model, device):
    return {"loss": model(images(96, 96).to(device)).square().mean()}


CASES = {
    "vit": (classification, "imagenet", "position=mixed"),
    "memory": (language, "lm", "model=lm_ci"),
    "delta": (language, "lm", "model=lm_ci_delta"),
    "rt_detr": (detection, "coco", "model=rt_detr_nano", "model.denoising=0"),  # which is drawn on the device
    "uper_net": (segmentation, "ade20k", "model=uper_net_nano"),
    "mask2former": (segmentation, "ade20k", "model=mask2former_nano"),
}


# its losses look at points drawn on the device
SAME = {**CASES, "mask2former": (pixels, *CASES["mask2former"][1:])}


def made(task, *overrides):
    torch.manual_seed(0)
    return instantiate(composed(*overrides, task=task).model)


def result(losses, model, device):
    """Losses and gradients, on the CPU."""
    torch.manual_seed(1)
    model = copy.deepcopy(model).to(device)
    parts = losses(model, device)
    assert isinstance(parts, Mapping)
    sum(parts.values()).backward()
    gradients = {name: p.grad.cpu() for name, p in model.named_parameters() if p.grad is not None}
    return {name: part.detach().cpu() for name, part in parts.items()}, gradients


@pytest.mark.parametrize("case", SAME)
def test_a_gpu_gives_the_losses_and_gradients_of_a_cpu(case):
    losses, *overrides = SAME[case]
    model = made(*overrides).eval()
    torch.testing.assert_close(result(losses, model, DEVICE), result(losses, model, "cpu"), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("case", CASES)
def test_a_step_in_bfloat16_on_a_gpu(case):
    losses, *overrides = CASES[case]
    model = made(*overrides).train()
    with torch.autocast(DEVICE, torch.bfloat16):
        parts, gradients = result(losses, model, DEVICE)
    assert all(torch.isfinite(part) for part in parts.values())
    assert gradients
    assert all(torch.isfinite(gradient).all() for gradient in gradients.values())
