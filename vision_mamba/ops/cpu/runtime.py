"""What the CPU kernels share: vectorisable exp, tensors' memory, threads."""

from __future__ import annotations

import ctypes
import functools
import itertools
import math
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait

import numba
import numpy as np
import torch
from llvmlite import ir
from numba.core import cgutils, types
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


# Between two layers more memory is freed than glibc keeps at the top of its heap, and each page of it faults when the
# next layer wants it: 19,000 a pass of Vim-Ti over 8 images. What glibc keeps grows to twice the largest block that it
# has mapped and got back, of 32 MB at most; so it gets one, which nobody has written to. Nothing to other allocators.
torch.empty(31 * 2**20, dtype=torch.uint8)


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


@intrinsic
def _pointer(typing_context, address, number):
    return types.CPointer(number)(types.intp, number), lambda context, builder, signature, values: builder.inttoptr(
        values[0], context.get_value_type(signature.return_type)
    )


ZEROS = {torch.float32: np.float32(0), torch.float64: np.float64(0)}  # say a kernel in what it computes
ANY = (1 << 48,)  # the shape of a row whose end nobody needs to know


@numba.njit(**KERNEL)
def memory(address, number, shape):
    """What lies at an address, as a dense array of numbers like this one."""
    return numba.carray(_pointer(address, number), shape)


def dense(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """In this dtype, with a dense last axis; other axes may be broadcast or sliced.

    Kernels take addresses, which the caller's tensor has to outlive: several times faster than an array of numpy's for
    each, and small models wait for Python.
    """
    if tensor.dtype != dtype:
        tensor = tensor.to(dtype)
    return tensor if tensor.stride(-1) == 1 or tensor.shape[-1] == 1 else tensor.contiguous()


def address(tensor: Tensor | None) -> int:
    """Of the first element; 0 for None."""
    return 0 if tensor is None else tensor.data_ptr()


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


def check_paths(paths: Tensor) -> Tensor:
    """(K, L), dense and int32 as kernels read it; an index outside the image would be a write to foreign memory."""
    paths = paths.to(torch.int32).contiguous()
    bad = _first_bad_path(paths.numpy())
    if bad >= 0:
        raise ValueError(f"paths[{bad}] is not a permutation of the {paths.shape[1]} token indices")
    return paths


@functools.cache
def _openmp() -> int | None:
    """Where ``GOMP_parallel`` of the OpenMP runtime (GNU's) is that torch has loaded, or None.

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
    return ctypes.cast(ctypes.CDLL(chosen[0]).GOMP_parallel, ctypes.c_void_p).value


@functools.cache
def _pool(process: int, threads: int) -> ThreadPoolExecutor:
    """Where torch has another runtime: threads of our own. A forked process (another ``process``) gets new ones."""
    return ThreadPoolExecutor(threads, thread_name_prefix="vision_mamba")


@intrinsic
def on_team(typing_context, openmp, threads, start, stop, args):
    """For a kernel to call with what it got: itself, a part of the range and one thread a call, on so many threads.

    Machine code from end to end: a thread that came in through Python would first
    wait, asleep, for Python's lock. It is the kernel's own function that the threads call, for another one would be
    compiled once more where it is linked.
    """
    kinds = types.intp, types.intp, types.intp, types.intp, args
    return types.void(*kinds), lambda context, builder, signature, values: _emit_team(context, builder, kinds, *values)


def _emit_team(context, builder, kinds, openmp, threads, start, stop, args):
    word, count, place = start.type, ir.IntType(32), ir.IntType(8).as_pointer()
    zero, one = ir.Constant(word, 0), ir.Constant(word, 1)
    # For the threads to see: parts taken, parts failed, how many there are, their range, the arguments.
    shared = ir.LiteralStructType([word, word, word, word, word, args.type])
    data = cgutils.alloca_once(builder, shared)
    for index, value in enumerate((zero, zero, threads, start, stop, args)):
        builder.store(value, cgutils.gep_inbounds(builder, data, 0, index))

    body_kind = ir.FunctionType(ir.VoidType(), [place])
    body = ir.Function(builder.module, body_kind, builder.module.get_unique_name("parts"))
    body.linkage = "internal"
    inner = ir.IRBuilder(body.append_basic_block())
    fields = inner.bitcast(body.args[0], shared.as_pointer())
    taken, failed, *fields = [cgutils.gep_inbounds(inner, fields, 0, index) for index in range(6)]
    parts, first, end, given = [inner.load(field) for field in fields]
    again, work, done = [body.append_basic_block() for _ in range(3)]
    inner.branch(again)
    # Whoever comes takes the next part: the runtime may give fewer threads than asked for.
    inner.position_at_end(again)
    part = inner.atomic_rmw("add", taken, one, "monotonic")
    inner.cbranch(inner.icmp_signed("<", part, parts), work, done)
    inner.position_at_end(work)
    bounds = [
        inner.add(first, inner.sdiv(inner.mul(inner.sub(end, first), number), parts))
        for number in (part, inner.add(part, one))
    ]
    status, _ = context.call_conv.call_function(inner, builder.function, types.none, kinds, [zero, one, *bounds, given])
    inner.atomic_rmw("add", failed, inner.zext(status.is_error, word), "monotonic")
    inner.branch(again)
    inner.position_at_end(done)
    inner.ret_void()

    parallel = ir.FunctionType(ir.VoidType(), [body_kind.as_pointer(), place, count, count]).as_pointer()
    number = builder.trunc(threads, count)
    builder.call(
        builder.inttoptr(openmp, parallel), [body, builder.bitcast(data, place), number, ir.Constant(count, 0)]
    )
    failed = cgutils.gep_inbounds(builder, data, 0, 1)
    with cgutils.if_unlikely(builder, builder.icmp_signed("!=", builder.load(failed), zero)):
        context.call_conv.return_user_exc(builder, MemoryError, ("a kernel found no memory for its work",))
    return context.get_dummy_value()


_WORTH = 40_000  # nanoseconds of work that are worth another thread


def run_tasks(kernel: Callable, num_tasks: int, nanoseconds: float, *args) -> None:
    """``kernel(openmp, threads, start, stop, args)``: ``num_tasks`` on up to ``torch.get_num_threads()`` threads.

    The kernels release the GIL. Several Python threads may call at once, which numba's own layer does not allow.

    Args:
        nanoseconds: about what one thread takes for all of it; short work is not shared out.
    """
    threads = min(torch.get_num_threads(), num_tasks, max(int(nanoseconds / _WORTH), 1))
    openmp = _openmp() if threads > 1 else 0
    if openmp is not None:
        kernel(openmp, threads, 0, num_tasks, args)
        return
    bounds = [num_tasks * i // threads for i in range(threads + 1)]
    futures = [
        _pool(os.getpid(), threads).submit(kernel, 0, 1, start, stop, args)
        for start, stop in itertools.pairwise(bounds)
    ]
    wait(futures)  # all of them, before an error lets the caller free what the others still write to
    for future in futures:
        future.result()
