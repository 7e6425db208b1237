"""Sums of the rows of a matrix in Triton, as the gradient of a bias is one."""

from __future__ import annotations

import torch
import triton.language as tl
from torch import Tensor

from .runtime import (
    alignment,
    as_rows,
    cdiv,
    check_dtypes,
    jit_without,
    launch,
    load_rows,
    multiprocessors,
    on_device,
    power_of_2,
)

_TILE = 4096  # numbers a program reads at once
_PROGRAMS = 8  # a multiprocessor
_FEW = 16  # columns a program, where there are few rows
_STAGES = tl.constexpr(3)  # of rows on their way, and those that are added
_jit = jit_without(("rows", "span", "x_l"))


@_jit
def _column_sums_kernel(
    x, sums, rows, span, dim, x_l, ROWS: tl.constexpr, BLOCK: tl.constexpr, ALIGN: tl.constexpr
):  # fmt: skip
    """``span`` rows and a block of columns a program."""
    pid = tl.program_id(0).to(tl.int64)
    c = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    c_ok = c < dim
    x_l = tl.multiple_of(x_l.to(tl.int64), ALIGN)
    total = tl.zeros([ROWS, BLOCK], tl.float32)
    for start in tl.range(0, span, ROWS, num_stages=_STAGES):
        row = pid * span + start + tl.arange(0, ROWS)
        row = tl.where(row < rows, row, -1)
        total += load_rows(x, row, x_l, c, c_ok).to(tl.float32)
    tl.store(sums + pid * dim + c, tl.sum(total, axis=0), mask=c_ok)


def _launch(x: Tensor, sums: Tensor, block: int) -> Tensor:
    """Rows of ``x`` by programs of so many columns, each of which writes a row of ``sums``."""
    rows, dim = x.shape
    programs, tile = len(sums), {"ROWS": _TILE // block, "BLOCK": block}
    span = cdiv(rows, programs * tile["ROWS"]) * tile["ROWS"]
    given = dict(x=x, sums=sums, rows=rows, span=span, dim=dim, x_l=x.stride(0), ALIGN=alignment(dim, x.stride(0)))
    with on_device(x):
        launch(_column_sums_kernel, (programs, cdiv(dim, block)), given | tile, 4)
    return sums


def sum_of_parts(parts: Tensor) -> Tensor:
    """The sum of what each program found, (programs, ...) -> (...), in an order that the shape alone decides.

    So bits are equal every time, which atomics would not give. PyTorch's sum of so few columns takes longer.
    """
    if len(parts) == 0 or parts.numel() == 0:
        return parts.sum(0)
    return _launch(parts.flatten(1), parts.new_empty(1, parts[0].numel()), _FEW).view(parts.shape[1:])


def column_sums(x: Tensor) -> Tensor:
    """(..., D) -> (D,) in float32."""
    check_dtypes(x=x)
    x = as_rows(x)
    rows, dim = x.shape
    block = min(power_of_2(dim), 128)
    programs = min(cdiv(rows, _TILE // block), cdiv(multiprocessors(x.device) * _PROGRAMS, cdiv(dim, block)))
    sums = x.new_empty(programs, dim, dtype=torch.float32)
    return sum_of_parts(_launch(x, sums, block) if programs > 0 else sums)
