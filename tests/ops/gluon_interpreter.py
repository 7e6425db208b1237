"""Gluon kernels in Triton's interpreter, which knows nothing of Gluon.

A tile of Gluon is a tile of Triton with a layout, and a layout says which lane holds a number, not what the number is:
without layouts the kernels are ordinary Triton ones, but for shared memory, which is a numpy array here. It starts as
NaN, and a row outside it is an error. What a compiler says of layouts, and races between warps, are not seen.
"""

from __future__ import annotations

import functools
import importlib
import sys
import types
from dataclasses import dataclass

import numpy as np
import pytest
import triton
import triton.experimental
import triton.language as tl
from triton.runtime.interpreter import TensorHandle

KERNELS = "vision_mamba.ops.triton.scan_gluon"


def emulate(monkeypatch, scan) -> None:
    """Until the test ends, ``scan`` (ops/triton/selective_scan.py) runs its Gluon kernels, interpreted."""
    kernels = _kernels()
    monkeypatch.setitem(sys.modules, KERNELS, kernels)
    monkeypatch.setattr(sys.modules["vision_mamba.ops.triton"], "scan_gluon", kernels, raising=False)
    monkeypatch.setattr(scan, "HAS_GLUON", True)
    monkeypatch.setattr(scan, "_uses_gluon", lambda num_states, device: scan._in_gluon(num_states))


@functools.cache
def _kernels() -> types.ModuleType:
    """One for all tests: the interpreter rewrites the functions of a new one."""
    gluon = types.ModuleType("triton.experimental.gluon")
    gluon.jit = _jit
    gluon.constexpr_function = _constexpr_function
    gluon.language = types.ModuleType("triton.experimental.gluon.language")
    vars(gluon.language).update(_language())
    with pytest.MonkeyPatch.context() as patch:  # Triton itself wants the real ones again
        patch.setattr(triton.experimental, "gluon", gluon, raising=False)
        patch.setitem(sys.modules, gluon.__name__, gluon)
        patch.setitem(sys.modules, gluon.language.__name__, gluon.language)
        patch.delitem(sys.modules, KERNELS, raising=False)
        kernels = importlib.import_module(KERNELS)
        del sys.modules[KERNELS]
    kernels.tl = tl  # the interpreter looks for Triton's language among a kernel's globals
    return kernels


def _jit(kernel, **options):
    interpreted = triton.jit(kernel, **options)
    annotations = interpreted.rewrite().__annotations__
    annotations.update({name: "constexpr" for name, kind in annotations.items() if kind == "gl.constexpr"})
    return interpreted


def _constexpr_function(function):
    return lambda *given: function(*(item.value if isinstance(item, tl.constexpr) else item for item in given))


def _language() -> dict:
    def unchanged(name):
        # Looked up at each call: the interpreter replaces Triton's functions when a kernel starts.
        return lambda *given, **named: getattr(tl, name)(*given, **named)

    names = (
        "abs broadcast cast exp2 join load max maximum minimum multiple_of permute reshape rsqrt split store sum where"
    ).split()
    return {name: unchanged(name) for name in names} | {
        "constexpr": tl.constexpr,
        "float16": tl.float16,
        "int16": tl.int16,
        "int32": tl.int32,
        "float32": tl.float32,
        "int64": tl.int64,
        "uint32": tl.uint32,
        "static_range": lambda *bounds: range(*_plain(bounds)),
        "BlockedLayout": _Blocked,
        "DistributedLinearLayout": lambda registers, lanes, warps, blocks, shape: types.SimpleNamespace(shape=shape),
        "PaddedSharedLayout": types.SimpleNamespace(with_identity_for=lambda *_: None),
        "SharedLinearLayout": lambda *_: None,
        "SliceLayout": lambda *_: None,
        "SwizzledSharedLayout": lambda *_: None,
        "arange": lambda start, end, layout: tl.arange(_plain(start), _plain(end)),
        "zeros": lambda shape, dtype, layout: tl.zeros(_plain(shape), dtype),
        "full": lambda shape, value, dtype, layout: tl.full(_plain(shape), value, dtype),
        "convert_layout": lambda tile, layout, assert_trivial=False: tile,
        "allocate_shared_memory": lambda dtype, shape, layout: Shared(
            np.full(_plain(shape), np.nan, np.float32), dtype
        ),
    }


def _plain(value):
    """Without Triton's wrappers: an integer, or a list of them."""
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, tl.constexpr):
        value = value.value
    return int(value.handle.data.item()) if isinstance(value, tl.tensor) else int(value)


class _Blocked:
    def __init__(self, size_per_thread, threads_per_warp, warps_per_cta, order):
        self.size_per_thread, self.threads_per_warp = _plain(size_per_thread), _plain(threads_per_warp)
        self.warps_per_cta = _plain(warps_per_cta)


@dataclass
class Shared:
    """Of Gluon's shared memory, what the kernels use: views, whole loads and whole stores."""

    data: np.ndarray
    dtype: tl.dtype

    @property
    def shape(self):
        return list(self.data.shape)

    def index(self, at):
        return Shared(self.data[_plain(at)], self.dtype)

    def slice(self, start, length, dim):
        start, length = _plain(start), _plain(length)
        assert 0 <= start and start + length <= self.data.shape[dim], (start, length, dim, self.shape)
        part = [slice(None)] * self.data.ndim
        part[dim] = slice(start, start + length)
        return Shared(self.data[tuple(part)], self.dtype)

    def permute(self, order):
        return Shared(self.data.transpose(_plain(order)), self.dtype)

    def reshape(self, shape):
        view = self.data.view()
        view.shape = tuple(_plain(shape))  # an error where it would be a copy
        return Shared(view, self.dtype)

    def load(self, layout):
        return tl.tensor(TensorHandle(self.data.copy(), self.dtype), tl.block_type(self.dtype, self.shape))

    def store(self, tile):
        value = tile.handle.data
        assert list(value.shape) == self.shape, (value.shape, self.shape)
        self.data[...] = value
