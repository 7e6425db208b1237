"""What the Triton kernels share: elementwise functions, gathers along a path, launch helpers."""

from __future__ import annotations

import concurrent.futures
import contextlib
import functools
import math
import operator
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

LOG2E = tl.constexpr(math.log2(math.e))
# Triton 3.10 no longer fuses a * b + c unless asked to, and 3.9 warns of it; the recurrence lives on it.
OPTIONS = {"enable_fp_fusion": True}
# Gluon, Triton with layouts chosen by hand, as it is since Triton 3.6; for warps of 32 lanes.
HAS_GLUON = (
    tuple(int(part) for part in triton.__version__.split(".")[:2]) >= (3, 6)
    and not triton.knobs.runtime.interpret
    and torch.version.hip is None
)


# Of the scan. For the rows of states (h_n, border_n) it matters that Triton does not know them aligned: it would load
# them four channels a thread, keep that layout for the state in the loop, and pass the state through shared memory at
# every step.
VARYING = (
    "batch length num_paths loop_paths groups span num_spans saves u_b u_l u_k delta_b delta_l delta_k z_b z_l z_k "
    "y_b y_l y_k dy_b dy_l dy_k du_b du_l du_k dz_b dz_l dz_k B_b B_l B_k B_g C_b C_l C_k C_g "
    "A_k A_d A_n D_k bias_k paths_k h_b h_s h_k h_n border_n border_size"
).split()


def jit_without(varying: Sequence[str], jit=triton.jit):
    """``jit`` (or Gluon's) that does not specialise on those of a kernel's arguments that are named here.

    They change with the length of the sequence, and each new divisibility would be one more compilation.
    """

    def decorate(kernel):
        arguments = kernel.__code__.co_varnames[: kernel.__code__.co_argcount]
        return jit(kernel, do_not_specialize=[name for name in varying if name in arguments])

    return decorate


@triton.jit
def sigmoid(x):
    # The square of a reciprocal square root, which is one instruction; a division is ten.
    r = tl.rsqrt(1.0 + tl.exp2(x * -LOG2E))
    return r * r


@triton.jit
def log1p_below_one(e, BITS: tl.constexpr):
    """``log(1 + e)`` for e in [0, 1] to 2e-7 of itself, also where it is tiny: no log1p on every device.

    To 6e-5 for numbers of 16 ``BITS``, which are rounded to 5e-4 and more.
    """
    if BITS == 16:
        p = e * 0.04134729504585266 - 0.15742719173431396
        p = p * e + 0.30630090832710266
        p = p * e - 0.4969778060913086
        p = p * e + 0.9999432563781738
    else:
        p = e * 0.0052326880395412445 - 0.029505213722586632
        p = p * e + 0.07822591066360474
        p = p * e - 0.13663242757320404
        p = p * e + 0.19106005132198334
        p = p * e - 0.2484298199415207
        p = p * e + 0.3331909775733948
        p = p * e - 0.4999949336051941
        p = p * e + 0.9999999403953552
    return p * e


@triton.jit
def softplus(x, BITS: tl.constexpr):
    """``log(1 + exp(x))`` in float32, to the rounding of what x was made from, which has so many ``BITS``."""
    return tl.maximum(x, 0.0) + log1p_below_one(tl.exp2(tl.abs(x) * -LOG2E), BITS)


@triton.jit
def step_of(tile, index, step: tl.constexpr):
    """tile[step] along the first axis, which is kept: exact, and free where that axis lies in a thread."""
    # A sum of integers, not of floats: the compiler may drop the zeros it adds.
    bits = tl.where(index == step, tile.to(tl.int32, bitcast=True), 0)
    return tl.sum(bits, axis=0, keep_dims=True).to(tl.float32, bitcast=True)


@triton.jit
def locate(num_paths, groups, blocks, num_spans, LOOP_PATHS: tl.constexpr):
    """image, span, (first) path, group, and which of the ``blocks`` of channels of the group this program has."""
    pid = tl.program_id(0)
    block = pid % blocks
    pid = pid // blocks
    group = pid % groups
    pid = pid // groups
    k = 0
    if not LOOP_PATHS:
        k = pid % num_paths
        pid = pid // num_paths
    return (pid // num_spans).to(tl.int64), pid % num_spans, k, group, block


@triton.jit
def visited(paths, position, end, length):
    """The tokens at these positions of a path; -1 outside [0, end) and for an index outside the image."""
    token = tl.load(paths + position, mask=(position >= 0) & (position < end), other=-1)
    return tl.where((token >= 0) & (token < length), token, -1)


@triton.jit
def load_rows(base, token, stride, column, column_ok):
    """Tile [tokens, columns]; zeros where the token is -1 or the column masked.

    Offsets are integers of the wider type of token and stride: 64 bits unless all fit in 32.
    """
    at = token[:, None] * stride + column[None, :]
    return tl.load(base + at, mask=(token >= 0)[:, None] & column_ok[None, :], other=0.0)


@triton.jit
def store_rows(base, token, stride, column, column_ok, value):
    at = token[:, None] * stride + column[None, :]
    tl.store(base + at, value.to(base.dtype.element_ty), mask=(token >= 0)[:, None] & column_ok[None, :])


def on_device(tensor: Tensor):
    """Triton launches on the current device, wherever the tensors are."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()


# Triton's own functions of these names serve kernels too, and take 5 us a call on the host.
def cdiv(number: int, by: int) -> int:
    return -(-number // by)


def power_of_2(number: int) -> int:
    """The least one that is not smaller."""
    return 1 << (number - 1).bit_length()


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """How many of them the device has; 1 where that is not known."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


@functools.lru_cache(maxsize=1024)
def segment_steps(lines: int, length: int, together: int, walks: int, wanted: int, unrolled: int) -> int:
    """Steps of the segments of ``lines`` of a length, so many ``together`` in a program, each walked ``walks`` times.

    Few long ones look beyond their ends seldom; short ones fill the device, which has room for so many programs as are
    ``wanted``, and leave no program to be waited for.
    """

    def cost(steps: int) -> int:
        waves = cdiv(cdiv(lines * cdiv(length, steps), together) * walks, wanted)
        return waves * (steps + 6)

    return min(range(unrolled, 129, unrolled), key=cost)


def dense(tensor: Tensor) -> Tensor:
    """The kernels assume a dense last axis, and nothing about the others."""
    return tensor if tensor.stride(-1) == 1 or tensor.shape[-1] == 1 else tensor.contiguous()


def as_rows(tensor: Tensor) -> Tensor:
    """(..., D) as (rows, D) with a dense last axis: a view where the leading axes have one step."""
    return dense(tensor.reshape(-1, tensor.shape[-1]))


def alignment(*strides: int) -> int:
    """The largest power of two up to 16 that divides all strides.

    A compile-time hint, so that rows are loaded in wide words although the strides, which change with
    the length, are not specialised.
    """
    return math.gcd(16, *strides)


def new_by_path(
    u: Tensor, batch: int, length: int, num_paths: int, dim: int, merge: bool, dtype: torch.dtype | None = None
) -> Tensor:
    """New (batch, L, K, D), like ``u`` unless a dtype is given; each path's part dense where they will be added."""
    if merge and num_paths > 1:
        return u.new_empty(num_paths, batch, length, dim, dtype=dtype).permute(1, 2, 0, 3)
    return u.new_empty(batch, length, num_paths, dim, dtype=dtype)


def offset_type(length: int, *strides: int) -> tl.dtype:
    """The integers for offsets in an image: 64 bits cost several instructions a row, and few images need them."""
    return tl.int32 if max(strides) * length < 2**31 else tl.int64


@functools.cache
def _wanted(kernel) -> operator.itemgetter:
    """From a dictionary with more than them, a kernel's arguments in its order."""
    return operator.itemgetter(*kernel.arg_names)


def _options(warps: int, registers: int | None = None) -> dict:
    options = OPTIONS | {"num_warps": warps}
    if registers is not None and torch.version.hip is None:  # an option of Triton's NVIDIA backend alone
        options["maxnreg"] = registers
    return options


def launch(kernel, grid: tuple[int, ...], arguments: dict, warps: int, registers: int | None = None) -> None:
    """``kernel`` with those of the ``arguments`` that it has, and at most so many ``registers`` a thread."""
    kernel[grid](*_wanted(kernel)(arguments), **_options(warps, registers))


@functools.cache
def _deciding(kernel) -> list[str]:
    """The arguments for whose values a kernel is compiled, or for their types."""
    return [name for name in kernel.arg_names if name not in VARYING]


_compiled: set[tuple] = set()


def compile_together(launches: Sequence[tuple], device: torch.device) -> None:
    """Before the first of such :func:`launch` calls: all their kernels at once, where one by one takes seconds."""
    if device.type in ("cpu", "meta") or not hasattr(triton, "AsyncCompileMode"):
        return
    kind: list = [device]
    for kernel, _, arguments, *options in launches:
        values = [arguments.get(name) for name in _deciding(kernel)]
        kind += (id(kernel), *options, *[value.dtype if isinstance(value, Tensor) else value for value in values])
    if tuple(kind) in _compiled:
        return
    # Errors are ignored here: the launch compiles again, and raises them.
    with (
        concurrent.futures.ThreadPoolExecutor(len(launches)) as threads,
        triton.AsyncCompileMode(threads, ignore_errors=True),
    ):
        for kernel, grid, arguments, *options in reversed(launches):  # the last ones are the largest
            kernel.run(*_wanted(kernel)(arguments), grid=grid, warmup=True, **_options(*options))
    _compiled.add(tuple(kind))


def check_dtypes(**tensors: Tensor | None) -> None:
    for name, tensor in tensors.items():
        if tensor is not None and tensor.dtype not in (torch.float32, torch.bfloat16, torch.float16):
            raise RuntimeError(
                f"backend 'triton' computes in float32, but {name} is {tensor.dtype}; "
                "convert it to float32, bfloat16 or float16, or use backend='reference'"
            )
