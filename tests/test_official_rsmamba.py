"""What stands in for mmpretrain around the official RSMamba; the official file itself is not in the repository."""

from pathlib import Path

import pytest
import torch

from benchmarks import official_rsmamba
from vision_mamba.layers import OverlapPatchEmbed


@pytest.mark.parametrize("size", [(64, 64), (60, 43), (16, 17)])
def test_patches_are_those_of_our_model(size):
    theirs = official_rsmamba._PatchEmbed(3, size, 8, "Conv2d", 16, 8, bias=False)
    ours = OverlapPatchEmbed(size, 16, 8, in_chans=3, embed_dim=8, corner_pad=True, bias=False)
    ours.proj.weight.data.copy_(theirs.projection.weight)
    x = torch.randn(2, 3, *size)
    tokens, grid = theirs(x)
    assert grid == theirs.init_out_size
    torch.testing.assert_close(tokens, ours(x).flatten(1, 2), rtol=1e-5, atol=1e-6)


def test_a_folder_that_is_no_checkout(tmp_path):
    with pytest.raises(SystemExit, match="no checkout of KyanChen/RSMamba: it has no mmpretrain"):
        official_rsmamba.load(Path(tmp_path))
