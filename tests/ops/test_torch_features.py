"""What torch does with operators: compile, autocast, checkpointing, data parallelism, graphs; on each backend."""

import pytest
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from tests.conftest import assert_close
from tests.ops.backends import DEVICE, TRITON, device_of, needs_gpu, record_scans
from vision_mamba.ops import add_norm, causal_conv1d, selective_scan
from vision_mamba.ops.backend import load_backend
from vision_mamba.ops.selective_scan import keep_scans

BACKENDS = ["cpu", TRITON]


def make(device, dtype=torch.float32, batch=1, length=5, paths=2, dim=3, states=2):
    generator = torch.Generator().manual_seed(0)

    def normal(*shape, dtype=dtype):
        return torch.randn(*shape, generator=generator).to(device, dtype).requires_grad_()

    tensors = {
        "u": normal(batch, length, dim),
        "delta": normal(batch, length, paths, dim),
        "A": (-torch.rand(paths, dim, states, generator=generator) - 0.1).to(device).requires_grad_(),
        "B": normal(batch, length, paths, states),
        "C": normal(batch, length, paths, states),
        "D": normal(paths, dim, dtype=torch.float32),
        "z": normal(batch, length, dim),
        "delta_bias": normal(paths, dim, dtype=torch.float32),
        "initial_state": normal(batch, paths, dim, states, dtype=torch.float32),
    }
    table = torch.stack([torch.randperm(length, generator=generator) for _ in range(paths)])
    return tensors, table.to(device)


class Mixer(nn.Module):
    """All operators in one layer: norm, projection, convolution and scan along two paths."""

    def __init__(self, backend, dim=8, states=3):
        super().__init__()
        generator = torch.Generator().manual_seed(0)

        def normal(*shape):
            return nn.Parameter(0.5 * torch.randn(*shape, generator=generator))

        self.backend, self.dim, self.states = backend, dim, states
        self.norm, self.proj, self.conv = normal(dim), normal(2 * dim, dim), normal(2, dim, 3)
        self.inner, self.A_log, self.D = normal(dim + 2 * states, dim), normal(2, dim, states), normal(2, dim)

    def forward(self, x):
        dim, states = self.dim, self.states
        normed, stream = add_norm(x, x, self.norm, backend=self.backend)
        u, z = nn.functional.linear(normed, self.proj).chunk(2, dim=-1)
        paths = torch.stack(
            [torch.arange(x.shape[1], device=x.device), torch.arange(x.shape[1], device=x.device).flip(0)]
        )
        u = causal_conv1d(u, self.conv, activation="silu", paths=paths, backend=self.backend)
        delta, B, C = nn.functional.linear(u, self.inner).split((dim, states, states), dim=-1)
        y = selective_scan(
            u, delta, -self.A_log.float().exp(), B, C, self.D, z, delta_softplus=True, paths=paths, merge="sum",
            backend=self.backend,
        )  # fmt: skip
        return y + stream


def gradients(layer, function, x):
    layer.zero_grad()
    y = function(x)
    (y.float() * torch.linspace(-1, 1, y.numel(), device=y.device).view_as(y)).sum().backward()
    return {"y": y.detach()} | {name: p.grad.clone() for name, p in layer.named_parameters()}


def tokens(backend, batch=2, length=6):
    torch.manual_seed(0)
    return torch.randn(batch, length, 8).to(device_of(backend))


@pytest.mark.parametrize(("merge", "dtype"), [(True, torch.bfloat16), (False, torch.float32)])
@pytest.mark.parametrize("backend", BACKENDS)
def test_opcheck_of_the_scan(backend, merge, dtype):
    tensors, table = make(device_of(backend), dtype)
    initial = tensors.pop("initial_state")
    for name, axis in (("u", 2), ("z", 2), ("B", 3), ("C", 3)):  # the operator's canonical form: paths, groups
        tensors[name] = tensors[name].detach().unsqueeze(axis).requires_grad_()
    arguments = (*tensors.values(), table.int(), initial, True, merge, True, backend)
    torch.library.opcheck(torch.ops.vision_mamba.selective_scan, arguments)
    plain = [a.detach() if isinstance(a, torch.Tensor) else a for a in arguments]
    y, last_state, states = torch.ops.vision_mamba.selective_scan(*plain)
    backward = (torch.ones_like(y), torch.ones_like(last_state), states, *plain[:12], backend)
    torch.library.opcheck(torch.ops.vision_mamba.selective_scan_backward, backward)
    if load_backend(backend).wants_output(plain[0], plain[2], plain[6], merge):
        torch.library.opcheck(torch.ops.vision_mamba.selective_scan_backward, (*backward, y))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("backend", BACKENDS)
def test_opcheck_of_the_convolution(backend, dtype):
    tensors, table = make(device_of(backend), dtype)
    x, weight, bias = tensors["u"], tensors["A"], tensors["D"]
    arguments = (x, weight, bias, table.int(), True, backend)
    torch.library.opcheck(torch.ops.vision_mamba.causal_conv1d, arguments)
    plain = [a.detach() if isinstance(a, torch.Tensor) else a for a in arguments]
    dy = torch.ones(1, 5, 2, 3, device=x.device, dtype=dtype)
    torch.library.opcheck(torch.ops.vision_mamba.causal_conv1d_backward, (dy, *plain))


@pytest.mark.parametrize("backend", BACKENDS)
def test_compiles_without_graph_break(backend):
    layer, x = Mixer(backend).to(device_of(backend)), tokens(backend)
    expected = gradients(layer, layer, x)
    found = gradients(layer, torch.compile(layer, fullgraph=True, backend="aot_eager"), x)
    for name, value in found.items():
        assert torch.equal(value, expected[name]), name


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("backend", BACKENDS)
def test_activation_checkpointing_gives_equal_gradients(backend, use_reentrant):
    layer, x = Mixer(backend).to(device_of(backend)), tokens(backend).requires_grad_()
    expected = gradients(layer, layer, x)
    found = gradients(layer, lambda x: checkpoint(layer, x, use_reentrant=use_reentrant), x)
    for name, value in found.items():
        assert torch.equal(value, expected[name]), name


@pytest.mark.parametrize("backend", BACKENDS)
def test_selective_checkpointing_runs_a_scan_once(backend, monkeypatch):
    runs = record_scans(backend, monkeypatch)
    layer, x = Mixer(backend).to(device_of(backend)), tokens(backend).requires_grad_()
    expected = gradients(layer, layer, x)
    runs.clear()

    def checkpointed(x):
        return checkpoint(layer, x, use_reentrant=False, context_fn=keep_scans)

    for name, value in gradients(layer, checkpointed, x).items():
        assert torch.equal(value, expected[name]), name
    assert len(runs) == 1
    y = checkpointed(x).square().sum()
    for _ in range(2):  # a graph that is kept is computed again, from the same results
        (found,) = torch.autograd.grad(y, x, retain_graph=True)
        (wanted,) = torch.autograd.grad(layer(x).square().sum(), x)
        assert torch.equal(found, wanted)


def test_selective_checkpointing_sees_an_output_that_was_changed():
    tensors, table = make("cpu")
    u = tensors.pop("u")
    out = checkpoint(
        lambda u: selective_scan(u, **tensors, paths=table).mul_(2).exp(), u, use_reentrant=False, context_fn=keep_scans
    )
    with pytest.raises(RuntimeError, match="changed in place"):
        out.sum().backward()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("backend", BACKENDS)
def test_autocast(backend, dtype):
    """Projections in low precision, parameters, states and their gradients in float32."""
    device = device_of(backend)
    layer, x = Mixer(backend).to(device), tokens(backend)
    reference = Mixer("reference").double()
    expected = gradients(reference, reference, x.cpu().double())

    def autocast(x):
        with torch.autocast(device, dtype):
            return layer(x)

    found = gradients(layer, autocast, x)
    for name, value in found.items():
        assert value.dtype == torch.float32, name
        assert_close(name, value.cpu(), expected[name], 3e-2 if dtype == torch.bfloat16 else 4e-3)


def train_in_parallel(rank, folder, device, backend):
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "nccl" if device == "cuda" else "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2
    )
    here = f"cuda:{rank}" if device == "cuda" else "cpu"
    layer = DistributedDataParallel(Mixer(backend).to(here), device_ids=[rank] if device == "cuda" else None)
    x = tokens("cpu").to(here)
    layer(x[rank : rank + 1]).square().sum().backward()
    torch.save({n: p.grad.cpu() for n, p in layer.module.named_parameters()}, f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


def check_data_parallel(folder, device, backend):
    layer = Mixer("cpu")
    layer(tokens("cpu")).square().sum().backward()
    torch.multiprocessing.spawn(train_in_parallel, (str(folder), device, backend), nprocs=2)
    first, second = (torch.load(folder / f"{rank}.pt", weights_only=True) for rank in (0, 1))
    for name, parameter in layer.named_parameters():
        assert torch.equal(first[name], second[name]), name
        assert_close(name, 2 * first[name], parameter.grad, 1e-5)  # the processes' mean, of a sum over the batch


@pytest.mark.slow
def test_data_parallel_on_the_cpu(tmp_path):
    check_data_parallel(tmp_path, "cpu", "cpu")


@pytest.mark.gpu
@needs_gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_triton_data_parallel(tmp_path):
    check_data_parallel(tmp_path, "cuda", "triton")


@pytest.mark.gpu
@needs_gpu
def test_triton_in_a_cuda_graph():
    """Captured with one input, replayed with another."""
    torch.use_deterministic_algorithms(False)  # filling what is uninitialised would be captured too
    layer, length = Mixer("triton").to(DEVICE), 200
    batches = [torch.randn(2, length, 8, device=DEVICE) for _ in range(2)]
    expected = gradients(layer, layer, batches[1])
    static = batches[0].clone()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            gradients(layer, layer, static)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    layer.zero_grad(set_to_none=True)
    with torch.cuda.graph(graph):
        found = gradients(layer, layer, static)
    static.copy_(batches[1])
    graph.replay()
    for name, value in found.items():
        assert torch.equal(value, expected[name]), name


@pytest.mark.gpu
@needs_gpu
def test_triton_compiled_by_inductor():
    layer, x = Mixer("triton").to(DEVICE), tokens("triton", length=200)
    expected = gradients(layer, layer, x)
    for name, value in gradients(layer, torch.compile(layer, fullgraph=True), x).items():
        assert_close(name, value, expected[name], 1e-5)


@pytest.mark.gpu
@needs_gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_triton_on_a_device_that_is_not_the_current_one():
    expected = gradients(layer := Mixer("cpu"), layer, tokens("cpu"))
    layer = Mixer("triton").to("cuda:1")
    for name, value in gradients(layer, layer, tokens("cpu").to("cuda:1")).items():
        assert_close(name, value.cpu(), expected[name], 1e-5)


@pytest.mark.gpu
@needs_gpu
def test_triton_convolution_compiles_nothing_new_for_other_lengths():
    from vision_mamba.ops.triton import causal_conv1d as module

    counts = []
    for length in (197, 1, 190, 192, 196, 208, 785):
        layer = Mixer("triton").to(DEVICE)
        gradients(layer, layer, tokens("triton", length=length))
        kernels = (module._conv_forward_kernel, module._conv_backward_kernel)
        counts.append(sum(len(cache[0]) for kernel in kernels for cache in kernel.device_caches.values()))
    assert counts[-1] == counts[0]
