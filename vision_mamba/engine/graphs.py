"""Passes replayed as CUDA graphs: the same kernels, without Python launching each of them."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from vision_mamba.ops.backend import autocast_dtype

MAX_CAPTURES = 64  # of one net: a capture takes about a second, and some MB of the device for its list of kernels
_WARM_UP = 2  # passes before a capture: kernels are compiled and chosen in the first


class TrainingGraphs:
    """Runs a net's training passes; those over a kind of input seen before are replays of two CUDA graphs.

    A kind is the input's shape, strides and dtype, and the autocast dtype. The first pass over a kind captures the
    net's forward and backward pass, without a trace in buffers, gradients or random numbers, at most `MAX_CAPTURES`
    times; further kinds run eagerly, with one warning. All captures use the same memory, as much as the largest needs.

    What is returned, and the gradients, are tensors of their own that no later pass overwrites, so gradients add up and
    may be set to None as without graphs. Random numbers (dropout, drop path) are drawn anew at every replay by the
    device's default generator. Fixed by the capture is what Python decides: drop rates, hooks, control flow. Captures
    are dropped, and made anew, when a parameter or buffer is another one or has moved (`.to`), is frozen or thawed, and
    when a module is replaced or changes its mode; values that are changed in place, as by optimisers and
    `load_state_dict`, are read by the next replay.

    Passes run eagerly on a CPU, in evaluation mode, without gradients, while compiled, traced or captured by others, if
    the input itself wants a gradient, and if the backward pass of the last replay is still to come: the memory that it
    needs is not free. The backward pass of a replay can run once.

    Under DistributedDataParallel each process has captures of its own, of the kinds that it sees; gradients are
    averaged once a replay has handed them over.

    Copies, also unpickled ones, start without captures.
    """

    def __init__(self) -> None:
        self._warned = False
        self._state: list[Any] | None = None
        self._forget()

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), ()

    def __call__(self, net: nn.Module, forward: Callable[[Tensor], Any], x: Tensor) -> Any:
        """`forward(x)`, which is a tensor, or a tuple or list of tensors; from a replay never a list.

        Args:
            net: what `forward` runs; all its parameters, buffers and modes are looked at in every call.
            forward: the pass. It must not look at values on the host, and not depend on anything but `net` and `x`.
            x: the input.

        Raises:
            RuntimeError: the passes cannot be captured, or the net's SyncBatchNorm would wait for another process.
        """
        if not self._possible(net, x):
            return forward(x)
        state = _state(net)
        if state != self._state:
            self._forget()
            self._state = state
        autocast = autocast_dtype(x.device)
        kind = (x.shape, x.stride(), x.dtype, x.device, autocast)
        capture = self._captures.get(kind)
        if capture is None:
            trainable = [p for p in net.parameters() if p.requires_grad]
            if not trainable:
                return forward(x)
            if len(self._captures) >= MAX_CAPTURES:
                if not self._warned:
                    warnings.warn(
                        f"{MAX_CAPTURES} shapes of inputs are captured as CUDA graphs; others, such as "
                        f"{tuple(x.shape)}, run eagerly. Fewer sizes of images would all be fast",
                        stacklevel=2,
                    )
                    self._warned = True
                return forward(x)
            capture = self._captures[kind] = self._capture(net, forward, x, trainable, autocast)
        outputs = _Replay.apply(self, capture, x, *capture.parameters)
        return outputs[0] if capture.single else outputs

    @property
    def memory(self) -> int:
        """Bytes of the device that the captures have for themselves."""
        return sum(s["total_size"] for s in torch.cuda.memory_snapshot() if tuple(s["segment_pool_id"]) == self._pool)

    def _possible(self, net: nn.Module, x: Tensor) -> bool:
        return (
            x.is_cuda
            and net.training
            and torch.is_grad_enabled()
            and not x.requires_grad
            and self._pending() is None
            and not torch.compiler.is_compiling()
            and not torch.jit.is_tracing()
            and not torch.cuda.is_current_stream_capturing()
        )

    def _forget(self) -> None:
        self._captures: dict[tuple[Any, ...], _Capture] = {}
        self._pool: tuple[int, int] | None = None
        self._stream: torch.cuda.Stream | None = None
        # The forward pass that was replayed last, while its backward pass may still come.
        self._pending: Callable[[], _Pending | None] = lambda: None

    def _capture(
        self,
        net: nn.Module,
        forward: Callable[[Tensor], Any],
        x: Tensor,
        trainable: Sequence[Tensor],
        autocast: torch.dtype | None,
    ) -> _Capture:
        if dist.is_initialized() and dist.get_world_size() > 1:
            for name, module in net.named_modules():
                if isinstance(module, nn.SyncBatchNorm):
                    raise RuntimeError(
                        f"{name} is a SyncBatchNorm, which waits for processes that need not capture when this one "
                        "does; use BatchNorm2d, or set cuda_graphs=False"
                    )
        buffers = [(buffer, buffer.clone()) for buffer in net.buffers()]
        random_numbers = torch.cuda.get_rng_state(x.device)
        with torch.cuda.device(x.device):
            if self._stream is None:
                # Freed memory of a pool is found again only by the stream that had it: one stream for all captures.
                self._pool, self._stream = torch.cuda.graph_pool_handle(), torch.cuda.Stream()
            # A cast that autocast remembers would not be repeated by the graph.
            no_cache = torch.autocast("cuda", autocast, enabled=autocast is not None, cache_enabled=False)
            try:
                with _own_leaves(net, trainable) as leaves, no_cache:
                    self._stream.wait_stream(torch.cuda.current_stream())
                    with torch.cuda.stream(self._stream):
                        for _ in range(_WARM_UP):
                            outputs = [o for o in _several(forward(x)) if o.requires_grad]
                            zeros = [torch.zeros_like(o) for o in outputs]
                            torch.autograd.grad(outputs, leaves, zeros, allow_unused=True)
                            del outputs, zeros
                    torch.cuda.current_stream().wait_stream(self._stream)
                    return _Capture(forward, x, leaves, trainable, self._pool, self._stream)
            finally:
                torch.cuda.set_rng_state(random_numbers, x.device)
                with torch.no_grad():
                    for buffer, value in buffers:
                        buffer.copy_(value)


class Replayed(nn.Module):
    """A net whose training passes are replayed, in the form that DistributedDataParallel takes.

    Args:
        net: see `TrainingGraphs`, which says when a pass is not replayed.
    """

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net
        self._graphs = TrainingGraphs()

    def forward(self, x: Tensor) -> Any:
        return self._graphs(self.net, self.net, x)


class CaptureError(RuntimeError):
    """A function that CUDA graphs cannot repeat: it waits for the device, say."""


class InferenceGraph:
    """A function of one tensor, without gradients; its first call captures a CUDA graph, which every call replays.

    All inputs must have the first one's shape and dtype. A result is overwritten by the next call. What the function
    reads besides its input, such as parameters, stays where it is; values that are changed in place are seen. What
    autocast remembers of weights is read there too: a context of it around the first call must enclose all of them.
    """

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        """
        Args:
            function: it must not look at values on the host.
        """
        self._function = function
        self._graph: torch.cuda.CUDAGraph | None = None

    def __call__(self, x: Tensor) -> Tensor:
        """
        Raises:
            CaptureError: the function cannot be captured; the device is as before.
            ValueError: an input of another kind than the first.
        """
        if self._graph is None:
            self._capture(x)
        assert self._graph is not None
        if (x.shape, x.dtype) != (self._input.shape, self._input.dtype):
            raise ValueError(
                f"captured for {tuple(self._input.shape)} {self._input.dtype}, given {tuple(x.shape)} {x.dtype}"
            )
        self._input.copy_(x)
        self._graph.replay()
        return self._output

    def _capture(self, x: Tensor) -> None:
        self._input, graph = x.clone(), torch.cuda.CUDAGraph()
        with torch.cuda.device(x.device):
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                for _ in range(_WARM_UP):
                    self._function(self._input)
            torch.cuda.current_stream().wait_stream(stream)
            torch.cuda.empty_cache()  # of the passes before: the graph's memory is its own
            try:
                # Other threads go on with theirs, such as reading ahead, while this one captures.
                with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
                    self._output = self._function(self._input)
            except torch.cuda.OutOfMemoryError:
                raise
            except RuntimeError as error:
                # Torch 2.11 leaves the generator in a capture that has no end: it goes on with a state of its own.
                generator = torch.cuda.default_generators[torch.cuda.current_device()]
                generator.graphsafe_set_state(generator.clone_state())
                raise CaptureError(f"cannot be captured as a CUDA graph ({str(error).splitlines()[0]})") from error
        self._graph = graph


class _Capture:
    """The two graphs of one kind of input, and where they read and write.

    The tensors do not own their memory. All of it goes back to the pool at the end of a capture, for the next capture
    to take, and stays the pool's as long as any graph lives. So a replay writes over what other captures left there.
    """

    def __init__(
        self,
        forward: Callable[[Tensor], Any],
        x: Tensor,
        leaves: Sequence[Tensor],
        parameters: Sequence[Tensor],
        pool: Any,
        stream: torch.cuda.Stream,
    ) -> None:
        # Other threads, such as a loader's that pins memory, go on with theirs while this one captures.
        capturing = partial(torch.cuda.graph, pool=pool, stream=stream, capture_error_mode="thread_local")
        self.forward_graph, self.backward_graph = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
        try:
            with capturing(self.forward_graph):
                read = _unfilled(x)
                found = forward(read)
            outputs = _several(found)
            differentiable = [o for o in outputs if o.requires_grad]
            with capturing(self.backward_graph):
                received = [_unfilled(o) for o in differentiable]
                gradients = torch.autograd.grad(differentiable, leaves, received, allow_unused=True)
        except torch.cuda.OutOfMemoryError:
            raise
        except RuntimeError as error:
            raise RuntimeError(
                f"the passes over an input {tuple(x.shape)} cannot be captured as CUDA graphs, train without: {error}"
            ) from error
        self.parameters = tuple(parameters)
        self.single = isinstance(found, Tensor)
        self.differentiable = [o.requires_grad for o in outputs]
        self.used = [g is not None for g in gradients]
        self.input = _unowned(read)
        self.outputs = [_unowned(o) for o in outputs]
        self.received = [_unowned(g) for g in received]
        self.gradients = [_unowned(g) for g in gradients if g is not None]


class _Pending:
    """Alive as long as the backward pass of the last replay can still come."""


class _Replay(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, graphs: TrainingGraphs, capture: _Capture, x: Tensor, *parameters: Tensor) -> Any:
        capture.input.copy_(x)
        capture.forward_graph.replay()
        outputs = tuple(o.clone() for o in capture.outputs)
        ctx.mark_non_differentiable(*(o for o, d in zip(outputs, capture.differentiable, strict=True) if not d))
        ctx.capture, ctx.pending = capture, _Pending()
        graphs._pending = weakref.ref(ctx.pending)
        return outputs

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        capture: _Capture = ctx.capture
        if ctx.pending is None:
            raise RuntimeError(
                "a CUDA graph's backward pass can run only once for a forward pass; set cuda_graphs=False"
            )
        given = [g for g, d in zip(gradients, capture.differentiable, strict=True) if d]
        for place, gradient in zip(capture.received, given, strict=True):
            place.copy_(gradient)
        capture.backward_graph.replay()
        ctx.pending = None
        own = iter(torch._foreach_mul(capture.gradients, 1))  # copies, with few launches
        return None, None, None, *(next(own) if used else None for used in capture.used)


@contextmanager
def _own_leaves(net: nn.Module, trainable: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Meanwhile the net has other parameters in the place of these, over the same memory.

    Autograd brings a leaf's gradients to the stream on which it was first used, for as long as a result of that is kept
    (the last step's loss, say), and a capture must not wait for another stream.
    """
    own = {p: nn.Parameter(p.detach()) for p in trainable}
    replaced = [(m, name, p) for m in net.modules() for name, p in m._parameters.items() if p is not None and p in own]
    for module, name, parameter in replaced:
        module._parameters[name] = own[parameter]
    try:
        yield list(own.values())
    finally:
        for module, name, parameter in replaced:
            module._parameters[name] = parameter


def _state(net: nn.Module) -> list[Any]:
    """Everything that a capture of the net takes for given, to be compared.

    It is asked for in every pass, so not by `modules()` and `parameters()`, which take twice as long.
    """
    state: list[Any] = []
    modules = [net]
    for module in modules:
        state += (module, module.training)
        for tensors in (module._parameters, module._buffers):
            for tensor in tensors.values():
                if tensor is not None:
                    state += (id(tensor), tensor.data_ptr(), tensor.requires_grad)
        modules += [child for child in module._modules.values() if child is not None]
    return state


def _several(outputs: Any) -> tuple[Tensor, ...]:
    return (outputs,) if isinstance(outputs, Tensor) else tuple(outputs)


def _unfilled(like: Tensor) -> Tensor:
    """`torch.empty_like`, which in deterministic mode fills: a graph would do that again, over what it is given."""
    storage = torch.UntypedStorage(like.numel() * like.element_size(), device=like.device)
    strides = torch.empty_like(like, device="meta").stride()
    return torch.empty(0, dtype=like.dtype, device=like.device).set_(storage, 0, like.shape, strides)


def _unowned(tensor: Tensor) -> Tensor:
    """The same memory, which may be freed all the same."""
    storage = tensor.untyped_storage()
    memory = torch.as_tensor(_Memory(storage.data_ptr(), storage.nbytes()), device=tensor.device).untyped_storage()
    empty = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
    return empty.set_(memory, tensor.storage_offset(), tensor.shape, tensor.stride())


class _Memory:
    def __init__(self, address: int, size: int) -> None:
        self.__cuda_array_interface__ = dict(shape=(size,), typestr="|u1", data=(address, False), version=3)
