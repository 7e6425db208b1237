"""One step of the scan for a block of channels and all their states, forward and backward, written as vectors.

LLVM vectorises a loop over channels, but one state at a time: step sizes, inputs and sums then go through memory for
each of the states, and it checks at most eight pairs of rows for overlap. Here :data:`LANES` channels stay in registers
while their states pass. LLVM cuts these vectors to what the processor has, so no processor needs a form of its own.

Rows are one-dimensional arrays of channels, tiles (N, channels); both whole vectors long, ``b`` and ``c`` hold N.
Lanes that stand for no channel are computed too: where sums over channels are taken, their ``dtu`` and ``dout`` have to
be zero and everything else finite.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numba
import numpy as np
from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import intrinsic

from .runtime import EXP2, KERNEL

LANES = 16
_TOGETHER = 4  # states of the backward step that share what is read of a channel
_FUSED = ("contract",)
# numba puts a function's flags on all its instructions, and `reassoc` would cancel the rounding trick of exp2.
_WALK = KERNEL | {"fastmath": set(_FUSED)}


class _Step:
    """Emits instructions on vectors of channels of the intrinsic's arguments, by their names; one is the tile ``a``."""

    def __init__(self, context: Any, builder: ir.IRBuilder, kinds: dict[str, Any], values: Any) -> None:
        self.builder = builder
        self.scalar = context.get_data_type(kinds["a"].dtype)
        self.vector = ir.VectorType(self.scalar, LANES)
        self.align = 8 if isinstance(self.scalar, ir.DoubleType) else 4  # of a number: rows start anywhere
        views = {
            name: context.make_array(kind)(context, builder, value)
            for (name, kind), value in zip(kinds.items(), values, strict=True)
            if not isinstance(kind, types.NoneType)
        }
        self.data = {name: view.data for name, view in views.items()}
        self.states, self.channels = cgutils.unpack_tuple(builder, views["a"].shape)
        self.index = self.states.type

    def constant(self, number: float) -> ir.Constant:
        return ir.Constant(self.vector, [number] * LANES)

    def place(self, n: ir.Value, i: ir.Value) -> ir.Value:
        """Of state ``n`` and channel ``i`` in a tile."""
        return self.builder.add(self.builder.mul(n, self.channels), i)

    def load(self, name: str, at: ir.Value) -> ir.Value:
        loaded = self.builder.load(self._pointer(name, at))
        loaded.align = self.align
        return loaded

    def store(self, value: ir.Value, name: str, at: ir.Value) -> None:
        self.builder.store(value, self._pointer(name, at)).align = self.align

    def _pointer(self, name: str, at: ir.Value) -> ir.Value:
        return self.builder.bitcast(self.builder.gep(self.data[name], [at]), self.vector.as_pointer())

    def spread(self, name: str, at: ir.Value) -> ir.Value:
        """One number in all lanes."""
        number = self.builder.load(self.builder.gep(self.data[name], [at]))
        nothing = ir.Constant(self.vector, ir.Undefined)
        first = self.builder.insert_element(nothing, number, ir.Constant(ir.IntType(32), 0))
        return self._shuffle(first, [0] * LANES)

    def _shuffle(self, x: ir.Value, lanes: list[int]) -> ir.Value:
        chosen = ir.Constant(ir.VectorType(ir.IntType(32), LANES), lanes)
        return self.builder.shuffle_vector(x, ir.Constant(self.vector, ir.Undefined), chosen)

    def sum_lanes(self, x: ir.Value) -> ir.Value:
        width = LANES
        while width > 1:
            width //= 2
            x = self.add(x, self._shuffle(x, [(lane + width) % LANES for lane in range(LANES)]))
        return self.builder.extract_element(x, ir.Constant(ir.IntType(32), 0))

    def add(self, x: ir.Value, y: ir.Value) -> ir.Value:
        return self.builder.fadd(x, y, flags=_FUSED)

    def times(self, x: ir.Value, y: ir.Value) -> ir.Value:
        return self.builder.fmul(x, y, flags=_FUSED)

    def exp2(self, x: ir.Value) -> ir.Value:
        """``2 ** x``; float32 within 2e-7, from 1e-38 (no denormals) to infinity."""
        if isinstance(self.scalar, ir.DoubleType):
            kind = ir.FunctionType(self.vector, [self.vector])
            function = cgutils.get_or_insert_function(self.builder.module, kind, f"llvm.exp2.v{LANES}f64")
            return self.builder.call(function, [x])
        low, high = self.constant(-126.0), self.constant(128.0)
        x = self.builder.select(self.builder.fcmp_ordered("<", x, low), low, x)
        x = self.builder.select(self.builder.fcmp_ordered(">", x, high), high, x)
        # Adding 1.5 * 2**23 rounds to the nearest integer, which then stands in the low bits: shifted by 23 they are
        # what is to be added to the exponent of the power.
        shifted = self.builder.fadd(x, self.constant(12582912.0))
        part = self.builder.fsub(x, self.builder.fsub(shifted, self.constant(12582912.0)))
        power = self.constant(EXP2[0])
        for coefficient in EXP2[1:]:
            power = self.add(self.times(power, part), self.constant(coefficient))
        integers = ir.VectorType(ir.IntType(32), LANES)
        whole = self.builder.shl(self.builder.bitcast(shifted, integers), ir.Constant(integers, [23] * LANES))
        return self.builder.bitcast(self.builder.add(self.builder.bitcast(power, integers), whole), self.vector)

    @contextmanager
    def each_vector(self) -> Iterator[ir.Value]:
        zero, lanes = ir.Constant(self.index, 0), ir.Constant(self.index, LANES)
        with cgutils.for_range_slice(self.builder, zero, self.channels, lanes, self.index) as (i, _):
            yield i

    @contextmanager
    def each_state(self, start: ir.Value | None = None, step: int = 1) -> Iterator[ir.Value]:
        """From ``start`` on, as long as ``step`` states are left."""
        first = ir.Constant(self.index, 0) if start is None else start
        stop = self.builder.sub(self.states, ir.Constant(self.index, step - 1))
        with cgutils.for_range_slice(self.builder, first, stop, ir.Constant(self.index, step), self.index) as (n, _):
            yield n

    def variable(self, value: ir.Value) -> ir.Value:
        return cgutils.alloca_once_value(self.builder, value)

    def increase(self, variable: ir.Value, by: ir.Value) -> None:
        self.builder.store(self.add(self.builder.load(variable), by), variable)


def _described(emit: Callable[[_Step], None], **kinds: Any) -> Any:
    """What numba wants to know of a function without a result."""

    def generate(context: Any, builder: ir.IRBuilder, signature: Any, values: Any) -> Any:
        # Within a larger function LLVM keeps the loop's constants in memory.
        builder.function.attributes.add("noinline")
        emit(_Step(context, builder, kinds, values))
        return context.get_dummy_value()

    return types.void(*kinds.values()), generate


def _emit_forward(step: _Step) -> None:
    with step.each_vector() as i:
        dt, dtu = step.load("dt", i), step.load("dtu", i)
        total = step.variable(step.load("total", i))
        with step.each_state() as n:
            at = step.place(n, i)
            decay = step.exp2(step.times(dt, step.load("a", at)))
            state = step.add(step.times(decay, step.load("before", at)), step.times(dtu, step.spread("b", n)))
            step.store(state, "after", at)
            if "decay" in step.data:
                step.store(decay, "decay", at)
            step.increase(total, step.times(state, step.spread("c", n)))
        step.store(step.builder.load(total), "total", i)


def _emit_product(step: _Step) -> None:
    with step.each_vector() as i:
        total = step.variable(step.load("total", i))
        with step.each_state() as n:
            step.increase(total, step.times(step.load("a", step.place(n, i)), step.spread("b", n)))
        step.store(step.builder.load(total), "total", i)


def _emit_backward(step: _Step) -> None:
    with step.each_state(step=_TOGETHER) as n:
        _emit_backward_of(step, n, _TOGETHER)
    # Of 0 to N states, how many the loop above had.
    had = step.builder.and_(step.states, ir.Constant(step.index, -_TOGETHER))
    with step.each_state(had) as n:
        _emit_backward_of(step, n, 1)


def _emit_backward_of(step: _Step, n: ir.Value, count: int) -> None:
    """The states from ``n`` on."""
    states = [step.builder.add(n, ir.Constant(step.index, j)) for j in range(count)]
    b, c = ([step.spread(name, state) for state in states] for name in ("b", "c"))
    sum_b, sum_c = ([step.variable(step.constant(0.0)) for _ in states] for _ in range(2))
    with step.each_vector() as i:
        dt, dtu, dout, gb, gdt = (step.load(name, i) for name in ("dt", "dtu", "dout", "gb", "gdt"))
        for j, state in enumerate(states):
            at = step.place(state, i)
            grad = step.add(step.load("g", at), step.times(dout, c[j]))
            gb = step.add(gb, step.times(grad, b[j]))
            step.increase(sum_b[j], step.times(grad, dtu))
            step.increase(sum_c[j], step.times(dout, step.load("after", at)))
            grad = step.times(grad, step.load("decay", at))
            step.store(grad, "g", at)
            power = step.times(grad, step.load("before", at))  # the gradient of delta * A
            gdt = step.add(gdt, step.times(power, step.load("a", at)))
            step.store(step.add(step.load("da", at), step.times(power, dt)), "da", at)
        step.store(gb, "gb", i)
        step.store(gdt, "gdt", i)
    for name, sums in (("sum_b", sum_b), ("sum_c", sum_c)):
        for state, total in zip(states, sums, strict=True):
            step.builder.store(step.sum_lanes(step.builder.load(total)), step.builder.gep(step.data[name], [state]))


@intrinsic
def _walk(typing_context, before, after, decay, a, b, c, dt, dtu, total):
    return _described(
        _emit_forward, before=before, after=after, decay=decay, a=a, b=b, c=c, dt=dt, dtu=dtu, total=total
    )


@intrinsic
def _add_product(typing_context, a, b, total):
    return _described(_emit_product, a=a, b=b, total=total)


@intrinsic
def _walk_back(typing_context, before, after, decay, a, b, c, dt, dtu, dout, g, da, gb, gdt, sum_b, sum_c):
    return _described(
        _emit_backward, before=before, after=after, decay=decay, a=a, b=b, c=c, dt=dt, dtu=dtu, dout=dout, g=g, da=da,
        gb=gb, gdt=gdt, sum_b=sum_b, sum_c=sum_c,
    )  # fmt: skip


@numba.njit(**KERNEL)
def row(channels, like):
    """Zeros of the dtype of ``like``, of which no vector lies across two lines of the cache."""
    buffer = np.zeros(channels + LANES, like.dtype)
    first = (-buffer.ctypes.data // buffer.itemsize) % LANES
    return buffer[first : first + channels]


@numba.njit(**KERNEL)
def tile(rows, channels, like):
    return row(rows * channels, like).reshape(rows, channels)


@numba.njit(**_WALK)
def walk(before, after, decay, a, b, c, dt, dtu, total):
    """after = exp2(dt * a) * before + dtu * b; total += sum over states of c * after; exp2(dt * a) into ``decay``.

    ``before`` and ``after`` may be one tile; ``decay`` may be None.
    """
    _walk(before, after, decay, a, b, c, dt, dtu, total)


@numba.njit(**_WALK)
def add_product(a, b, total):
    """total += sum over n of b[n] * a[n]."""
    _add_product(a, b, total)


@numba.njit(**_WALK)
def walk_back(before, after, decay, a, b, c, dt, dtu, dout, g, da, gb, gdt, sum_b, sum_c):
    """The reverse of ``walk``, where ``dout`` is the gradient of ``total``.

    ``g``, the gradient of the state after the step, becomes that of the state before it. Added to: ``da`` (gradient of
    a), ``gb`` (of dtu), ``gdt`` (of dt, through a). Set: ``sum_b``, ``sum_c`` (of b and c). The gradients of a and of
    dt through it lack a factor log(2).
    """
    _walk_back(before, after, decay, a, b, c, dt, dtu, dout, g, da, gb, gdt, sum_b, sum_c)
