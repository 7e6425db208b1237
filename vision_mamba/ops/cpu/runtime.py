"""What the CPU kernels share: vectorisable exp, tensor views, a thread pool."""

from __future__ import annotations

import ctypes
import functools
import itertools
import math
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numba
import numpy as np
import torch
from llvmlite import ir
from numba.extending import intrinsic, overload
from torch import Tensor

# Sums may be reordered and a division by zero does not raise: both let LLVM vectorise the loops.
# NaN and Inf keep their meaning.
KERNEL = {"nogil": True, "cache": True, "error_model": "numpy", "fastmath": {"reassoc", "contract", "nsz"}}
# `reassoc` would cancel the rounding trick of exp2; set explicitly, for numba passes a caller's flags on.
_ELEMENTWISE = {"error_model": "numpy", "fastmath": {"contract"}}
LOG2E = math.log2(math.e)
# 2**x for x in [-0.5, 0.5], highest power first: least largest relative error with p(0) = 1, 9e-8.
EXP2 = (0.001326472724711154, 0.009671512688150646, 0.05550733743574232, 0.24022242084635143, 0.6931469775987164, 1.0)


@intrinsic
def _float_bits(typingctx, x):
    return numba.int32(numba.float32), lambda context, builder, signature, args: builder.bitcast(
        args[0], ir.IntType(32)
    )


@intrinsic
def _bits_float(typingctx, bits):
    return numba.float32(numba.int32), lambda context, builder, signature, args: builder.bitcast(
        args[0], ir.FloatType()
    )


@numba.njit(**_ELEMENTWISE)
def _exp2_float32(x):
    """``2 ** x`` within 2e-7, in a form that vectorises."""
    f32 = np.float32
    if x < f32(-126.0):  # flush to about 1e-38: no denormals
        x = f32(-126.0)
    if x > f32(128.0):  # becomes inf below
        x = f32(128.0)
    # Adding 1.5 * 2**23 rounds to the nearest integer, which then stands in the low bits.
    shifted = x + f32(12582912.0)
    whole = _float_bits(shifted) - np.int32(0x4B400000)
    part = x - (shifted - f32(12582912.0))
    p = f32(EXP2[0])
    p = p * part + f32(EXP2[1])
    p = p * part + f32(EXP2[2])
    p = p * part + f32(EXP2[3])
    p = p * part + f32(EXP2[4])
    p = p * part + f32(EXP2[5])
    return p * _bits_float(np.int32((whole + np.int32(127)) << np.int32(23)))


def sigmoid(x):
    """``1 / (1 + exp(-x))``."""
    return 1.0 / (1.0 + math.exp(-x))


def _sigmoid_float32(x):
    one = np.float32(1.0)
    return one / (one + _exp2_float32(x * np.float32(-LOG2E)))


@overload(sigmoid, jit_options=_ELEMENTWISE)
def _sigmoid(x):
    return _sigmoid_float32 if x == numba.float32 else lambda x: 1.0 / (1.0 + math.exp(-x))


def softplus(x):
    """``log(1 + exp(x))``."""
    return max(x, 0.0) + math.log1p(math.exp(-abs(x)))


def _softplus_float32(x):
    # log(1 + e), e = exp(-|x|) <= 1: a polynomial, to 2e-7 of itself also where e is tiny, without a division.
    f32 = np.float32
    e = _exp2_float32(abs(x) * f32(-LOG2E))
    p = e * f32(0.0052326880395412445) - f32(0.029505213722586632)
    p = p * e + f32(0.07822591066360474)
    p = p * e - f32(0.13663242757320404)
    p = p * e + f32(0.19106005132198334)
    p = p * e - f32(0.2484298199415207)
    p = p * e + f32(0.3331909775733948)
    p = p * e - f32(0.4999949336051941)
    p = p * e + f32(0.9999999403953552)
    return (x if x > f32(0.0) else f32(0.0)) + p * e


@overload(softplus, jit_options=_ELEMENTWISE)
def _softplus(x):
    if x == numba.float32:
        return _softplus_float32
    return lambda x: max(x, 0.0) + math.log1p(math.exp(-abs(x)))


def flat(tensor: Tensor) -> tuple[np.ndarray, tuple[int, ...]]:
    """The tensor's memory as a 1-D array from its first element on, and its strides in elements.

    Broadcast (stride 0) and sliced tensors need no copy; only the last axis must be dense.
    """
    tensor = tensor.detach()
    if tensor.stride(-1) != 1 and tensor.shape[-1] != 1:
        tensor = tensor.contiguous()
    strides = tensor.stride()
    span = 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, strides, strict=True))
    return tensor.as_strided((span,), (1,)).numpy(), strides


@numba.njit(cache=True)
def _first_bad_path(paths):
    num_paths, length = paths.shape
    seen = np.empty(length, np.bool_)
    for k in range(num_paths):
        seen[:] = False
        for t in range(length):
            token = paths[k, t]
            if token < 0 or token >= length or seen[token]:
                return k
            seen[token] = True
    return -1


def check_paths(paths: Tensor) -> np.ndarray:
    """(K, L) int32 as an array; an index outside the image would be a write to foreign memory."""
    array = paths.contiguous().numpy()
    bad = _first_bad_path(array)
    if bad >= 0:
        raise ValueError(f"paths[{bad}] is not a permutation of the {array.shape[1]} token indices")
    return array


_Body = ctypes.CFUNCTYPE(None, ctypes.c_void_p)


@functools.cache
def _openmp() -> ctypes.CDLL | None:
    """The OpenMP runtime (GNU's) that torch has loaded, or None.

    torch's idle workers spin for milliseconds after each operation. Threads of our own would share the cores with
    them (Vim-Ti took a third longer on two cores), so the kernels run on those very workers.
    """
    try:
        with open("/proc/self/maps") as maps:
            libraries = {line.split()[-1] for line in maps if "/libgomp" in line}
    except OSError:
        return None
    library = os.path.join(os.path.dirname(torch.__file__), "lib", "libgomp")
    of_torch = [name for name in libraries if name.startswith(library) or "torch.libs" in name]
    chosen = of_torch or (sorted(libraries) if len(libraries) == 1 else [])
    if not chosen:
        return None
    openmp = ctypes.CDLL(chosen[0])
    openmp.GOMP_parallel.argtypes = [_Body, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint]
    openmp.GOMP_parallel.restype = None
    return openmp


@functools.cache
def _pool(process: int, threads: int) -> ThreadPoolExecutor:
    """Where torch has another runtime: threads of our own. A forked process (another ``process``) gets new ones."""
    return ThreadPoolExecutor(threads, thread_name_prefix="vision_mamba")


# A second thread gets its part some 80 us after the first: it waits for Python's lock, as long as it takes to unpack a
# kernel's arguments.
_WORTH = 150_000


def run_tasks(kernel: Callable, num_tasks: int, nanoseconds: float, *args) -> None:
    """Call ``kernel(start, stop, *args)`` over ``range(num_tasks)`` on up to ``torch.get_num_threads()`` threads.

    The kernels release the GIL. Several Python threads may call at once, which numba's own layer does not allow.

    Args:
        nanoseconds: about what one thread takes for all of it; short work is not shared out.
    """
    threads = min(torch.get_num_threads(), num_tasks, max(int(nanoseconds / _WORTH), 1))
    if threads <= 1:
        kernel(0, num_tasks, *args)
        return
    bounds = [num_tasks * i // threads for i in range(threads + 1)]
    openmp = _openmp()
    if openmp is None:
        futures = [
            _pool(os.getpid(), threads).submit(kernel, start, stop, *args) for start, stop in itertools.pairwise(bounds)
        ]
        for future in futures:
            future.result()
        return

    parts, errors = itertools.count(), []

    def body(_) -> None:
        # Whoever comes takes the next part: the runtime may give fewer threads than asked for.
        while (part := next(parts)) < threads:
            try:
                kernel(bounds[part], bounds[part + 1], *args)
            except BaseException as error:  # must not cross the C frame
                errors.append(error)

    openmp.GOMP_parallel(_Body(body), None, threads, 0)
    if errors:
        raise errors[0]
