"""The selective scan for NVIDIA GPUs in Gluon, Triton's lower level, where the layout of every tile is ours to choose.

Arguments and mathematics are those of the portable kernels in ``selective_scan.py``. A program walks one path of one
image for a block of channels. A warp's lanes stand in a rectangle, NX along the states and LC along the channels, so
that sums over states and sums over channels both start inside a lane, and the lanes exchange through shared memory a
quarter of a tile where they would exchange all of it.

The backward pass has one warp a program, 8 lanes along the channels, 4 along the states, and needs no barriers between
warps, at which the portable one spends most of its time. The forward pass has no sums over channels: where one warp a
program leaves the device half empty, four warps share out the states, each lane with one channel and a few of them.

Axes of a tile: T steps, QC channels of a lane, NH states of a lane, NX lanes (of all warps) along the states, LC lanes
along the channels. Channel ``lane * QC + q`` of the block, state ``lane * NH + nh``: both contiguous in a lane, so that
shared memory is read in wide words.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from . import runtime

LOG2E = gl.constexpr(runtime.LOG2E.value)

_sigmoid = gluon.jit(runtime.sigmoid.fn)
_log1p_below_one = gluon.jit(runtime.log1p_below_one.fn)
_softplus = gluon.jit(runtime.softplus.fn)
_step = gluon.jit(runtime.step_of.fn)
_locate = gluon.jit(runtime.locate.fn)

_jit = runtime.jit_without(runtime.VARYING, gluon.jit)


@gluon.jit
def _ahead(path, position, end):
    """The tokens at these positions, -1 outside [0, end). Looking at them waits for them: not before their use."""
    return gl.load(path + position, mask=(position >= 0) & (position < end), other=-1)


@gluon.jit
def _seen(token, length):
    """Which of the tokens are of the image."""
    return token.to(gl.uint32, bitcast=True) < gl.cast(length, gl.uint32)


@gluon.jit
def _load_rows(base, token, length, stride, column, column_ok):
    """Tile [tokens, columns]; zeros where a token is not of the image or the column masked."""
    at = token[:, None] * stride + column[None, :]
    return gl.load(base + at, mask=_seen(token, length)[:, None] & column_ok[None, :], other=0.0)


@gluon.jit
def _store_rows(base, token, length, stride, column, column_ok, value):
    at = token[:, None] * stride + column[None, :]
    gl.store(base + at, value.to(base.dtype.element_ty), mask=_seen(token, length)[:, None] & column_ok[None, :])


@gluon.constexpr_function
def _powers(size):
    """1, 2, 4, ... below a power of two."""
    return [1 << i for i in range(size.bit_length() - 1)]


@gluon.constexpr_function
def _lanes_of(row, channel):
    """Lanes by the bits of their number, from the lowest: along the states, along the channels, then what is left.

    Shared memory hands out 128 different bytes a cycle, but of words of 64 bits and more to half as many lanes, unless
    every lane i has the same as lane i ^ 1, or as lane i ^ 2: so one of them is in its row, one in its column.
    """
    return row[:1] + channel[:1] + row[1:] + channel[1:]


@gluon.constexpr_function
def _lanes_layout(registers, row, channel, LC, WARPS, shape):
    """LC lanes along ``channel`` and the others along ``row``, as the warps: where the next of each is in a tile."""
    ROWS = 32 // LC
    lanes = _lanes_of(
        [[i * step for step in row] for i in _powers(ROWS)], [[i * step for step in channel] for i in _powers(LC)]
    )
    warps = [[ROWS * i * step for step in row] for i in _powers(WARPS)]
    return gl.DistributedLinearLayout(registers, lanes, warps, [], shape)


@gluon.constexpr_function
def _tile_layout(T, QC, NH, LC, WARPS):
    """[T, QC, NH, NX, LC], the warps along the states."""
    registers = [[0, 0, i, 0, 0] for i in _powers(NH)] + [[0, i, 0, 0, 0] for i in _powers(QC)]
    registers += [[i, 0, 0, 0, 0] for i in _powers(T)]
    shape = [T, QC, NH, 32 // LC * WARPS, LC]
    return _lanes_layout(registers, [0, 0, 0, 1, 0], [0, 0, 0, 0, 1], LC, WARPS, shape)


@gluon.constexpr_function
def _rows_layout(T, columns, WARPS):
    """[T, columns] as in memory, wide words."""
    words = min(T * columns // (32 * WARPS), 4)
    return gl.BlockedLayout([1, words], [32 * words // columns, columns // words], [WARPS, 1], [1, 0])


@gluon.constexpr_function
def _stacked(layout, count):
    """[count, *] of such rows, a lane holding all ``count`` of a number."""
    return gl.BlockedLayout(
        [count, *layout.size_per_thread], [1, *layout.threads_per_warp], [1, *layout.warps_per_cta], [2, 1, 0]
    )


@gluon.constexpr_function
def _plane_layout(QC, NH, LC, WARPS):
    """[states, channels] as in memory, in which a lane has the numbers that it has of the state in a walk."""
    registers = [[0, i] for i in _powers(QC)] + [[i, 0] for i in _powers(NH)]
    return _lanes_layout(registers, [NH, 0], [0, QC], LC, WARPS, [32 // LC * WARPS * NH, QC * LC])


@gluon.constexpr_function
def _border_layout(QC, NH, NX, LC, WARPS):
    """[channels, states] as in memory, wide words along the states, in which a lane has its own numbers of a walk."""
    registers = [[0, i] for i in _powers(NH)] + [[i, 0] for i in _powers(QC)]
    return _lanes_layout(registers, [0, NH], [QC, 0], LC, WARPS, [QC * LC, NH * NX])


@gluon.constexpr_function
def _rows_at_a_time(QC, LC):
    """In how many rows of states the lanes stand that write QC words each at a time."""
    lanes = _lanes_of(["row" for _ in _powers(32 // LC)], ["channel" for _ in _powers(LC)])
    return 1 << lanes[: len(_powers(32 // QC))].count("row")


@gluon.constexpr_function
def _sums_layout(T, ROWS, COLUMNS, SPREAD):
    """Shared memory [T, ROWS, COLUMNS] of lanes' sums, of 32 banks.

    Lanes that write at a time stand in SPREAD rows of a step, lanes that read in steps and columns of a row. Bits of
    the row's number are added to the column's, and bits of the step's to the row's, so that neither meet in a bank.
    """
    offsets = [[0, 0, i] for i in _powers(COLUMNS)]
    free = [i for i in _powers(min(COLUMNS, 32)) if i * SPREAD >= 32]
    for i in _powers(ROWS):
        apart = i * COLUMNS < 32 or i >= SPREAD
        offsets.append([0, i, 0 if apart else free.pop(0)])
    offsets += [[i, i if i * COLUMNS < 32 else 0, 0] for i in _powers(T)]
    return gl.SharedLinearLayout(offsets)


@gluon.jit
def _plane_places(
    group, block, per_group, border_n,
    N: gl.constexpr, NP: gl.constexpr, BLOCK: gl.constexpr, ALIGN: gl.constexpr, layout: gl.constexpr,
):  # fmt: skip
    """Where the [states, channels] of a block lie in a plane (N, D), 32 bits, and which of them exist."""
    n = gl.arange(0, NP, gl.SliceLayout(1, layout))
    inside = block * BLOCK + gl.arange(0, BLOCK, gl.SliceLayout(0, layout))
    at = (n * (border_n // ALIGN * ALIGN))[:, None] + (group * per_group + inside)[None, :]
    return at, (n < N)[:, None] & (inside < per_group)[None, :]


@gluon.jit
def _plane_of(h, layout: gl.constexpr):
    """[1, QC, NH, NX, LC] as [states, channels]."""
    x = gl.permute(h, (0, 3, 2, 4, 1))
    x = gl.reshape(x, (x.shape[1] * x.shape[2], x.shape[3] * x.shape[4]))
    return gl.convert_layout(x, layout, assert_trivial=True)


@gluon.jit
def _lanes(QC: gl.constexpr, NH: gl.constexpr, NX: gl.constexpr, LC: gl.constexpr, D5: gl.constexpr):
    """The state and the channel (within the block) of the places of [1, QC, NH, NX, LC]."""
    D4: gl.constexpr = gl.SliceLayout(0, D5)
    q = gl.arange(0, QC, gl.SliceLayout(1, gl.SliceLayout(2, gl.SliceLayout(3, D4))))[:, None, None, None]
    nh = gl.arange(0, NH, gl.SliceLayout(0, gl.SliceLayout(2, gl.SliceLayout(3, D4))))[None, :, None, None]
    nx = gl.arange(0, NX, gl.SliceLayout(0, gl.SliceLayout(1, gl.SliceLayout(3, D4))))[None, None, :, None]
    lc = gl.arange(0, LC, gl.SliceLayout(0, gl.SliceLayout(1, gl.SliceLayout(2, D4))))[None, None, None, :]
    return (nx * NH + nh)[None, :, :, :, :], (lc * QC + q)[None, :, :, :, :]


# A border is [channels, states], NP numbers a channel. In 16 bits they are float16 times a power of two that a quarter
# of the states of 16 channels share: the states of one warp of four, or of a row of lanes of the backward pass. The
# exponents, float32's, stand behind the states, [quarters, blocks of 16 channels], each in a word of its own. The
# backward pass reads words of 32 bits: to take 16 bits out of one is to look at it, and to wait where it is read ahead.


@gluon.jit
def _border_places(group, block, per_group, ROW: gl.constexpr, BLOCK: gl.constexpr, layout: gl.constexpr):
    """Where the [channels, states] of a block lie in a border, ROW a channel, 32 bits, and which of them exist."""
    inside = block * BLOCK + gl.arange(0, BLOCK, gl.SliceLayout(1, layout))
    n = gl.arange(0, ROW, gl.SliceLayout(0, layout))
    return ((group * per_group + inside) * ROW)[:, None] + n[None, :], (inside < per_group)[:, None]


@gluon.jit
def _exponent_places(
    group, block, groups, per_group,
    BLOCK: gl.constexpr, QC: gl.constexpr, NX: gl.constexpr, LC: gl.constexpr, D5: gl.constexpr,
):  # fmt: skip
    """Which exponents are those of the lanes [1, NX, LC], and which of them exist."""
    D3: gl.constexpr = gl.SliceLayout(1, gl.SliceLayout(1, D5))
    nx = gl.arange(0, NX, gl.SliceLayout(0, gl.SliceLayout(2, D3)))[None, :, None]
    lc = gl.arange(0, LC, gl.SliceLayout(0, gl.SliceLayout(1, D3)))[None, None, :]
    inside = block * BLOCK + lc * QC
    of_group = (per_group + 15) // 16
    at = nx * 4 // NX * (groups * of_group) + (group * of_group + inside // 16)
    return at, inside < per_group


@gluon.jit
def _save_state(border, h, state_at, h_ok, exponent_at, e_ok, quarter, layout: gl.constexpr, D5: gl.constexpr):
    """[1, QC, NH, NX, LC] to a border; ``quarter`` is the distance of two quarters' exponents."""
    NX: gl.constexpr = h.shape[3]
    LC: gl.constexpr = h.shape[4]
    if border.dtype.element_ty == gl.float16:
        D3: gl.constexpr = gl.SliceLayout(1, gl.SliceLayout(1, D5))
        QC: gl.constexpr = h.shape[1]
        QUARTERS: gl.constexpr = min(NX, 4)
        # The exponent of the largest number; not so small that the scale would leave float32.
        largest = gl.max(gl.max(gl.abs(h), axis=1), axis=1).to(gl.int32, bitcast=True)
        largest = gl.maximum(largest >> 23, 27)
        if LC < 16:
            # Triton 3.6 reduces an axis over lanes as if they were neighbours. Here (_lanes_of) a row's bit stands
            # behind the lowest bit of the channels, which is therefore an axis of its own.
            rows = gl.reshape(largest, (1, QUARTERS, LC * QC // 16, 8 // QC, 2))
            most = gl.max(gl.max(rows, axis=4), axis=3)
            rows = gl.broadcast(most[:, :, :, None][:, :, :, :, None], rows)[0]
        else:
            rows = gl.reshape(largest, (1, QUARTERS, NX // QUARTERS * LC))
            rows = gl.broadcast(gl.max(rows, axis=2)[:, :, None], rows)[0]
        exponent = gl.convert_layout(gl.reshape(rows, (1, NX, LC)), D3, assert_trivial=True)
        kept = exponent.to(gl.int16).to(gl.float16, bitcast=True)
        gl.store(border + exponent_at, kept, mask=e_ok)
        if NX == 2:  # two quarters in a row of lanes
            gl.store(border + exponent_at + quarter, kept, mask=e_ok)
        scale = ((268 - exponent) << 23).to(gl.float32, bitcast=True)  # to 2**14, below float16's largest number
        h = h * scale[:, None, :, :][:, None, :, :, :]
    x = gl.permute(h, (0, 4, 1, 3, 2))
    x = gl.convert_layout(gl.reshape(x, layout.shape), layout, assert_trivial=True)
    gl.store(border + state_at, x.to(border.dtype.element_ty), mask=h_ok)


@gluon.jit
def _load_exponents(border, exponent_at, e_ok):
    """For ``_saved_state``; nothing where a border has numbers of 32 bits."""
    exponent = 0
    if border.dtype.element_ty == gl.int32:
        exponent = gl.load(border + exponent_at, mask=e_ok, other=0)
    return exponent


@gluon.jit
def _saved_state(
    border, exponent, QC: gl.constexpr, NH: gl.constexpr, NX: gl.constexpr, LC: gl.constexpr, D5: gl.constexpr
):  # fmt: skip
    """What ``_save_state`` wrote, from [channels, states], of 16 bits in words, and ``_load_exponents``."""
    h = border
    if border.dtype == gl.int32:
        low = h.to(gl.int16).to(gl.float16, bitcast=True)
        high = (h >> 16).to(gl.int16).to(gl.float16, bitcast=True)
        h = gl.join(low, high).to(gl.float32)
    h = gl.permute(gl.reshape(h, (1, LC, QC, NX, NH)), (0, 2, 4, 3, 1))
    h = gl.convert_layout(h, D5, assert_trivial=True)
    if border.dtype == gl.int32:
        scale = (((exponent & 0xFF) - 14) << 23).to(gl.float32, bitcast=True)
        h = h * scale[:, None, :, :][:, None, :, :, :]
    return h


@gluon.jit
def _put(shared, tile):
    """[T, columns] into shared memory, where the columns are two axes."""
    shared.store(gl.reshape(tile, shared.shape))


@gluon.constexpr_function
def _pair_layout(LC, WARPS):
    """[1, LC, 2], both numbers in a lane."""
    return _lanes_layout([[0, 0, 1]], [0, 0, 0], [0, 1, 0], LC, WARPS, [1, LC, 2])


@gluon.jit
def _pair_of(shared, step: gl.constexpr, D5: gl.constexpr, WARPS: gl.constexpr):
    """Row ``step`` of shared memory [T, LC, 2] as two [1, 1, 1, 1, LC]."""
    LINE: gl.constexpr = gl.SliceLayout(1, gl.SliceLayout(2, gl.SliceLayout(3, D5)))
    first, second = gl.split(shared.slice(step, 1, 0).load(_pair_layout(shared.shape[1], WARPS)))
    first = gl.convert_layout(first, LINE, assert_trivial=True)
    second = gl.convert_layout(second, LINE, assert_trivial=True)
    return first[:, None, None, None, :], second[:, None, None, None, :]


@gluon.jit
def _channels_of(shared, step: gl.constexpr, D5: gl.constexpr):
    """Row ``step`` of shared memory [T, LC, QC] as [1, QC, 1, 1, LC]."""
    x = shared.slice(step, 1, 0).permute((0, 2, 1)).load(gl.SliceLayout(2, gl.SliceLayout(3, D5)))
    return x[:, :, None, None, :]


@gluon.jit
def _states_of(shared, step: gl.constexpr, D5: gl.constexpr):
    """Row ``step`` of shared memory [T, NX, NH] as [1, 1, NH, NX, 1]."""
    x = shared.slice(step, 1, 0).permute((0, 2, 1)).load(gl.SliceLayout(1, gl.SliceLayout(4, D5)))
    return x[:, None, :, :, None]


@gluon.jit
def _with_sum(sums, step: gl.constexpr, x, axis: gl.constexpr, layout: gl.constexpr):
    """Several steps' sums [STEPS, ...], ``step``'s from now on a lane's sum of [1, QC, NH, NX, LC] along the axis."""
    steps = gl.arange(0, sums.shape[0], gl.SliceLayout(1, gl.SliceLayout(2, gl.SliceLayout(3, layout))))
    x = gl.convert_layout(gl.sum(x, axis=axis), layout, assert_trivial=True)
    return gl.where((steps == step)[:, None, None, None], x, sums)


@gluon.jit
def _put_over_states(shared, first: gl.constexpr, sums):
    """Sums over a lane's states [STEPS, QC, NX, LC], from row ``first`` of shared memory [T, NX, LC * QC].

    Of several steps at once: Triton puts a barrier between two stores into one piece of shared memory.
    """
    rows = shared.slice(first, sums.shape[0], 0)
    rows.store(gl.reshape(gl.permute(sums, (0, 2, 3, 1)), rows.shape))


@gluon.constexpr_function
def _exchanged_layout(S, LC, WARPS):
    """[S, 2, warps, 2, LC], where two lanes that had a row each of two steps have a step each of both rows."""
    registers = [[0, 0, 0, 1, 0]] + [[i, 0, 0, 0, 0] for i in _powers(S)]
    lanes = _lanes_of([[0, 1, 0, 0, 0]], [[0, 0, 0, 0, i] for i in _powers(LC)])
    warps = [[0, 0, i, 0, 0] for i in _powers(WARPS)]
    return gl.DistributedLinearLayout(registers, lanes, warps, [], [S, 2, WARPS, 2, LC])


@gluon.jit
def _put_over_two_rows(shared, first: gl.constexpr, sums, WARPS: gl.constexpr):
    """Sums over a lane's states [STEPS, 1, 2 * WARPS, LC] over both rows of a warp, to shared memory [T, WARPS, LC]."""
    S: gl.constexpr = sums.shape[0] // 2
    LC: gl.constexpr = sums.shape[3]
    x = gl.convert_layout(gl.reshape(sums, (S, 2, WARPS, 2, LC)), _exchanged_layout(S, LC, WARPS))
    shared.slice(first, 2 * S, 0).store(gl.reshape(gl.sum(x, axis=3), (2 * S, WARPS, LC)))


@gluon.jit
def _put_over_channels(shared, first: gl.constexpr, sums):
    """Sums over a lane's channels [STEPS, NH, NX, LC], from row ``first`` of shared memory [T, LC, NX * NH]."""
    x = gl.permute(sums, (0, 3, 2, 1))
    shared.slice(first, x.shape[0], 0).store(gl.reshape(x, (x.shape[0], x.shape[1], x.shape[2] * x.shape[3])))


@gluon.jit
def _add_lanes(shared, count: gl.constexpr, layout: gl.constexpr):
    """Sum of shared memory [T, count, columns] over the lanes that wrote it, [T, columns]."""
    x = gl.sum(shared.permute((1, 0, 2)).load(_stacked(layout, count)), axis=0)
    return gl.convert_layout(x, layout, assert_trivial=True)


@gluon.jit
def _after_spans(h, a2, change, total, apart, count, row, state, channel, channels, N: gl.constexpr):
    """The state after ``count`` spans that are walked already, of all that start with ``h``.

    ``change`` is where the rows of the first one's states begin that it makes of zeros, ``total`` its sums of steps,
    and those of the next one are ``apart``.
    """
    AT_ONCE: gl.constexpr = 8  # in one piece, so that their loads are under way together
    at = state * row + channel  # less than 2^31 numbers of a span
    for s in range(0, count, AT_ONCE):
        for i in gl.static_range(AT_ONCE):
            ok = channel < gl.where(s + i < count, channels, 0)
            steps = gl.load(total + (s + i) * apart + channel, mask=ok, other=0.0)
            x = gl.load(change + (s + i) * apart * N + at, mask=ok & (state < N), other=0.0)
            h = gl.exp2(steps * a2) * h + x
    return h


@_jit
def scan_forward_kernel(
    u, delta, A, B, C, D, z, bias, paths, initial, y, last_state, states, change, total,
    length, num_paths, groups, per_group, span, num_spans, saves, border_size,
    u_b, u_l, u_k, delta_b, delta_l, delta_k, z_b, z_l, z_k, y_b, y_l, y_k,
    B_b, B_l, B_k, B_g, C_b, C_l, C_k, C_g, A_k, A_d, A_n, D_k, bias_k, paths_k, h_b, h_s, h_k, h_n, border_n,
    N: gl.constexpr, NP: gl.constexpr, T: gl.constexpr, BLOCK: gl.constexpr, CHUNK: gl.constexpr,
    ALIGN: gl.constexpr, STATE_ALIGN: gl.constexpr, OFFSET: gl.constexpr, SOFTPLUS: gl.constexpr,
    LOOP_PATHS: gl.constexpr, WARPS: gl.constexpr,
):  # fmt: skip
    """The scan; without ``y``, what each span does to the state: change [.., N, D] from zero, sum of steps [.., D].

    With both, the scan of spans of which that is known: each finds the state before it from ``initial``.

    Several warps share out the states of a path: a lane then has few, and the multiprocessor more warps to choose from.
    """
    NUMBERS: gl.constexpr = NP * BLOCK // (32 * WARPS)  # of a lane
    NH: gl.constexpr = min(NUMBERS, 4)
    NX: gl.constexpr = NP // NH
    QC: gl.constexpr = NUMBERS // NH
    LC: gl.constexpr = BLOCK // QC
    D5: gl.constexpr = _tile_layout(1, QC, NH, LC, WARPS)
    E2: gl.constexpr = _rows_layout(T, BLOCK, WARPS)
    S2: gl.constexpr = _rows_layout(T, NP, WARPS)
    FLAT: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [2, 1, 0])
    H2: gl.constexpr = _plane_layout(QC, NH, LC, WARPS)
    B2: gl.constexpr = _border_layout(QC, NH, NX, LC, WARPS)
    # Sums of so many steps are written at once.
    SUMS: gl.constexpr = min(T, 32 // QC)
    Y5: gl.constexpr = gl.SliceLayout(2, _tile_layout(SUMS, QC, NH, LC, WARPS))
    # Each in a piece of its own, as Triton puts a barrier between two stores into one.
    # With one channel a lane and 16 a warp, shared memory is what bounds the walk. A word of each channel would be half
    # of what it can hand out at a time, and the warp's two rows are added before they go there.
    TWO_ROWS: gl.constexpr = QC == 1 and LC == 16 and WARPS > 1
    if TWO_ROWS:
        # Lanes that write four channels each do not meet in a bank.
        PADDED: gl.constexpr = gl.PaddedSharedLayout.with_identity_for([[32, 4]], [T, LC, 2], [2, 1, 0])
        pairs = gl.allocate_shared_memory(gl.float32, [T, LC, 2], PADDED)
    else:
        dt_rows = gl.allocate_shared_memory(gl.float32, [T, LC, QC], FLAT)
        dtu_rows = gl.allocate_shared_memory(gl.float32, [T, LC, QC], FLAT)
    b_rows = gl.allocate_shared_memory(gl.float32, [T, NX, NH], FLAT)
    c_rows = gl.allocate_shared_memory(gl.float32, [T, NX, NH], FLAT)
    ROWS: gl.constexpr = WARPS if TWO_ROWS else NX
    OVER_STATES: gl.constexpr = _sums_layout(T, ROWS, BLOCK, 1 if TWO_ROWS else _rows_at_a_time(QC, LC))
    part = gl.allocate_shared_memory(gl.float32, [T, ROWS, BLOCK], OVER_STATES)

    blocks = (per_group + BLOCK - 1) // BLOCK
    image, span_index, k0, group, block = _locate(num_paths, groups, blocks, num_spans, LOOP_PATHS)
    dim = groups * per_group
    first_c = group * per_group + block * BLOCK
    inside = block * BLOCK + gl.arange(0, BLOCK, gl.SliceLayout(0, E2))
    c = group * per_group + inside
    c_ok = inside < per_group
    n = gl.arange(0, NP, gl.SliceLayout(0, S2))
    n_ok = n < N
    step_e = gl.arange(0, T, gl.SliceLayout(1, E2))
    step_s = gl.arange(0, T, gl.SliceLayout(1, S2))
    state, channel = _lanes(QC, NH, NX, LC, D5)
    nc_ok = (state < N) & (block * BLOCK + channel < per_group)
    plane_at, p_ok = _plane_places(group, block, per_group, border_n, N, NP, BLOCK, ALIGN, H2)
    state_at, h_ok = _border_places(group, block, per_group, NP, BLOCK, B2)
    exponent_at, e_ok = _exponent_places(group, block, groups, per_group, BLOCK, QC, NX, LC, D5)
    exponent_at = dim * NP + 2 * exponent_at
    quarter = 2 * groups * ((per_group + 15) // 16)
    border_size = border_size // 16 * 16

    num_chunks = (length + CHUNK - 1) // CHUNK
    start = span_index * span
    end = gl.minimum(start + span, length)
    u_l = (u_l // ALIGN).to(OFFSET) * ALIGN
    delta_l = (delta_l // ALIGN).to(OFFSET) * ALIGN
    z_l = (z_l // ALIGN).to(OFFSET) * ALIGN
    y_l = (y_l // ALIGN).to(OFFSET) * ALIGN
    B_l = (B_l // STATE_ALIGN).to(OFFSET) * STATE_ALIGN
    C_l = (C_l // STATE_ALIGN).to(OFFSET) * STATE_ALIGN

    paths_here = 1
    if LOOP_PATHS:
        paths_here = num_paths
    for k in range(k0, k0 + paths_here):
        k_wide = gl.cast(k, gl.int64)
        u_rows = u + gl.multiple_of(image * u_b + k_wide * u_k, ALIGN)
        delta_rows = delta + gl.multiple_of(image * delta_b + k_wide * delta_k, ALIGN)
        B_rows = B + gl.multiple_of(image * B_b + k_wide * B_k + group.to(gl.int64) * B_g, STATE_ALIGN)
        if y is not None:
            y_rows = y + gl.multiple_of(image * y_b + k_wide * y_k, ALIGN)
            C_rows = C + gl.multiple_of(image * C_b + k_wide * C_k + group.to(gl.int64) * C_g, STATE_ALIGN)
            if z is not None:
                z_rows = z + gl.multiple_of(image * z_b + k_wide * z_k, ALIGN)
        path = paths + k_wide * paths_k

        a_at = k_wide * A_k + (first_c + channel).to(gl.int64) * A_d + state.to(gl.int64) * A_n
        a2 = gl.load(A + a_at, mask=nc_ok, other=0.0).to(gl.float32) * LOG2E
        d = gl.zeros([BLOCK], gl.float32, gl.SliceLayout(0, E2))
        if D is not None:
            d = gl.load(D + k_wide * D_k + c, mask=c_ok, other=0.0).to(gl.float32)
        shift = gl.zeros([BLOCK], gl.float32, gl.SliceLayout(0, E2))
        if bias is not None:
            shift = gl.load(bias + k_wide * bias_k + c, mask=c_ok, other=0.0).to(gl.float32)
        h = gl.zeros([1, QC, NH, NX, LC], gl.float32, D5)
        if initial is not None:
            h_at = image * h_b + span_index.to(gl.int64) * h_s + k_wide * h_k
            h = gl.load(initial + h_at + state.to(gl.int64) * h_n + (first_c + channel), mask=nc_ok, other=0.0)
        dt_sum = gl.zeros([T, BLOCK], gl.float32, E2)

        # One tile ahead in the rows, two in the path: no load waits for another one.
        token_e = _ahead(path, start + step_e, end)
        token_s = _ahead(path, start + step_s, end)
        delta_next = _load_rows(delta_rows, token_e, length, delta_l, c, c_ok)
        u_next = _load_rows(u_rows, token_e, length, u_l, c, c_ok)
        b_next = _load_rows(B_rows, token_s, length, B_l, n, n_ok)
        if y is not None:
            c_next = _load_rows(C_rows, token_s, length, C_l, n, n_ok)
            if z is not None:
                z_next = _load_rows(z_rows, token_e, length, z_l, c, c_ok)
        token_e_next = _ahead(path, start + T + step_e, end)
        token_s_next = _ahead(path, start + T + step_s, end)
        if y is not None and change is not None:
            span_at = (image * num_spans * num_paths + k) * border_n
            h = _after_spans(
                h, a2, change + span_at * N + first_c, total + span_at + first_c,
                gl.cast(num_paths, gl.int64) * border_n, span_index, border_n, state, channel,
                per_group - block * BLOCK, N,
            )  # fmt: skip
        for t0 in range(start, end, T):
            token = token_e
            dt = delta_next.to(gl.float32) + shift[None, :]
            uf = u_next.to(gl.float32)
            bf = b_next.to(gl.float32)
            if y is not None:
                cf = c_next.to(gl.float32)
                if z is not None:
                    zf = z_next.to(gl.float32)
            token_e = token_e_next
            token_s = token_s_next
            delta_next = _load_rows(delta_rows, token_e, length, delta_l, c, c_ok)
            u_next = _load_rows(u_rows, token_e, length, u_l, c, c_ok)
            b_next = _load_rows(B_rows, token_s, length, B_l, n, n_ok)
            if y is not None:
                c_next = _load_rows(C_rows, token_s, length, C_l, n, n_ok)
                if z is not None:
                    z_next = _load_rows(z_rows, token_e, length, z_l, c, c_ok)
            token_e_next = _ahead(path, t0 + 2 * T + step_e, end)
            token_s_next = _ahead(path, t0 + 2 * T + step_s, end)
            if LOOP_PATHS:  # the sum over the paths that were walked before
                y_before = _load_rows(y_rows, gl.where(k > 0, token, -1), length, y_l, c, c_ok)

            if SOFTPLUS:
                dt = _softplus(dt, delta.dtype.element_ty.primitive_bitwidth)
            dt = gl.where((t0 + step_e < end)[:, None], dt, 0.0)
            if TWO_ROWS:
                pairs.store(gl.join(dt, dt * uf))
            else:
                _put(dt_rows, dt)
                _put(dtu_rows, dt * uf)
            _put(b_rows, bf)
            if y is not None:
                _put(c_rows, cf)
            else:
                dt_sum += dt
            sums = gl.zeros([SUMS, QC, NX, LC], gl.float32, Y5)
            for r in gl.static_range(T):
                if y is not None:
                    if r % CHUNK == 0:
                        if (saves != 0) & (t0 + r < end) & ((t0 + r) % CHUNK == 0):
                            border = states + ((image * num_chunks + (t0 + r) // CHUNK) * num_paths + k) * border_size
                            _save_state(border, h, state_at, h_ok, exponent_at, e_ok, quarter, B2, D5)
                if TWO_ROWS:
                    dt_r, dtu_r = _pair_of(pairs, r, D5, WARPS)
                else:
                    dt_r = _channels_of(dt_rows, r, D5)
                    dtu_r = _channels_of(dtu_rows, r, D5)
                h = gl.exp2(dt_r * a2) * h + dtu_r * _states_of(b_rows, r, D5)
                if y is not None:
                    sums = _with_sum(sums, r % SUMS, h * _states_of(c_rows, r, D5), 2, Y5)
                    if r % SUMS == SUMS - 1:
                        if TWO_ROWS:
                            _put_over_two_rows(part, r + 1 - SUMS, sums, WARPS)
                        else:
                            _put_over_states(part, r + 1 - SUMS, sums)
            if y is not None:
                out = _add_lanes(part, ROWS, E2) + d[None, :] * uf
                if z is not None:
                    out = out * zf * _sigmoid(zf)
                if LOOP_PATHS:
                    out = out + y_before.to(gl.float32)
                _store_rows(y_rows, token, length, y_l, c, c_ok, out)

        if y is not None:
            if span_index == num_spans - 1:
                last = (image * num_paths + k) * N * dim + (first_c + channel).to(gl.int64) * N + state
                gl.store(last_state + last, h, mask=nc_ok)
        else:
            at = ((image * num_spans + span_index) * num_paths + k) * border_n
            gl.store(total + at + c, gl.sum(dt_sum, axis=0), mask=c_ok)
            gl.store(change + at * N + plane_at, _plane_of(h, H2), mask=p_ok)


@gluon.jit
def _walk(h, a2, dt_rows, dtu_rows, b_rows, first: gl.constexpr, end: gl.constexpr, D5: gl.constexpr):
    """The state [1, QC, NH, NX, LC] after these steps of the rows in shared memory."""
    for r in gl.static_range(first, end):
        decay = gl.exp2(_channels_of(dt_rows, r, D5) * a2)
        h = decay * h + _channels_of(dtu_rows, r, D5) * _states_of(b_rows, r, D5)
    return h


@_jit
def scan_backward_kernel(
    u, delta, A, B, C, D, z, bias, paths, states, dy, dlast,
    du, ddelta, dA, dB, dC, dD, dz, dbias, dinitial,
    batch, length, num_paths, groups, per_group, span, num_spans, border_size,
    u_b, u_l, u_k, delta_b, delta_l, delta_k, z_b, z_l, z_k, dy_b, dy_l, dy_k, du_b, du_l, du_k, dz_b, dz_l, dz_k,
    B_b, B_l, B_k, B_g, C_b, C_l, C_k, C_g, A_k, A_d, A_n, D_k, bias_k, paths_k, h_b, h_s, h_k, h_n, border_n,
    N: gl.constexpr, NP: gl.constexpr, T: gl.constexpr, BLOCK: gl.constexpr, TILES: gl.constexpr,
    ALIGN: gl.constexpr, STATE_ALIGN: gl.constexpr, OFFSET: gl.constexpr, SOFTPLUS: gl.constexpr,
    LOOP_PATHS: gl.constexpr, ADD_DU: gl.constexpr, ADD_DZ: gl.constexpr,
):  # fmt: skip
    """Chunks of TILES tiles from the last to the first; a chunk's states are found again from its border."""
    NX: gl.constexpr = 4
    LC: gl.constexpr = 8
    NH: gl.constexpr = NP // NX
    QC: gl.constexpr = BLOCK // LC
    D5: gl.constexpr = _tile_layout(1, QC, NH, LC, 1)
    E2: gl.constexpr = _rows_layout(T, BLOCK, 1)
    S2: gl.constexpr = _rows_layout(T, NP, 1)
    FLAT: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [2, 1, 0])
    HALF: gl.constexpr = T // 2
    CHUNK: gl.constexpr = T * TILES
    H5: gl.constexpr = _tile_layout(HALF, QC, NH, LC, 1)
    Y5: gl.constexpr = gl.SliceLayout(2, H5)
    C5: gl.constexpr = gl.SliceLayout(1, H5)
    H2: gl.constexpr = _plane_layout(QC, NH, LC, 1)
    ROW: gl.constexpr = NP // 2 if states.dtype.element_ty == gl.int32 else NP
    B2: gl.constexpr = _border_layout(QC, ROW // NX, NX, LC, 1)
    FLAT5: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [4, 3, 2, 1, 0])
    OVER_STATES: gl.constexpr = _sums_layout(T, NX, BLOCK, _rows_at_a_time(QC, LC))
    OVER_CHANNELS: gl.constexpr = _sums_layout(T, LC, NP, 1)
    borders = gl.allocate_shared_memory(gl.float32, [2 * TILES - 1, 1, QC, LC, NX, NH], FLAT5)
    # Each in a piece of its own, as Triton puts a barrier between two stores into one.
    dt_rows = gl.allocate_shared_memory(gl.float32, [T, LC, QC], FLAT)
    dtu_rows = gl.allocate_shared_memory(gl.float32, [T, LC, QC], FLAT)
    dout_rows = gl.allocate_shared_memory(gl.float32, [T, LC, QC], FLAT)
    b_rows = gl.allocate_shared_memory(gl.float32, [T, NX, NH], FLAT)
    c_rows = gl.allocate_shared_memory(gl.float32, [T, NX, NH], FLAT)
    part_y = gl.allocate_shared_memory(gl.float32, [T, NX, BLOCK], OVER_STATES)
    part_u = gl.allocate_shared_memory(gl.float32, [T, NX, BLOCK], OVER_STATES)
    part_a = gl.allocate_shared_memory(gl.float32, [T, NX, BLOCK], OVER_STATES)
    part_b = gl.allocate_shared_memory(gl.float32, [T, LC, NP], OVER_CHANNELS)
    part_c = gl.allocate_shared_memory(gl.float32, [T, LC, NP], OVER_CHANNELS)

    blocks = (per_group + BLOCK - 1) // BLOCK
    image, span_index, k0, group, block = _locate(num_paths, groups, blocks, num_spans, LOOP_PATHS)
    dim = groups * per_group
    first_c = group * per_group + block * BLOCK
    inside = block * BLOCK + gl.arange(0, BLOCK, gl.SliceLayout(0, E2))
    c = group * per_group + inside
    c_ok = inside < per_group
    n = gl.arange(0, NP, gl.SliceLayout(0, S2))
    n_ok = n < N
    step_e = gl.arange(0, T, gl.SliceLayout(1, E2))
    step_s = gl.arange(0, T, gl.SliceLayout(1, S2))
    state, channel = _lanes(QC, NH, NX, LC, D5)
    nc_ok = (state < N) & (block * BLOCK + channel < per_group)
    plane_at, p_ok = _plane_places(group, block, per_group, border_n, N, NP, BLOCK, ALIGN, H2)
    state_at, h_ok = _border_places(group, block, per_group, ROW, BLOCK, B2)
    exponent_at, e_ok = _exponent_places(group, block, groups, per_group, BLOCK, QC, NX, LC, D5)
    exponent_at += dim * ROW
    border_size = border_size // 16 * 16
    index = gl.arange(0, HALF, gl.SliceLayout(1, gl.SliceLayout(2, gl.SliceLayout(3, gl.SliceLayout(4, H5)))))
    index = index[:, None, None, None, None]

    num_chunks = (length + CHUNK - 1) // CHUNK
    start = span_index * span
    end = gl.minimum(start + span, length)
    u_l = (u_l // ALIGN).to(OFFSET) * ALIGN
    delta_l = (delta_l // ALIGN).to(OFFSET) * ALIGN
    z_l = (z_l // ALIGN).to(OFFSET) * ALIGN
    dy_l = (dy_l // ALIGN).to(OFFSET) * ALIGN
    du_l = (du_l // ALIGN).to(OFFSET) * ALIGN
    dz_l = (dz_l // ALIGN).to(OFFSET) * ALIGN
    ddelta_l = ((dim * num_paths) // ALIGN).to(OFFSET) * ALIGN
    B_l = (B_l // STATE_ALIGN).to(OFFSET) * STATE_ALIGN
    C_l = (C_l // STATE_ALIGN).to(OFFSET) * STATE_ALIGN
    dB_l = (num_paths * groups).to(OFFSET) * N

    paths_here = 1
    if LOOP_PATHS:
        paths_here = num_paths
    for k in range(k0, k0 + paths_here):
        k_wide = gl.cast(k, gl.int64)
        u_rows = u + gl.multiple_of(image * u_b + k_wide * u_k, ALIGN)
        delta_rows = delta + gl.multiple_of(image * delta_b + k_wide * delta_k, ALIGN)
        dy_rows = dy + gl.multiple_of(image * dy_b + k_wide * dy_k, ALIGN)
        du_rows = du + gl.multiple_of(image * du_b + k_wide * du_k, ALIGN)
        ddelta_rows = ddelta + gl.multiple_of(image * length * (dim * num_paths) + k_wide * dim, ALIGN)
        if z is not None:
            z_rows = z + gl.multiple_of(image * z_b + k_wide * z_k, ALIGN)
            dz_rows = dz + gl.multiple_of(image * dz_b + k_wide * dz_k, ALIGN)
        B_rows = B + gl.multiple_of(image * B_b + k_wide * B_k + group.to(gl.int64) * B_g, STATE_ALIGN)
        C_rows = C + gl.multiple_of(image * C_b + k_wide * C_k + group.to(gl.int64) * C_g, STATE_ALIGN)
        partial = (block.to(gl.int64) * batch + image) * length * dB_l + (k * groups + group) * N
        path = paths + k_wide * paths_k

        a_at = k_wide * A_k + (first_c + channel).to(gl.int64) * A_d + state.to(gl.int64) * A_n
        a2 = gl.load(A + a_at, mask=nc_ok, other=0.0).to(gl.float32) * LOG2E
        d = gl.zeros([BLOCK], gl.float32, gl.SliceLayout(0, E2))
        if D is not None:
            d = gl.load(D + k_wide * D_k + c, mask=c_ok, other=0.0).to(gl.float32)
        shift = gl.zeros([BLOCK], gl.float32, gl.SliceLayout(0, E2))
        if bias is not None:
            shift = gl.load(bias + k_wide * bias_k + c, mask=c_ok, other=0.0).to(gl.float32)
        g = gl.zeros([1, QC, NH, NX, LC], gl.float32, D5)
        if dlast is not None:
            h_at = image * h_b + span_index.to(gl.int64) * h_s + k_wide * h_k
            g = gl.load(dlast + h_at + state.to(gl.int64) * h_n + (first_c + channel), mask=nc_ok, other=0.0)
        da = gl.zeros([1, QC, NH, NX, LC], gl.float32, D5)
        dd = gl.zeros([T, BLOCK], gl.float32, E2)
        dshift = gl.zeros([T, BLOCK], gl.float32, E2)

        chunks_here = (end - start + CHUNK - 1) // CHUNK
        last_chunk = start + (chunks_here - 1) * CHUNK
        # Everything is read ahead of its use, across chunks too: rows by a tile, tokens by two, a chunk's border in the
        # last tile before it. The order of tiles: a chunk's first to last, last to first, then the chunk before it.
        token_e = _ahead(path, last_chunk + step_e, end)
        token_s = _ahead(path, last_chunk + step_s, end)
        border = states + ((image * num_chunks + last_chunk // CHUNK) * num_paths + k) * border_size
        border_next = gl.load(border + state_at, mask=h_ok, other=0)
        exponent_next = _load_exponents(border, exponent_at, e_ok)
        delta_next = _load_rows(delta_rows, token_e, length, delta_l, c, c_ok)
        u_next = _load_rows(u_rows, token_e, length, u_l, c, c_ok)
        b_next = _load_rows(B_rows, token_s, length, B_l, n, n_ok)
        then = gl.where(end - last_chunk > T, T, -CHUNK)
        token_e_next = _ahead(path, last_chunk + then + step_e, end)
        token_s_next = _ahead(path, last_chunk + then + step_s, end)
        for i in range(chunks_here):
            t_chunk = last_chunk - i * CHUNK
            tiles = gl.minimum((end - t_chunk + T - 1) // T, TILES)

            # The states before each half tile.
            h = _saved_state(border_next, exponent_next, QC, NH, NX, LC, D5)
            borders.index(0).store(gl.permute(h, (0, 1, 4, 3, 2)))
            for s in range(tiles - 1):
                if s > 0:
                    borders.index(2 * s).store(gl.permute(h, (0, 1, 4, 3, 2)))
                dt = delta_next.to(gl.float32) + shift[None, :]
                uf = u_next.to(gl.float32)
                bf = b_next.to(gl.float32)
                token_e = token_e_next
                token_s = token_s_next
                delta_next = _load_rows(delta_rows, token_e, length, delta_l, c, c_ok)
                u_next = _load_rows(u_rows, token_e, length, u_l, c, c_ok)
                b_next = _load_rows(B_rows, token_s, length, B_l, n, n_ok)
                then = t_chunk + gl.where(s + 2 < tiles, s + 2, tiles - 2) * T
                token_e_next = _ahead(path, then + step_e, end)
                token_s_next = _ahead(path, then + step_s, end)
                if SOFTPLUS:
                    dt = _softplus(dt, delta.dtype.element_ty.primitive_bitwidth)
                _put(dt_rows, dt)
                _put(dtu_rows, dt * uf)
                _put(b_rows, bf)
                h = _walk(h, a2, dt_rows, dtu_rows, b_rows, 0, HALF, D5)
                borders.index(2 * s + 1).store(gl.permute(h, (0, 1, 4, 3, 2)))
                h = _walk(h, a2, dt_rows, dtu_rows, b_rows, HALF, T, D5)

            # The last tile is walked to its middle, where the last half tile starts, and is then the first one back.
            dy_next = _load_rows(dy_rows, token_e, length, dy_l, c, c_ok)
            if z is not None:
                z_next = _load_rows(z_rows, token_e, length, z_l, c, c_ok)
            c_next = _load_rows(C_rows, token_s, length, C_l, n, n_ok)
            if tiles > 1:
                borders.index(2 * tiles - 2).store(gl.permute(h, (0, 1, 4, 3, 2)))
            dt = delta_next.to(gl.float32) + shift[None, :]
            if SOFTPLUS:
                dt = _softplus(dt, delta.dtype.element_ty.primitive_bitwidth)
            _put(dt_rows, dt)
            _put(dtu_rows, dt * u_next.to(gl.float32))
            _put(b_rows, b_next.to(gl.float32))
            h = _walk(h, a2, dt_rows, dtu_rows, b_rows, 0, HALF, D5)

            for j in range(tiles):
                s = tiles - 1 - j
                position = t_chunk + s * T + step_e
                dt = delta_next.to(gl.float32) + shift[None, :]
                u_tile = u_next
                uf = u_tile.to(gl.float32)
                dout = dy_next.to(gl.float32)
                if z is not None:
                    zf = z_next.to(gl.float32)
                bf = b_next.to(gl.float32)
                cf = c_next.to(gl.float32)
                token = token_e
                token_n = token_s
                token_e = token_e_next
                token_s = token_s_next
                delta_next = _load_rows(delta_rows, token_e, length, delta_l, c, c_ok)
                u_next = _load_rows(u_rows, token_e, length, u_l, c, c_ok)
                b_next = _load_rows(B_rows, token_s, length, B_l, n, n_ok)
                if (s == 0) & (t_chunk > start):
                    border -= num_paths * border_size
                    border_next = gl.load(border + state_at, mask=h_ok, other=0)
                    exponent_next = _load_exponents(border, exponent_at, e_ok)
                back_e = gl.where(s > 0, token_e, -1)  # the other rows are not for the next chunk's first sweep
                dy_next = _load_rows(dy_rows, back_e, length, dy_l, c, c_ok)
                if z is not None:
                    z_next = _load_rows(z_rows, back_e, length, z_l, c, c_ok)
                c_next = _load_rows(C_rows, gl.where(s > 0, token_s, -1), length, C_l, n, n_ok)
                then = t_chunk + gl.where(s > 1, (s - 2) * T, (1 - s) * T - CHUNK)
                token_e_next = _ahead(path, then + step_e, end)
                token_s_next = _ahead(path, then + step_s, end)
                if ADD_DU:
                    du_before = _load_rows(du_rows, gl.where(k > 0, token, -1), length, du_l, c, c_ok)
                if ADD_DZ:
                    dz_before = _load_rows(dz_rows, gl.where(k > 0, token, -1), length, dz_l, c, c_ok)

                exists = (position < end)[:, None]
                if SOFTPLUS:
                    e = gl.exp2(gl.abs(dt) * -LOG2E)
                    r_e = gl.rsqrt(1.0 + e)
                    slope = gl.where(exists, gl.where(dt > 0, 1.0, e) * r_e * r_e, 0.0)
                    dt = gl.maximum(dt, 0.0) + _log1p_below_one(e, delta.dtype.element_ty.primitive_bitwidth)
                else:
                    slope = gl.where(exists, gl.full([T, BLOCK], 1.0, gl.float32, E2), 0.0)
                dt = gl.where(exists, dt, 0.0)
                if z is not None:
                    sig = _sigmoid(zf)
                    dgate = dout * sig * (1.0 + zf * (1.0 - sig))
                    dout = dout * zf * sig
                _put(dt_rows, dt)
                _put(dtu_rows, dt * uf)
                _put(dout_rows, dout)
                _put(b_rows, bf)
                _put(c_rows, cf)
                for half in gl.static_range(1, -1, -1):
                    if half == 0 or j > 0:
                        h = borders.index(2 * s + half).permute((0, 1, 4, 3, 2)).load(D5)
                    before = gl.zeros([HALF, QC, NH, NX, LC], gl.float32, H5)
                    decays = gl.zeros([HALF, QC, NH, NX, LC], gl.float32, H5)
                    if z is not None:
                        sums_y = gl.zeros([HALF, QC, NX, LC], gl.float32, Y5)
                    sums_c = gl.zeros([HALF, NH, NX, LC], gl.float32, C5)
                    # A step's numbers are read before the last one's sums are written, which they would wait for.
                    dt_r = _channels_of(dt_rows, half * HALF, D5)
                    dtu_r = _channels_of(dtu_rows, half * HALF, D5)
                    dout_r = _channels_of(dout_rows, half * HALF, D5)
                    b_r = _states_of(b_rows, half * HALF, D5)
                    c_r = _states_of(c_rows, half * HALF, D5)
                    for r in gl.static_range(HALF):
                        decay = gl.exp2(dt_r * a2)
                        before = gl.where(index == r, gl.convert_layout(h, H5, assert_trivial=True), before)
                        decays = gl.where(index == r, gl.convert_layout(decay, H5, assert_trivial=True), decays)
                        h = decay * h + dtu_r * b_r
                        y_r = h * c_r
                        c_part = h * dout_r
                        if r + 1 < HALF:
                            dt_r = _channels_of(dt_rows, half * HALF + r + 1, D5)
                            dtu_r = _channels_of(dtu_rows, half * HALF + r + 1, D5)
                            dout_r = _channels_of(dout_rows, half * HALF + r + 1, D5)
                            b_r = _states_of(b_rows, half * HALF + r + 1, D5)
                            c_r = _states_of(c_rows, half * HALF + r + 1, D5)
                        if z is not None:
                            sums_y = _with_sum(sums_y, r, y_r, 2, Y5)
                        sums_c = _with_sum(sums_c, r, c_part, 1, C5)
                    if z is not None:
                        _put_over_states(part_y, half * HALF, sums_y)
                    _put_over_channels(part_c, half * HALF, sums_c)
                    sums_b = gl.zeros([HALF, NH, NX, LC], gl.float32, C5)
                    sums_u = gl.zeros([HALF, QC, NX, LC], gl.float32, Y5)
                    sums_a = gl.zeros([HALF, QC, NX, LC], gl.float32, Y5)
                    for r in gl.static_range(HALF - 1, -1, -1):
                        g = dout_r * c_r + g
                        b_part = g * dtu_r
                        u_r = g * b_r
                        g = g * gl.convert_layout(_step(decays, index, r), D5, assert_trivial=True)
                        power = g * gl.convert_layout(_step(before, index, r), D5, assert_trivial=True)
                        da += power * dt_r  # power: the gradient of delta * A
                        if r > 0:
                            dt_r = _channels_of(dt_rows, half * HALF + r - 1, D5)
                            dtu_r = _channels_of(dtu_rows, half * HALF + r - 1, D5)
                            dout_r = _channels_of(dout_rows, half * HALF + r - 1, D5)
                            b_r = _states_of(b_rows, half * HALF + r - 1, D5)
                            c_r = _states_of(c_rows, half * HALF + r - 1, D5)
                        sums_b = _with_sum(sums_b, r, b_part, 1, C5)
                        sums_u = _with_sum(sums_u, r, u_r, 2, Y5)
                        sums_a = _with_sum(sums_a, r, power * a2, 2, Y5)
                    _put_over_channels(part_b, half * HALF, sums_b)
                    _put_over_states(part_u, half * HALF, sums_u)
                    _put_over_states(part_a, half * HALF, sums_a)

                # What can be had again is not kept in registers meanwhile.
                uf = u_tile.to(gl.float32)
                dt = dt_rows.reshape((T, BLOCK)).load(E2)
                dout = dout_rows.reshape((T, BLOCK)).load(E2)
                if z is not None:
                    gate = dgate * (_add_lanes(part_y, NX, E2) + d[None, :] * uf)
                    if ADD_DZ:
                        gate += dz_before.to(gl.float32)
                    _store_rows(dz_rows, token, length, dz_l, c, c_ok, gate)
                _store_rows(dC + partial, token_n, length, dB_l, n, n_ok, _add_lanes(part_c, LC, S2))
                _store_rows(dB + partial, token_n, length, dB_l, n, n_ok, _add_lanes(part_b, LC, S2))
                gb = _add_lanes(part_u, NX, E2)
                ddt = (_add_lanes(part_a, NX, E2) * (1.0 / LOG2E) + gb * uf) * slope
                dshift += ddt
                dd += dout * uf
                grad_u = dt * gb + d[None, :] * dout
                if ADD_DU:
                    grad_u += du_before.to(gl.float32)
                _store_rows(du_rows, token, length, du_l, c, c_ok, grad_u)
                _store_rows(ddelta_rows, token, length, ddelta_l, c, c_ok, ddt)

        at = ((image * num_spans + span_index) * num_paths + k) * border_n
        gl.store(dA + at * N + plane_at, _plane_of(da, H2), mask=p_ok)
        if D is not None:
            gl.store(dD + at + c, gl.sum(dd, axis=0), mask=c_ok)
        if bias is not None:
            gl.store(dbias + at + c, gl.sum(dshift, axis=0), mask=c_ok)
        if dinitial is not None:
            if span_index == 0:
                first = (image * num_paths + k) * N * dim + (first_c + channel).to(gl.int64) * N + state
                gl.store(dinitial + first, g, mask=nc_ok)


@_jit
def span_backward_kernel(
    delta, A, C, z, bias, paths, dy, change, total,
    length, num_paths, groups, per_group, span, num_spans,
    delta_b, delta_l, delta_k, z_b, z_l, z_k, dy_b, dy_l, dy_k, C_b, C_l, C_k, C_g, A_k, A_d, A_n,
    bias_k, paths_k, border_n,
    N: gl.constexpr, NP: gl.constexpr, T: gl.constexpr, BLOCK: gl.constexpr,
    ALIGN: gl.constexpr, STATE_ALIGN: gl.constexpr, OFFSET: gl.constexpr, SOFTPLUS: gl.constexpr,
):  # fmt: skip
    """What a span does to the gradient of the state, which runs from the last step to the first."""
    NX: gl.constexpr = 4
    LC: gl.constexpr = 8
    NH: gl.constexpr = NP // NX
    QC: gl.constexpr = BLOCK // LC
    D5: gl.constexpr = _tile_layout(1, QC, NH, LC, 1)
    E2: gl.constexpr = _rows_layout(T, BLOCK, 1)
    S2: gl.constexpr = _rows_layout(T, NP, 1)
    FLAT: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [2, 1, 0])
    dt_rows = gl.allocate_shared_memory(gl.float32, [T, LC, QC], FLAT)
    dout_rows = gl.allocate_shared_memory(gl.float32, [T, LC, QC], FLAT)
    c_rows = gl.allocate_shared_memory(gl.float32, [T, NX, NH], FLAT)

    blocks = (per_group + BLOCK - 1) // BLOCK
    image, span_index, k, group, block = _locate(num_paths, groups, blocks, num_spans, False)
    first_c = group * per_group + block * BLOCK
    inside = block * BLOCK + gl.arange(0, BLOCK, gl.SliceLayout(0, E2))
    c = group * per_group + inside
    c_ok = inside < per_group
    n = gl.arange(0, NP, gl.SliceLayout(0, S2))
    n_ok = n < N
    step_e = gl.arange(0, T, gl.SliceLayout(1, E2))
    step_s = gl.arange(0, T, gl.SliceLayout(1, S2))
    state, channel = _lanes(QC, NH, NX, LC, D5)
    nc_ok = (state < N) & (block * BLOCK + channel < per_group)

    start = span_index * span
    end = gl.minimum(start + span, length)
    delta_l = (delta_l // ALIGN).to(OFFSET) * ALIGN
    z_l = (z_l // ALIGN).to(OFFSET) * ALIGN
    dy_l = (dy_l // ALIGN).to(OFFSET) * ALIGN
    C_l = (C_l // STATE_ALIGN).to(OFFSET) * STATE_ALIGN
    k_wide = gl.cast(k, gl.int64)
    delta_rows = delta + gl.multiple_of(image * delta_b + k_wide * delta_k, ALIGN)
    dy_rows = dy + gl.multiple_of(image * dy_b + k_wide * dy_k, ALIGN)
    C_rows = C + gl.multiple_of(image * C_b + k_wide * C_k + group.to(gl.int64) * C_g, STATE_ALIGN)
    if z is not None:
        z_rows = z + gl.multiple_of(image * z_b + k_wide * z_k, ALIGN)
    path = paths + k_wide * paths_k
    a_at = k_wide * A_k + (first_c + channel).to(gl.int64) * A_d + state.to(gl.int64) * A_n
    a2 = gl.load(A + a_at, mask=nc_ok, other=0.0).to(gl.float32) * LOG2E
    shift = gl.zeros([BLOCK], gl.float32, gl.SliceLayout(0, E2))
    if bias is not None:
        shift = gl.load(bias + k_wide * bias_k + c, mask=c_ok, other=0.0).to(gl.float32)
    g = gl.zeros([1, QC, NH, NX, LC], gl.float32, D5)
    dt_sum = gl.zeros([T, BLOCK], gl.float32, E2)

    t_last = start + (end - start - 1) // T * T
    token_e = _ahead(path, t_last + step_e, end)
    token_s = _ahead(path, t_last + step_s, end)
    delta_next = _load_rows(delta_rows, token_e, length, delta_l, c, c_ok)
    dy_next = _load_rows(dy_rows, token_e, length, dy_l, c, c_ok)
    c_next = _load_rows(C_rows, token_s, length, C_l, n, n_ok)
    if z is not None:
        z_next = _load_rows(z_rows, token_e, length, z_l, c, c_ok)
    for back in range(0, t_last - start + T, T):
        position = t_last - back
        dt = delta_next.to(gl.float32) + shift[None, :]
        dout = dy_next.to(gl.float32)
        cf = c_next.to(gl.float32)
        if z is not None:
            zf = z_next.to(gl.float32)
            dout = dout * zf * _sigmoid(zf)
        before = gl.where(position > start, position - T, -T)
        token_e = _ahead(path, before + step_e, end)
        token_s = _ahead(path, before + step_s, end)
        delta_next = _load_rows(delta_rows, token_e, length, delta_l, c, c_ok)
        dy_next = _load_rows(dy_rows, token_e, length, dy_l, c, c_ok)
        c_next = _load_rows(C_rows, token_s, length, C_l, n, n_ok)
        if z is not None:
            z_next = _load_rows(z_rows, token_e, length, z_l, c, c_ok)
        if SOFTPLUS:
            dt = _softplus(dt, delta.dtype.element_ty.primitive_bitwidth)
        dt = gl.where((position + step_e < end)[:, None], dt, 0.0)
        dt_sum += dt
        _put(dt_rows, dt)
        _put(dout_rows, dout)
        _put(c_rows, cf)
        for r in gl.static_range(T - 1, -1, -1):
            decay = gl.exp2(_channels_of(dt_rows, r, D5) * a2)
            g = decay * (g + _channels_of(dout_rows, r, D5) * _states_of(c_rows, r, D5))
    at = ((image * num_spans + span_index) * num_paths + k) * border_n
    gl.store(total + at + c, gl.sum(dt_sum, axis=0), mask=c_ok)
    gl.store(change + at * N + state.to(gl.int64) * border_n + (first_c + channel), g, mask=nc_ok)
