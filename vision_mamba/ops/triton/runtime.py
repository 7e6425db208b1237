"""What the Triton kernels share: elementwise functions, gathers along a path, launch helpers."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

LOG2E = tl.constexpr(math.log2(math.e))
# Triton 3.10 no longer fuses a * b + c unless asked to, and 3.9 warns of it; the recurrence lives on it.
OPTIONS = {"enable_fp_fusion": True}


def jit_without(varying: Sequence[str]):
    """``triton.jit`` that does not specialise on those of a kernel's arguments that are named here.

    They change with the length of the sequence, and each new divisibility would be one more compilation.
    """

    def decorate(kernel):
        arguments = kernel.__code__.co_varnames[: kernel.__code__.co_argcount]
        return triton.jit(kernel, do_not_specialize=[name for name in varying if name in arguments])

    return decorate


@triton.jit
def sigmoid(x):
    return 1.0 / (1.0 + tl.exp2(x * -LOG2E))


@triton.jit
def softplus(x):
    """``log(1 + exp(x))`` to float32 rounding, also where it is tiny: no log1p on every device."""
    e = tl.exp2(tl.abs(x) * -LOG2E)
    s = e / (2.0 + e)  # log1p(e) = 2 artanh(s)
    q = s * s
    p = q * (1.0 / 13.0) + 1.0 / 11.0
    p = p * q + 1.0 / 9.0
    p = p * q + 1.0 / 7.0
    p = p * q + 1.0 / 5.0
    p = p * q + 1.0 / 3.0
    p = p * q + 1.0
    return tl.maximum(x, 0.0) + 2.0 * s * p


@triton.jit
def visited(paths, position, end, length):
    """The tokens at these positions of a path; -1 outside [0, end) and for an index outside the image."""
    token = tl.load(paths + position, mask=(position >= 0) & (position < end), other=-1)
    return tl.where((token >= 0) & (token < length), token, -1)


@triton.jit
def load_rows(base, token, stride, column, column_ok):
    """Tile [tokens, columns]; zeros where the token is -1 or the column masked."""
    at = token.to(tl.int64)[:, None] * stride + column[None, :]
    return tl.load(base + at, mask=(token >= 0)[:, None] & column_ok[None, :], other=0.0)


@triton.jit
def store_rows(base, token, stride, column, column_ok, value):
    at = token.to(tl.int64)[:, None] * stride + column[None, :]
    tl.store(base + at, value.to(base.dtype.element_ty), mask=(token >= 0)[:, None] & column_ok[None, :])


def on_device(tensor: Tensor):
    """Triton launches on the current device, wherever the tensors are."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()


def multiprocessors(device: torch.device) -> int:
    """How many of them the device has; 1 where that is not known."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def dense(tensor: Tensor) -> Tensor:
    """The kernels assume a dense last axis, and nothing about the others."""
    return tensor if tensor.stride(-1) == 1 or tensor.shape[-1] == 1 else tensor.contiguous()


def alignment(*strides: int) -> int:
    """The largest power of two up to 16 that divides all strides.

    A compile-time hint, so that rows are loaded in wide words although the strides, which change with
    the length, are not specialised.
    """
    return math.gcd(16, *strides)


def check_dtypes(**tensors: Tensor | None) -> None:
    for name, tensor in tensors.items():
        if tensor is not None and tensor.dtype not in (torch.float32, torch.bfloat16, torch.float16):
            raise RuntimeError(
                f"backend 'triton' computes in float32, but {name} is {tensor.dtype}; "
                "convert it to float32, bfloat16 or float16, or use backend='reference'"
            )
