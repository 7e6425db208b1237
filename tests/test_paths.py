"""Scan paths against tables written out by hand."""

import pytest
import torch

from vision_mamba.paths import PATHS, SS2D, check_paths, inverse_paths, random_paths, scan_paths


def test_tables_of_a_2x3_grid():
    #  0 1 2
    #  3 4 5
    assert scan_paths(tuple(PATHS), 2, 3).tolist() == [
        [0, 1, 2, 3, 4, 5],
        [5, 4, 3, 2, 1, 0],
        [0, 3, 1, 4, 2, 5],
        [5, 2, 4, 1, 3, 0],
    ]
    assert scan_paths(SS2D, 2, 3).tolist() == [
        [0, 1, 2, 3, 4, 5],
        [0, 3, 1, 4, 2, 5],
        [5, 4, 3, 2, 1, 0],
        [5, 2, 4, 1, 3, 0],
    ]


def test_every_named_path_is_a_permutation():
    for height, width in ((1, 1), (1, 7), (5, 3), (14, 14)):
        table = check_paths(scan_paths(tuple(PATHS), height, width))
        assert table.dtype == torch.int32
        inverse = inverse_paths(table)
        for row, back in zip(table, inverse, strict=True):
            assert back[row.long()].tolist() == list(range(height * width))


def test_random_paths_by_seed_and_generator():
    a = random_paths(3, 50, seed=7)
    assert torch.equal(a, random_paths(3, 50, seed=7)) and not torch.equal(a, random_paths(3, 50, seed=8))
    check_paths(a)
    generator = torch.Generator().manual_seed(7)
    assert torch.equal(a, random_paths(3, 50, generator=generator))
    assert not torch.equal(a, random_paths(3, 50, generator=generator))
    before = torch.get_rng_state()
    random_paths(1, 5, seed=0)
    assert torch.equal(before, torch.get_rng_state())


def test_cached_and_usable_after_inference_mode():
    with torch.inference_mode():
        table = scan_paths(("raster", "reverse"), 3, 31)
    assert table is scan_paths(("raster", "reverse"), 3, 31)
    assert not table.is_inference()


def test_bad_paths_are_named():
    with pytest.raises(ValueError, match="unknown scan path 'zigzag'; known are raster"):
        scan_paths(("zigzag",), 2, 2)
    with pytest.raises(ValueError, match=r"paths\[1\] is not a permutation of the 3"):
        check_paths(torch.tensor([[0, 1, 2], [0, 2, 2]]))
    with pytest.raises(ValueError, match="not both"):
        random_paths(1, 4, seed=0, generator=torch.Generator())
