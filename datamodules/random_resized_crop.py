"""Random resized crop of a whole batch at once, with a 2x2 mean against aliasing."""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional


class BatchRandomResizedCrop(nn.Module):
    """Cuts a random part out of every image and resizes it to one size.

    Unlike the usual transform, a window that would leave the image is narrowed, never redrawn.

    Args:
        size: height and width of the result, in pixels.
        scale: least and greatest area of the window, as a share of the image's area.
        ratio: least and greatest width over height of the window, drawn log-uniformly.
    """

    def __init__(
        self,
        size: tuple[int, int],
        scale: tuple[float, float] = (0.08, 1.0),
        ratio: tuple[float, float] = (3 / 4, 4 / 3),
    ) -> None:
        super().__init__()
        if not 0.0 < scale[0] <= scale[1] <= 1.0:
            raise ValueError(f"scale must satisfy 0 < least <= greatest <= 1, got {scale}")
        self.size = size
        self.scale = scale
        self.ratio = ratio

    def windows(self, count: int) -> Tensor:
        """Draws windows as affine maps from the result's coordinates in [-1, 1] to the image's.

        Returns:
            float32, shape (count, 2, 3).
        """
        area = torch.empty(count).uniform_(*self.scale)
        ratio = torch.empty(count).uniform_(math.log(self.ratio[0]), math.log(self.ratio[1])).exp()
        extent = torch.stack(((area * ratio).sqrt(), (area / ratio).sqrt()), -1).clamp(max=1.0)  # (B, 2)
        centre = (2.0 * torch.rand(count, 2) - 1.0) * (1.0 - extent)
        return torch.cat((torch.diag_embed(extent), centre.unsqueeze(-1)), -1)

    def forward(self, images: Tensor) -> Tensor:
        """Crops.

        Args:
            images: floating point, shape (B, C, H, W), best at twice the size of the result or more.

        Returns:
            Shape (B, C, *size).
        """
        count, channels = images.shape[:2]
        windows = self.windows(count).to(images)
        grid = functional.affine_grid(
            windows, [count, channels, 2 * self.size[0], 2 * self.size[1]], align_corners=False
        )  # (B, 2H, 2W, 2)
        cropped = functional.grid_sample(images, grid, mode="bilinear", padding_mode="border", align_corners=False)
        return functional.avg_pool2d(cropped, 2)
