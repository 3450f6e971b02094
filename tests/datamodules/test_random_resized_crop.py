"""The batched random resized crop stays inside the image and keeps its area and aspect within bounds."""

import pytest
import torch

from datamodules.random_resized_crop import BatchRandomResizedCrop


def test_windows_lie_inside_and_their_areas_fill_the_range() -> None:
    torch.manual_seed(0)
    windows = BatchRandomResizedCrop((8, 8), (0.25, 1.0)).windows(2000)
    extent = windows[:, (0, 1), (0, 1)]
    assert (extent + windows[:, :, 2].abs() <= 1.0 + 1e-6).all()
    area = extent.prod(-1)
    assert area.max() <= 1.0
    assert area.min() < 0.27
    assert area.max() > 0.97


def test_the_whole_window_is_a_mean_of_pixels() -> None:
    images = torch.rand(3, 2, 8, 12)
    crop = BatchRandomResizedCrop((4, 6), (1.0, 1.0), (1.0, 1.0))
    torch.testing.assert_close(crop(images), torch.nn.functional.avg_pool2d(images, 2), atol=1e-5, rtol=1e-5)


def test_a_ramp_stays_a_ramp() -> None:
    ramp = torch.arange(64.0).expand(4, 1, 64, 64)
    cropped = BatchRandomResizedCrop((16, 16), (0.3, 0.6))(ramp)
    slope = cropped.diff(dim=-1)[..., 1:-1]
    torch.testing.assert_close(slope, slope[..., :1, :1].expand_as(slope), atol=1e-3, rtol=1e-3)
    assert (slope > 1.0).all()


def test_a_bad_scale_is_refused() -> None:
    with pytest.raises(ValueError, match="scale"):
        BatchRandomResizedCrop((4, 4), (0.0, 1.0))
