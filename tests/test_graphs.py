"""CUDA graphs of passes: what a capture takes for given, and what a replay gives. Training: tests/mm/test_graphs.py."""

import pytest
import timm
import torch

import vision_mamba  # noqa: F401  # registers the models
from tests.conftest import assert_close
from vision_mamba.engine import graphs


def test_state_sees_what_a_capture_takes_for_given():
    net = timm.create_model("test_vmamba").train()
    before = graphs._state(net)
    net.load_state_dict(net.state_dict())
    assert graphs._state(net) == before
    norm = next(m for m in net.modules() if isinstance(m, torch.nn.LayerNorm))
    for change in (
        norm.eval,
        lambda: norm.weight.requires_grad_(False),
        lambda: setattr(norm, "weight", torch.nn.Parameter(norm.weight.data)),
        net.double,
    ):
        change()
        after = graphs._state(net)
        assert after != before
        before = after


def test_own_leaves_are_the_same_numbers():
    """In their place for a while: other leaves over the same memory, tied where the net's are, frozen ones its own."""
    net = torch.nn.ModuleDict({"a": torch.nn.Linear(3, 3), "b": torch.nn.Linear(3, 3), "c": torch.nn.Linear(3, 3)})
    net["b"].weight = net["a"].weight
    net["c"].requires_grad_(False)
    before, x = dict(net.named_parameters(remove_duplicate=False)), torch.randn(2, 3)

    def loss():
        return (net["c"](net["b"](net["a"](x))) ** 2).sum()

    trainable = [p for p in net.parameters() if p.requires_grad]
    expected = torch.autograd.grad(loss(), trainable)
    with pytest.raises(KeyError), graphs._own_leaves(net, trainable) as leaves:
        assert len(leaves) == len(trainable) == 3
        for own, parameter in zip(leaves, trainable, strict=True):
            assert own is not parameter and own.data_ptr() == parameter.data_ptr()
        assert net["b"].weight is net["a"].weight is leaves[0] and net["c"].weight is before["c.weight"]
        for found, gradient in zip(torch.autograd.grad(loss(), leaves), expected, strict=True):
            assert torch.equal(found, gradient)
        raise KeyError
    after = dict(net.named_parameters(remove_duplicate=False))
    assert all(after[name] is parameter for name, parameter in before.items())


@pytest.mark.gpu
def test_inference_graph():
    """What a function finds, in memory that the next call writes over; parameters that change in place are seen."""
    net = timm.create_model("test_vmamba").cuda().eval()
    x = torch.randn(3, 2, 3, 64, 64, device="cuda")
    with torch.inference_mode():
        graph = graphs.InferenceGraph(net)
        for image in x:
            found = graph(image)
            assert_close("logits", found, net(image), 1e-5)
        assert graph(x[0]).data_ptr() == found.data_ptr()
        net.head.fc.bias.add_(1)
        assert_close("logits", graph(x[0]), net(x[0]), 1e-5)
        with pytest.raises(ValueError, match=r"captured for \(2, 3, 64, 64\) torch.float32, given \(1, 3, 64, 64\)"):
            graph(x[0, :1])
        with pytest.raises(graphs.CaptureError, match="cannot be captured as a CUDA graph"):
            graphs.InferenceGraph(lambda image: net(image) * image.mean().item())(x[0])
        assert_close("logits", net(x[0]), graph(x[0]), 1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("enable", [True, "selective"])
@pytest.mark.parametrize("name", ["test_vim", "test_vmamba"])
def test_training_graph_of_a_checkpointed_net(name, enable):
    net, x = timm.create_model(name).cuda().train(), torch.randn(2, 3, 64, 64, device="cuda")
    captured = graphs.TrainingGraphs()

    def gradients(forward):
        return torch.autograd.grad(forward(x).square().sum(), list(net.parameters()))

    expected = gradients(net)
    net.set_grad_checkpointing(enable)
    for found in (gradients(lambda x: captured(net, net, x)) for _ in range(2)):
        for (parameter, _), gradient, wanted in zip(net.named_parameters(), found, expected, strict=True):
            assert_close(parameter, gradient, wanted, 1e-5)
    assert captured.memory > 0

    net = timm.create_model(name, drop_path_rate=0.1).cuda().train()
    net.set_grad_checkpointing(enable)
    with pytest.raises(RuntimeError, match=r"drops at a rate of 0.\d+, and would drop others"):
        captured(net, net, x)
