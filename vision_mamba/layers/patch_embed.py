"""Patch embedding with a stride of its own."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..ops.backend import autocast_dtype


class OverlapPatchEmbed(nn.Module):
    """One convolution from image to tokens; patches overlap where the stride is below their size.

    timm's ``PatchEmbed`` has no stride. Positions a side: ``(size - patch_size) // stride + 1``, or with
    ``corner_pad`` ``ceil(size / stride)``.

    Args:
        img_size: (height, width) in pixels that the model is built for.
        patch_size: side of a patch in pixels.
        stride: pixels between patches.
        in_chans: image channels.
        embed_dim: channels of a token.
        corner_pad: zeros at the bottom and right, so that a patch starts at every ``stride`` pixels of the image and
            every size fits (mmcv's ``AdaptivePadding``, mode ``corner``).
        bias: of the convolution.
        dynamic_img_size: accept any size in ``forward``.

    Raises:
        ValueError: without ``corner_pad``, an image size that patches and stride do not tile exactly.
    """

    def __init__(
        self,
        img_size: tuple[int, int],
        patch_size: int,
        stride: int,
        *,
        in_chans: int,
        embed_dim: int,
        corner_pad: bool = False,
        bias: bool = True,
        dynamic_img_size: bool = False,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        self.patch_size, self.stride, self.dynamic_img_size = patch_size, stride, dynamic_img_size
        self.corner_pad = corner_pad
        self.set_input_size(img_size)
        self.proj = nn.Conv2d(
            in_chans, embed_dim, kernel_size=patch_size, stride=stride, bias=bias, device=device, dtype=dtype
        )

    def set_input_size(self, img_size: tuple[int, int]) -> None:
        self.grid_size = self.dynamic_feat_size(img_size)
        self.img_size = tuple(img_size)

    @property
    def num_patches(self) -> int:
        return self.grid_size[0] * self.grid_size[1]

    def feat_ratio(self, as_scalar: bool = True) -> int | tuple[int, int]:
        return self.stride if as_scalar else (self.stride, self.stride)

    def dynamic_feat_size(self, img_size: tuple[int, int]) -> tuple[int, int]:
        """(height, width) in tokens of an image of (height, width) pixels."""
        if self.corner_pad:
            rows, columns = (-(-size // self.stride) for size in img_size)
            return rows, columns
        for name, size in zip(("height", "width"), img_size, strict=True):
            if size < self.patch_size or (size - self.patch_size) % self.stride:
                lower = max(size - (size - self.patch_size) % self.stride, self.patch_size)
                raise ValueError(
                    f"image {name} {size} is not tiled by patches of {self.patch_size} with stride {self.stride}; "
                    f"nearest sizes are {lower} and {lower + self.stride}"
                )
        rows, columns = ((size - self.patch_size) // self.stride + 1 for size in img_size)
        return rows, columns

    def check_size(self, size: tuple[int, int]) -> tuple[int, int]:
        """(height, width) in tokens of an image of (height, width) pixels that ``forward`` may be given.

        Raises:
            ValueError: another size than ``img_size`` without ``dynamic_img_size``, or one that patches do not tile.
        """
        if not self.dynamic_img_size and size != self.img_size:
            raise ValueError(
                f"image is {size[0]}x{size[1]}, the model was built for {self.img_size[0]}x{self.img_size[1]}; "
                f"resize it, or create the model with img_size={size} or dynamic_img_size=True"
            )
        return self.dynamic_feat_size(size)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, in_chans, height, width) -> (batch, rows, columns, embed_dim).

        Raises:
            ValueError: another size than ``img_size`` without ``dynamic_img_size``, or one that patches do not tile.
        """
        size = (x.shape[-2], x.shape[-1])
        grid = self.check_size(size)
        if self.corner_pad:
            bottom, right = (
                max((count - 1) * self.stride + self.patch_size - pixels, 0)
                for count, pixels in zip(grid, size, strict=True)
            )
            x = F.pad(x, (0, right, 0, bottom))
        if x.is_cuda:
            return self._project(x)
        return self.proj(x).permute(0, 2, 3, 1)

    def _project(self, x: Tensor) -> Tensor:
        """The same as one product: cuDNN's convolution takes five times as long and more."""
        dtype = autocast_dtype(x.device) or x.dtype
        patches = x.unfold(2, self.patch_size, self.stride).unfold(3, self.patch_size, self.stride)
        patches = patches.permute(0, 2, 3, 1, 4, 5)
        patches = patches.to(dtype, memory_format=torch.contiguous_format)  # cast and copy in one pass
        return F.linear(patches.flatten(3), self.proj.weight.flatten(1), self.proj.bias)
