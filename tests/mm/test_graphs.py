"""Training passes as CUDA graphs: what a backbone computes with them is what it computes without."""

import copy
import pickle

import pytest
import torch
from mmengine.model import MMDistributedDataParallel
from mmengine.optim import AmpOptimWrapper
from torch import nn

from tests.conftest import assert_close, relative_error
from vision_mamba.engine import graphs
from vision_mamba.mm import VisionMambaBackbone

TOLERANCE = {None: 1e-4, torch.bfloat16: 2e-2}


def both(name="test_vmamba", **args):
    """The same backbone without and with graphs, on the GPU, in training mode."""
    torch.manual_seed(0)
    plain = VisionMambaBackbone(name, (0, 1, 2, 3), **args)
    replayed = VisionMambaBackbone(name, (0, 1, 2, 3), cuda_graphs=True, **args)
    replayed.load_state_dict(plain.state_dict())
    return plain.cuda().train(), replayed.cuda().train()


def images(*sides, seed=0):
    return torch.randn(2, 3, *sides, generator=torch.Generator().manual_seed(seed)).cuda()


def loss_of(net, x, amp=None):
    with torch.autocast("cuda", amp, enabled=amp is not None):
        return sum((m.float() ** 3).mean() for m in net(x))


def gradients(net):
    return torch.cat([p.grad.flatten() for p in net.parameters() if p.grad is not None])


def captures(net):
    return len(net._graphs._captures)


def test_runs_eagerly_on_a_cpu():
    plain = VisionMambaBackbone("test_vmamba").train()
    asked = VisionMambaBackbone("test_vmamba", cuda_graphs=True).train()
    asked.load_state_dict(plain.state_dict())
    x = torch.randn(1, 3, 64, 64)
    expected = plain(x)
    for net in (asked, copy.deepcopy(asked), pickle.loads(pickle.dumps(asked))):
        assert all(torch.equal(a, b) for a, b in zip(net(x), expected, strict=True))
        assert captures(net) == 0


def test_what_it_does_not_go_with():
    with pytest.raises(ValueError, match="cuda_graphs with with_cp cannot drop the same paths again"):
        VisionMambaBackbone("test_vmamba", cuda_graphs=True, with_cp=True, drop_path_rate=0.1)


@pytest.mark.gpu
@pytest.mark.parametrize("amp", [None, torch.bfloat16])
@pytest.mark.parametrize("name", ["test_vmamba", "test_vim", "test_resnet"])
def test_trains_as_without(name, amp):
    """Two shapes in turn, an evaluation between; test_resnet's batch norms have statistics."""
    nets = both(name)
    optimizers = [torch.optim.SGD(net.parameters(), lr=0.01) for net in nets]
    sides = [(64, 96), (96, 96), (64, 96), (64, 96), (96, 96)]
    for i, size in enumerate(sides):
        losses = []
        for net, optimizer in zip(nets, optimizers, strict=True):
            loss = loss_of(net, images(*size, seed=i), amp)
            loss.backward()
            losses.append(loss.detach())
            optimizer.step()
        assert_close("loss", losses[1], losses[0], TOLERANCE[amp])
        assert_close("gradients", gradients(nets[1]), gradients(nets[0]), TOLERANCE[amp])
        for optimizer in optimizers:
            optimizer.zero_grad()
        if i == 2:
            with torch.no_grad():
                maps = [net.eval()(images(64, 64)) for net in nets]
            for a, b in zip(*maps, strict=True):
                assert_close("evaluation", b, a, TOLERANCE[amp])
            for net in nets:
                net.train()
    assert captures(nets[1]) == 2
    for key, value in nets[0].state_dict().items():
        if value.is_floating_point():
            assert_close(key, nets[1].state_dict()[key], value, TOLERANCE[amp])
        else:
            assert torch.equal(nets[1].state_dict()[key], value), key


@pytest.mark.gpu
def test_what_it_gives_is_not_overwritten():
    """Maps and gradients stay, so that gradients add up."""
    plain, replayed = both()
    first = [m.detach() for m in replayed(images(64, 64))]
    kept = [m.clone() for m in first]
    for seed in range(2):
        for net in (plain, replayed):
            loss_of(net, images(64, 64, seed=seed)).backward()
    assert all(torch.equal(a, b) for a, b in zip(first, kept, strict=True))
    assert_close("sum of gradients", gradients(replayed), gradients(plain), 1e-5)


@pytest.mark.gpu
def test_two_forward_passes_before_a_backward_pass():
    plain, replayed = both()
    for net in (plain, replayed):
        for _ in range(2):
            net.zero_grad()
            (loss_of(net, images(64, 64, seed=1)) + loss_of(net, images(64, 64, seed=2))).backward()
    assert_close("gradients", gradients(replayed), gradients(plain), 1e-5)
    loss = loss_of(replayed, images(64, 64))
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="only once for a forward pass"):
        loss.backward()


@pytest.mark.gpu
def test_random_numbers_are_drawn_anew():
    """Drop path: those of eager passes, other ones at every replay."""
    plain, replayed = both(drop_path_rate=0.5)
    found = []
    for net in (plain, replayed):
        torch.manual_seed(7)
        passes = []
        for _ in range(4):
            maps = net(images(64, 64))
            sum(m.sum() for m in maps).backward()
            passes.append(maps[-1].detach())
        found.append(passes)
    for a, b in zip(*found, strict=True):
        assert_close("maps", b, a, 1e-5)
    assert any(relative_error(p, found[1][0]) > 1e-3 for p in found[1][1:])
    assert captures(replayed) == 1


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["test_vmamba", "test_vim"])
def test_frozen_stages(name):
    """Maps of frozen blocks want no gradient (test_vim); what is thawed later is trained."""
    nets = both(name, frozen_stages=2)
    for _ in range(2):
        for net in nets:
            net.zero_grad()
            loss_of(net, images(64, 64)).backward()
        assert_close("gradients", gradients(nets[1]), gradients(nets[0]), 1e-5)
        flags = [[m.requires_grad for m in net(images(64, 64))] for net in nets]
        assert flags[0] == flags[1]
    for net in nets:
        net.zero_grad()
        net.requires_grad_(True)
        net.frozen_stages = -1
        loss_of(net.train(), images(64, 64)).backward()
    assert_close("gradients", gradients(nets[1]), gradients(nets[0]), 1e-5)
    assert captures(nets[1]) == 1


@pytest.mark.gpu
def test_copies_and_moves():
    """A copy has captures of its own; after a move they are made anew, with the parameters where they are now."""
    plain, replayed = both()
    loss_of(replayed, images(64, 64)).backward()
    replayed.zero_grad()
    copies = [copy.deepcopy(replayed), pickle.loads(pickle.dumps(replayed))]
    assert [captures(c) for c in copies] == [0, 0]
    with torch.no_grad():  # the copies do not see what happens to the original
        for p in replayed.parameters():
            p.zero_()
    replayed.load_state_dict(plain.state_dict())
    moved = replayed.cpu().cuda()
    loss_of(plain, images(64, 64)).backward()
    for net in (moved, *copies):
        loss_of(net, images(64, 64)).backward()
        assert captures(net) == 1
        assert_close("gradients", gradients(net), gradients(plain), 1e-5)


@pytest.mark.gpu
def test_many_shapes(monkeypatch):
    """They share memory; beyond a limit shapes run eagerly."""
    plain, replayed = both()
    loss_of(replayed, images(512, 512)).backward()
    largest = replayed._graphs.memory
    assert largest > 0
    sides = [(256, 512), (512, 256), (384, 384), (448, 448)]
    for size in sides:
        loss_of(replayed, images(*size)).backward()
    assert captures(replayed) == 5
    assert replayed._graphs.memory < 1.5 * largest
    monkeypatch.setattr(graphs, "MAX_CAPTURES", 5)
    replayed.zero_grad()
    with pytest.warns(UserWarning, match=r"5 shapes of inputs are captured .* \(2, 3, 64, 96\), run eagerly"):
        loss_of(replayed, images(64, 96)).backward()
    loss_of(plain, images(64, 96)).backward()
    assert captures(replayed) == 5
    assert_close("gradients", gradients(replayed), gradients(plain), 1e-5)


@pytest.mark.gpu
def test_mmengines_autocast_and_accumulation():
    """Its autocast remembers casts, and its scaled gradients add up over two batches."""
    nets = both()
    for net in nets:
        optimizer = torch.optim.SGD(net.parameters(), lr=0.01)
        wrapper = AmpOptimWrapper(dtype="bfloat16", optimizer=optimizer, accumulative_counts=2)
        wrapper.initialize_count_status(net, 0, 8)
        for i in range(8):
            with wrapper.optim_context(net):
                loss = sum((m.float() ** 3).mean() for m in net(images(64, 96 if i % 3 else 64, seed=i)))
            wrapper.update_params(loss)
    assert captures(nets[1]) == 2
    for key, value in nets[0].state_dict().items():
        assert_close(key, nets[1].state_dict()[key], value, 1e-2)


class Summed(nn.Module):
    """A detector to be: the backbone and a loss."""

    def __init__(self, name, cuda_graphs):
        super().__init__()
        torch.manual_seed(0)
        self.backbone = VisionMambaBackbone(name, (0, 1, 2, 3), cuda_graphs=cuda_graphs)

    def forward(self, x):
        return sum((m.float() ** 3).mean() for m in self.backbone(x))


def train_in_parallel(rank, folder, name, cuda_graphs):
    """One of two processes on one GPU. They see other sizes at other times, so they capture at other times too."""
    torch.cuda.set_device(0)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2
    )  # NCCL wants a GPU each
    net = MMDistributedDataParallel(Summed(name, cuda_graphs).cuda().train(), device_ids=[0])
    optimizer = torch.optim.SGD(net.parameters(), lr=0.01)
    for i, side in enumerate([(128, 160, 128, 160), (128, 128, 128, 192)][rank]):
        x = torch.randn(8, 3, 128, side, generator=torch.Generator().manual_seed(10 * rank + i))
        net(x.cuda()).backward()  # of few pixels batch norm would make much of rounding
        optimizer.step()
        optimizer.zero_grad()
    found = captures(net.module.backbone) if cuda_graphs else 0
    torch.save((net.module.state_dict(), found), f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["test_vmamba", "test_resnet"])
def test_two_processes_train_as_without(tmp_path, name):
    states = []
    for cuda_graphs in (False, True):
        folder = tmp_path / str(cuda_graphs)
        folder.mkdir()
        torch.multiprocessing.spawn(train_in_parallel, (str(folder), name, cuda_graphs), nprocs=2)
        (first, captures_1), (second, captures_2) = (
            torch.load(folder / f"{rank}.pt", weights_only=True) for rank in (0, 1)
        )
        assert (captures_1, captures_2) == ((2, 2) if cuda_graphs else (0, 0))
        trained = dict(Summed(name, False).named_parameters())
        assert all(torch.equal(first[key], second[key]) for key in trained)
        states.append({key: value.cpu() for key, value in first.items() if value.is_floating_point()})
    for key, value in states[0].items():
        assert_close(key, states[1][key], value, 1e-4)
    assert any(not torch.equal(states[1][key], value.detach()) for key, value in trained.items())


@pytest.mark.gpu
def test_batch_norm_of_several_processes_is_refused(monkeypatch):
    """It waits for the others within a pass that they may not capture."""
    net = nn.SyncBatchNorm.convert_sync_batchnorm(VisionMambaBackbone("test_resnet", cuda_graphs=True)).cuda().train()
    monkeypatch.setattr(graphs.dist, "is_initialized", lambda: True)
    monkeypatch.setattr(graphs.dist, "get_world_size", lambda *_: 2)
    with pytest.raises(RuntimeError, match=r"conv1\.1 is a SyncBatchNorm, .* set cuda_graphs=False"):
        net(images(64, 64))
