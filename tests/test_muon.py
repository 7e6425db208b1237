"""Muon against timm's, against singular value decomposition, and in a run that is resumed."""

import copy

import pytest
import timm
import torch
from torch import nn

import vision_mamba  # noqa: F401  (registers the models)
from vision_mamba.engine import muon
from vision_mamba.engine.muon import GroupedMuon, orthogonalise, parameter_groups


@pytest.mark.parametrize("shape", [(4, 16, 16), (3, 24, 64), (2, 64, 24)])
def test_singular_values_come_near_one_and_vectors_stay(shape):
    torch.manual_seed(0)
    x = torch.randn(shape) * torch.tensor([1e-6, 1.0, 1e3, 1.0])[: shape[0], None, None]
    u, _, v = torch.linalg.svd(x, full_matrices=False)
    y = orthogonalise(x, eps=1e-12).float()
    # In the basis of x the result is diagonal: what lies beside the diagonal is bfloat16's rounding.
    inner = u.mT @ y @ v.mT
    diagonal = inner.diagonal(dim1=1, dim2=2)
    largest = diagonal[:, : shape[1] // 4]
    assert ((largest > 0.6) & (largest < 1.3)).all() and (diagonal > 0).all() and (diagonal < 1.3).all()
    assert (inner - torch.diag_embed(diagonal)).abs().max() < 0.05
    assert torch.equal(orthogonalise(torch.zeros(1, 8, 8), eps=1e-7), torch.zeros(1, 8, 8, dtype=torch.bfloat16))


class Net(nn.Module):
    """Matrices of two shapes, one of them twice, a convolution, a bias, a norm."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 16, 4, stride=4)
        self.first, self.second = nn.Linear(16, 16), nn.Linear(16, 16)
        self.norm = nn.LayerNorm(16)
        self.wide = nn.Linear(16, 40)

    def forward(self, x):
        x = self.conv(x).mean((2, 3))
        return self.wide(self.norm(x + self.second(torch.tanh(self.first(x)))))


def train(optimizer_of, steps=5):
    torch.manual_seed(0)
    net = Net()
    optimizer = optimizer_of(net)
    before = {name: p.detach().clone() for name, p in net.named_parameters()}
    x, y = torch.randn(32, 3, 16, 16), torch.randint(40, (32,))
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(net(x), y)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return {name: p.detach() - before[name] for name, p in net.named_parameters()}, losses


def test_steps_are_those_of_timm():
    timm_muon = pytest.importorskip("timm.optim.muon")
    settings = dict(lr=0.01, momentum=0.9)
    ours, losses = train(lambda net: GroupedMuon(parameter_groups(net, 0.05), **settings))
    groups = timm.optim.param_groups_weight_decay
    coefficients = list(muon._COEFFICIENTS)
    theirs, _ = train(
        lambda net: timm_muon.Muon(groups(net, weight_decay=0.05), ns_coefficients=coefficients, **settings)
    )
    assert losses[-1] < losses[0]
    for name, step in theirs.items():
        # Equal bits where a batch of products is rounded as single ones are; else what bfloat16 leaves of five iterations.
        assert (ours[name] - step).norm() < 5e-3 * step.norm(), name


def test_stacks_are_matrices_of_their_own():
    torch.manual_seed(0)
    stack = nn.Parameter(torch.randn(3, 16, 24))
    apart = [nn.Parameter(matrix.clone()) for matrix in stack.detach()]
    stack.grad = torch.randn_like(stack)
    for parameter, gradient in zip(apart, stack.grad, strict=True):
        parameter.grad = gradient.clone()
    for params in ([stack], apart):
        GroupedMuon(params, 0.1, weight_decay=0.1).step()
    torch.testing.assert_close(stack.detach(), torch.stack([p.detach() for p in apart]), rtol=0, atol=0)


@pytest.mark.parametrize("name", ["test_vim", "test_vmamba", "test_rsmamba", "test_vit", "test_resnet"])
def test_what_is_a_matrix_in_a_model(name):
    model = timm.create_model(name)
    plain, decayed = parameter_groups(model, 0.05)
    assert plain["weight_decay"] == 0 and not plain["muon"] and decayed["weight_decay"] == 0.05
    chosen = {id(p) for p in decayed["params"] if muon.is_matrix(p)}
    names = {n for n, p in model.named_parameters() if id(p) in chosen}
    last = {n.rsplit(".", 1)[-1] for n in names}
    assert not last & {"A_log", "D", "dt_proj_bias", "conv_weight", "pos_embed", "cls_token", "bias"}
    assert any(n.startswith(("head", "fc")) for n in names) and not any("conv2d" in n for n in names)
    assert len(plain["params"]) + len(decayed["params"]) == len(list(model.parameters()))


def test_state_is_restored():
    torch.manual_seed(0)
    x, y = torch.randn(32, 3, 16, 16), torch.randint(40, (32,))
    nets = [Net(), Net()]
    nets[1].load_state_dict(nets[0].state_dict())
    optimizers = [GroupedMuon(parameter_groups(net, 0.05), 0.01) for net in nets]

    def step(i):
        optimizers[i].zero_grad()
        nn.functional.cross_entropy(nets[i](x), y).backward()
        optimizers[i].step()

    for _ in range(3):
        step(0)
    nets[1].load_state_dict(nets[0].state_dict())
    optimizers[1].load_state_dict(copy.deepcopy(optimizers[0].state_dict()))
    for i in (0, 1):
        step(i)
    for a, b in zip(*(net.parameters() for net in nets), strict=True):
        assert torch.equal(a, b)
