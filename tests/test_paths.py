"""Scan paths against tables written out by hand, slow definitions and what the papers say of them."""

import itertools

import pytest
import torch

from vision_mamba.paths import PATHS, SS2D, check_paths, expand_paths, inverse_paths, random_paths, scan_paths

ORDERS = ("raster", "snake", "local2", "local3", "local7", "atrous2", "atrous3", "diagonal", "morton", "hilbert")
MODIFIERS = ("", "_column", "_flip", "_reverse", "_column_flip_reverse")
SIZES = ((1, 1), (1, 7), (6, 1), (5, 3), (2, 2), (4, 9), (7, 7), (8, 8), (14, 14), (13, 6))

every_size = pytest.mark.parametrize("height, width", SIZES)


def places(name, height, width):
    """Row and column of each step."""
    return [divmod(token, width) for token in scan_paths((name,), height, width)[0].tolist()]


def test_tables_of_a_2x3_grid():
    #  0 1 2
    #  3 4 5
    tables = {
        "raster": [0, 1, 2, 3, 4, 5],
        "column": [0, 3, 1, 4, 2, 5],
        "reverse": [5, 4, 3, 2, 1, 0],
        "column_reverse": [5, 2, 4, 1, 3, 0],
        "snake": [0, 1, 2, 5, 4, 3],
        "snake_column": [0, 3, 4, 1, 2, 5],
        "snake_flip": [2, 1, 0, 3, 4, 5],
        "snake_flip_column": [3, 0, 1, 4, 5, 2],
        "snake_column_flip": [2, 5, 4, 1, 0, 3],
        "local2": [0, 1, 3, 4, 2, 5],
        "atrous2": [0, 2, 1, 3, 5, 4],
        "diagonal": [2, 1, 5, 0, 4, 3],
        "antidiagonal": [0, 1, 3, 2, 4, 5],
        "antidiagonal_reverse": [5, 4, 2, 3, 1, 0],
        "morton": [0, 1, 3, 4, 2, 5],
        "hilbert": [0, 3, 4, 5, 2, 1],
    }
    for name, expected in tables.items():
        assert scan_paths((name,), 2, 3)[0].tolist() == expected, name
    assert scan_paths(SS2D, 2, 3).tolist() == [tables[n] for n in SS2D]
    assert {name.rstrip("237") for name in ORDERS} == set(PATHS)


@every_size
def test_every_named_path_is_a_permutation(height, width):
    names = [order + modifier for order, modifier in itertools.product(ORDERS, MODIFIERS)]
    table = check_paths(scan_paths(names, height, width))
    assert table.dtype == torch.int32
    back = table.gather(1, inverse_paths(table).long())
    assert torch.equal(back, torch.arange(height * width).int().expand_as(table))


@every_size
@pytest.mark.parametrize("order", ORDERS)
def test_modifiers(order, height, width):
    plain = places(order, height, width)
    assert places(f"{order}_reverse", height, width) == plain[::-1]
    assert places(f"{order}_flip", height, width) == [(row, width - 1 - column) for row, column in plain]
    assert places(f"{order}_column", width, height) == [(column, row) for row, column in plain]
    assert places(f"{order}_column_column_reverse_reverse", height, width) == plain


@every_size
def test_orders_follow_their_definitions(height, width):
    rows, columns = range(height), range(width)
    assert places("snake", height, width) == [(r, c) for r in rows for c in (columns[::-1] if r % 2 else columns)]
    for n in (2, 3, 7):
        corners = itertools.product(range(0, height, n), range(0, width, n))
        windows = [[(r, c) for r in rows[top : top + n] for c in columns[left : left + n]] for top, left in corners]
        assert places(f"local{n}", height, width) == sum(windows, [])
    for n in (2, 3):
        grids = [[(r, c) for r in rows[i::n] for c in columns[j::n]] for i in range(n) for j in range(n)]
        assert places(f"atrous{n}", height, width) == sum(grids, [])
    # r - c is constant along a diagonal, r + c along the others.
    diagonals = [[(r, c) for r in rows for c in columns if r - c == d] for d in range(-width, height)]
    assert places("diagonal", height, width) == sum(diagonals, [])
    diagonals = [[(r, c) for r in rows for c in columns if r + c == d] for d in range(height + width)]
    assert places("antidiagonal", height, width) == sum(diagonals, [])

    def quarters(top, left, side):
        if side == 1:
            return [(top, left)] if top < height and left < width else []
        half = side // 2
        return sum((quarters(top + i, left + j, half) for i in (0, half) for j in (0, half)), [])

    assert places("morton", height, width) == quarters(0, 0, 16)


def hilbert_place(step, side):
    """Row and column by the usual loop over the bits of the step (Wikipedia, "Hilbert curve")."""
    row = column = 0
    scale = 1
    while scale < side:
        right, down = step >> 1 & 1, (step ^ step >> 1) & 1
        if not down:
            if right:
                row, column = scale - 1 - row, scale - 1 - column
            row, column = column, row
        column, row = column + scale * right, row + scale * down
        step, scale = step >> 2, scale * 2
    return row, column


@pytest.mark.parametrize("side", [1, 2, 4, 8, 32])
def test_hilbert_of_powers_of_two(side):
    curve = [hilbert_place(step, side) for step in range(side * side)]
    assert places("hilbert", side, side) in (curve, [(column, row) for row, column in curve])


def steps(name, height, width):
    path = torch.tensor(places(name, height, width))
    return path.diff(dim=0).abs()


def test_continuous_paths_step_to_neighbours():
    for height, width in itertools.product(range(1, 19), range(1, 19)):
        for name in ("snake", "snake_column", "snake_flip_reverse"):
            assert bool((steps(name, height, width).sum(1) == 1).all()), (name, height, width)
        longer, shorter = max(height, width), min(height, width)
        moved = steps("hilbert", height, width)
        assert bool((moved <= 1).all())
        diagonal = int((moved.sum(1) == 2).sum())
        assert diagonal <= (longer % 2 == 1 and shorter % 2 == 0), (height, width)


@pytest.mark.parametrize("num_patches, inserted", [(16, (8,)), (49, (24,)), (16, (0, 17)), (9, (3, 6, 9)), (9, (9,))])
def test_inserted_tokens_keep_their_places(num_patches, inserted):
    side = int(num_patches**0.5)
    length = num_patches + len(inserted)
    # In raster order the path is the sequence itself, and its reverse the reverse of the whole.
    table = scan_paths(("raster", "reverse"), side, side, inserted=inserted)
    assert torch.equal(table, torch.stack([torch.arange(length), torch.arange(length).flip(0)]).int())
    assert table.dtype == torch.int32
    patches = [i for i in range(length) if i not in inserted]
    names = [order + modifier for order, modifier in itertools.product(ORDERS, ("", "_column"))]
    plain = scan_paths(names, side, side).tolist()
    backwards = scan_paths([f"{name}_reverse" for name in names], side, side, inserted=inserted).tolist()
    for row, expected, back in zip(
        scan_paths(names, side, side, inserted=inserted).tolist(), plain, backwards, strict=True
    ):
        assert [row[i] for i in inserted] == list(inserted)
        assert [token for token in row if token not in inserted] == [patches[token] for token in expected]
        assert back == row[::-1]


def test_one_name_stands_for_several_directions():
    assert expand_paths("snake", 1) == ("snake",)
    assert expand_paths("snake", 2) == ("snake", "snake_reverse")
    assert expand_paths("snake", 4) == ("snake", "snake_column", "snake_reverse", "snake_column_reverse")
    for count, names in ((2, ("raster", "reverse")), (4, SS2D)):
        assert torch.equal(scan_paths(expand_paths("raster", count), 3, 5), scan_paths(names, 3, 5))
    assert expand_paths(["snake", "local7_column"], 4) == ("snake", "local7_column")


class Table(torch.nn.Module):
    names = ("snake", "local2_column", "morton", "hilbert_reverse")

    def forward(self, x):
        return x, scan_paths(self.names, x.shape[0], x.shape[1], inserted=(3,))


def test_compiled():
    torch._dynamo.reset()
    module = Table()
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    for x in (torch.zeros(4, 6), torch.zeros(5, 7)):  # static, then with symbolic sizes
        assert torch.equal(compiled(x)[1], module(x)[1])


def test_exported():
    module, x = Table(), torch.zeros(5, 7)
    assert torch.equal(torch.export.export(module, (x,)).module()(x)[1], module(x)[1])


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
    b = random_paths(3, 50)
    check_paths(b)
    assert b.dtype == torch.int32 and not torch.equal(b, random_paths(3, 50))
    torch.set_rng_state(before)
    assert torch.equal(b, random_paths(3, 50))


def test_cached_and_usable_after_inference_mode():
    with torch.inference_mode():
        table = scan_paths(("raster", "reverse"), 3, 31)
    assert table is scan_paths(("raster", "reverse"), 3, 31)
    assert not table.is_inference()


def test_bad_paths_are_named():
    with pytest.raises(ValueError, match="unknown scan path 'zigzag'; known are raster, snake, localN.*_flip"):
        scan_paths(("zigzag",), 2, 2)
    with pytest.raises(ValueError, match="unknown scan path 'snake_revers'"):
        expand_paths("snake_revers", 2)
    with pytest.raises(ValueError, match="'local_reverse': local needs a number of at least 1, for example local2"):
        expand_paths(("raster", "local_reverse"), 2)
    with pytest.raises(ValueError, match="'snake3': snake takes no number"):
        expand_paths("snake3", 2)
    with pytest.raises(ValueError, match="paths is empty"):
        expand_paths((), 2)
    with pytest.raises(ValueError, match=r"paths\[1\] is not a permutation of the 3"):
        check_paths(torch.tensor([[0, 1, 2], [0, 2, 2]]))
    with pytest.raises(ValueError, match="not both"):
        random_paths(1, 4, seed=0, generator=torch.Generator())
