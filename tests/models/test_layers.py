"""Layers whose GPU form computes in another way than the plain one, and their gradients."""

import pytest
import timm
import timm.utils
import torch
from torch.nn import functional as F

from tests.conftest import assert_close
from vision_mamba.layers import MambaMixer, MultiPathMixer, OverlapPatchEmbed, depthwise_conv, mamba
from vision_mamba.layers.mamba import CastLinear, FusedMambaMixer, FusedScan, shared_linear
from vision_mamba.layers.multi_path import FusedMultiPathMixer
from vision_mamba.layers.ss2d import SS2D, FusedSS2D
from vision_mamba.models.mambavision import ConvBlock


@pytest.mark.parametrize("size", [(32, 48), (16, 16)])
@pytest.mark.parametrize("stride", [16, 8])
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_patches_are_a_product(size, stride, device):
    """What a GPU computes as one product is the convolution, whatever the images' memory format; its gradients too."""
    torch.manual_seed(0)
    embed = OverlapPatchEmbed(size, 16, stride, in_chans=5, embed_dim=24, device=device, dtype=torch.float64)
    images = torch.randn(2, 5, *size, dtype=torch.float64, device=device, requires_grad=True)
    wanted = images, embed.proj.weight, embed.proj.bias
    expected = embed.proj(images).permute(0, 2, 3, 1)
    gradients = torch.autograd.grad(expected.sin().sum(), wanted)
    for given in (images, images.to(memory_format=torch.channels_last)):
        tokens = embed._project(given)
        assert_close("tokens", tokens, expected, 1e-12)
        assert_close("forward", embed(given), expected, 1e-12)
        for found, gradient in zip(torch.autograd.grad(tokens.sin().sum(), wanted), gradients, strict=True):
            assert_close("gradient", found, gradient, 1e-12)


def test_gradients_of_a_shared_product():
    """Of tokens that are read twice: by the product, and by what follows it; twice differentiable."""
    torch.manual_seed(0)
    x = torch.randn(2, 5, 6, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(4, 6, dtype=torch.float64, requires_grad=True)

    def shared(x, weight):
        tokens, product = shared_linear(2 * x, weight)
        return (tokens.sin() * tokens).sum() + (product**2).sum()

    def plain(x, weight):
        tokens = 2 * x
        return (tokens.sin() * tokens).sum() + (F.linear(tokens, weight) ** 2).sum()

    expected = torch.autograd.grad(plain(x, weight), (x, weight))
    for found, gradient in zip(torch.autograd.grad(shared(x, weight), (x, weight)), expected, strict=True):
        assert_close("gradient", found, gradient, 1e-12)
    assert torch.autograd.gradgradcheck(shared, (x, weight))


def test_a_shared_product_leaves_the_gradients_of_others_alone():
    """The product's gradient is added in place, to a tensor that must be nobody else's: an expanded one is copied."""
    x = torch.randn(3, 6, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(4, 6, dtype=torch.float64)
    tokens, product = shared_linear(2 * x, weight)
    (tokens.sum() + product.sum()).backward()  # the gradient of a sum is one number, seen everywhere
    assert_close("gradient", x.grad, 2 * (1 + weight.sum(0)).expand(3, 6), 1e-12)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"average": True, "num_paths": 3, "layer_scale": 0.3},
        {"share_paths": True},
        {"share_paths": True, "num_paths": 3, "average": True},
        {"num_paths": 1, "layer_scale": 0.3},
    ],
    ids=str,
)
@pytest.mark.parametrize("many", [1, 10**9])
def test_fused_mixer_is_the_mixer(options, many, monkeypatch):
    """Paths are averaged and scaled within the output projection, and the matrices of all paths are one.

    Of many tokens the input projection is two products, unless somebody looks at it or has put something in its place.
    """
    monkeypatch.setattr(mamba, "_MANY_TOKENS", many)
    torch.manual_seed(0)
    mixer = MambaMixer(12, d_state=4, **options)
    paths = torch.stack([torch.randperm(20) for _ in range(mixer.num_paths)])
    fused = FusedMambaMixer(mixer)
    with torch.no_grad():
        x = torch.randn(2, 20, 12)
        assert_close("float32", fused(x, paths), mixer(x, paths), 1e-5)
        hooks = [m.in_proj.register_forward_hook(lambda module, given, product: 2 * product) for m in (fused, mixer)]
        assert_close("hook", fused(x, paths), mixer(x, paths), 1e-5)
        assert_close("hook before", FusedMambaMixer(mixer)(x, paths), mixer(x, paths), 1e-5)
        for hook in hooks:
            hook.remove()
        # What was cast in the pass before is of no use any more.
        x, fused = x.double(), fused.double()
        assert_close("float64", fused(x, paths), MambaMixer.forward(mixer.double(), x, paths), 1e-6)
    assert not any(p.requires_grad for name, p in fused.named_parameters() if "in_proj" not in name)
    assert mixer.fuse() is mixer, "on a CPU the block-diagonal product takes longer"


def test_what_a_fused_scan_keeps():
    """Casts made in one pass serve the next, but not one that reads other parameters, gradients, or a compiler's memory."""
    torch.manual_seed(0)
    mixer = MambaMixer(8, d_state=3)
    paths = torch.stack([torch.arange(6), torch.arange(6).flip(0)])
    arguments = mixer.x_proj_weight, mixer.dt_proj_weight, mixer.dt_proj_bias, mixer.A_log, mixer.D
    scan, exact = (FusedScan(*arguments, own_tokens=True) for _ in range(2))
    u = torch.randn(2, 6, 2, 16, dtype=torch.float64)
    expected = exact.double()(u, None, paths, "sum")

    compiled = torch.compile(scan, fullgraph=True, backend="aot_eager")
    assert_close("compiled", compiled(u, None, paths, "sum"), expected, 1e-6)
    assert not scan._cast.kept
    with torch.inference_mode():
        assert_close("inference", scan(u, None, paths, "sum"), expected, 1e-6)
    kept = scan._cast("rows", scan.rows, torch.float64)
    leaf = u.clone().requires_grad_()
    y = scan(leaf, None, paths, "sum")
    (gradient,) = torch.autograd.grad(y.square().sum(), leaf)
    leaf = u.clone().requires_grad_()
    (expected_gradient,) = torch.autograd.grad(exact(leaf, None, paths, "sum").square().sum(), leaf)
    assert_close("gradient", gradient, expected_gradient, 1e-6)
    assert kept is scan._cast("rows", scan.rows, torch.float64)

    state = {name: tensor.clone() for name, tensor in scan.state_dict().items()}
    state["rows"] *= 2
    scan.load_state_dict(state)
    assert_close("other parameters", scan._cast("rows", scan.rows, torch.float64), state["rows"].double(), 1e-12)


def test_when_the_inputs_of_a_scan_come_from_one_kernel(monkeypatch):
    """Elsewhere from products, which gradients, compilers and counters of FLOPs see."""
    from torch.utils.flop_counter import FlopCounterMode

    def scan_of(own_tokens=True, **options):
        mixer = MambaMixer(16, **options)
        return FusedScan(
            mixer.x_proj_weight, mixer.dt_proj_weight, mixer.dt_proj_bias, mixer.A_log, mixer.D, own_tokens=own_tokens
        )

    u = torch.randn(1, 5, 2, 32, dtype=torch.bfloat16)
    scan = scan_of()
    assert not scan._in_one_kernel(u), "on a CPU"
    monkeypatch.setattr(mamba, "resolve_backend", lambda *_: "triton")
    assert scan._in_one_kernel(u) and scan._in_one_kernel(u.half())
    assert not scan._in_one_kernel(u.float()), "its numbers would be rounded"
    assert not scan._in_one_kernel(u.clone().requires_grad_())
    assert not scan_of(own_tokens=False)._in_one_kernel(u[:, :, 0]), "not faster"
    assert not scan_of(d_state=64)._in_one_kernel(u), "more than a program holds"
    with FlopCounterMode(display=False):
        assert not scan._in_one_kernel(u)


def test_a_layer_that_is_cast_once():
    """It is not missed that its parameters have changed, been replaced, moved or want gradients."""
    torch.manual_seed(0)
    plain = torch.nn.Linear(6, 4)
    layer = CastLinear.instead_of(plain)
    x = torch.randn(3, 6, dtype=torch.bfloat16)

    def agrees(weight=plain.weight):
        expected = torch.nn.functional.linear(x, weight.bfloat16(), plain.bias.bfloat16())
        return torch.equal(layer(x), expected)

    with torch.no_grad():
        assert agrees() and len(layer._cast.kept) == 2
        assert layer.cast(torch.bfloat16)[0] is layer.cast(torch.bfloat16)[0]
        plain.weight.mul_(2)
        assert agrees()
        layer.weight = torch.nn.Parameter(torch.randn(4, 6))
        assert agrees(layer.weight)
        layer.load_state_dict(plain.state_dict())
        assert agrees()
        layer.double().float()
        assert agrees()
    with torch.autocast("cpu", torch.bfloat16):
        layer(x).sum().backward()
    assert layer.weight.grad is not None
    plain.register_forward_hook(lambda module, given, product: None)
    assert CastLinear.instead_of(plain) is plain


@pytest.mark.parametrize("gate", [False, True])
def test_fused_ss2d_is_ss2d(gate):
    torch.manual_seed(0)
    mixer = SS2D(12, d_state=3, gate=gate).double()
    x = torch.randn(2, 4, 5, 12, dtype=torch.float64)
    with torch.no_grad():
        assert_close("float64", FusedSS2D(mixer)(x), mixer(x), 1e-12)


@pytest.mark.parametrize("merge", ["gate", "mean"])
@pytest.mark.parametrize("num_paths", [1, 3])
def test_fused_multi_path_mixer_is_the_mixer(merge, num_paths):
    """Where hooks look at the output projection they see it called as it was."""
    torch.manual_seed(0)
    mixer = MultiPathMixer(12, d_state=4, num_paths=num_paths, merge=merge).double()
    paths = torch.stack([torch.randperm(20) for _ in range(num_paths)])
    x = torch.randn(2, 20, 12, dtype=torch.float64)
    with torch.no_grad():
        assert_close("float64", FusedMultiPathMixer(mixer)(x, paths), mixer(x, paths), 1e-12)
        mixer.out_proj.register_forward_hook(lambda module, given, product: 2 * product)
        assert_close("hook", FusedMultiPathMixer(mixer)(x, paths), mixer(x, paths), 1e-12)
    assert mixer.fuse() is mixer, "not on a CPU"


def test_norms_within_convolutions():
    """Of MambaVision's first stages; nothing changes where somebody looks at them, or they are there already."""
    torch.manual_seed(0)
    block = ConvBlock(8, drop_path=0.0)
    for norm in (block.norm1, block.norm2):
        for tensor in (norm.weight, norm.bias, norm.running_mean, norm.running_var):
            torch.nn.init.uniform_(tensor, 0.5, 1.5)
    x = torch.randn(2, 5, 6, 8)
    fused = block.fuse()
    assert fused.training and isinstance(block.norm1, torch.nn.BatchNorm2d)
    with torch.no_grad():
        assert_close("map", fused.eval()(x), block.eval()(x), 1e-5)
    assert isinstance(fused.norm1, torch.nn.Identity) and fused.fuse() is fused
    block.norm2.register_forward_hook(lambda *given: None)
    assert block.fuse() is block


def test_mlps_share_their_weights_when_they_are_cast_once():
    model = timm.create_model("test_vmamba").eval()
    fused = timm.utils.reparameterize_model(model, inplace=False)
    linears = [module for module in fused.modules() if isinstance(module, CastLinear)]
    assert len(linears) == 2 * sum(isinstance(module, timm.layers.Mlp) for module in model.modules()) > 0
    x = torch.randn(1, 3, *model.pretrained_cfg["input_size"][1:])
    with torch.no_grad():
        assert torch.equal(fused(x), model(x))
        mlp = next(module for module in model.modules() if isinstance(module, timm.layers.Mlp))
        assert mlp.fuse().fc1.weight is mlp.fc1.weight and type(mlp.fc1) is torch.nn.Linear
        assert fused.state_dict().keys() == model.state_dict().keys()


@pytest.mark.gpu
@pytest.mark.parametrize(
    "name", ["vim_tiny_patch16_224", "vmamba_tiny_s1l8", "samba", "rsmamba_base", "mambavision_tiny"]
)
def test_reparameterized_models_agree(name):
    """``timm.utils.reparameterize_model``: float32, and bfloat16 autocast beside the model's own float32."""
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=10).cuda().eval()
    fused = timm.utils.reparameterize_model(model)
    of_inference = FusedMambaMixer | FusedMultiPathMixer | FusedSS2D | CastLinear
    assert any(isinstance(module, of_inference) for module in fused.modules())
    assert not any(isinstance(module, of_inference) for module in model.modules()), "a copy"
    x = torch.randn(2, 3, *model.pretrained_cfg["input_size"][1:], device="cuda")
    with torch.no_grad():
        expected = model(x)
        assert_close("float32", fused(x), expected, 1e-4)
        with torch.autocast("cuda", torch.bfloat16):
            errors = [((m(x).float() - expected).norm() / expected.norm()).item() for m in (fused, model)]
    assert errors[0] < 1.5 * errors[1] + 1e-3, errors


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("change", [{"padding_mode": "circular"}, {"dilation": (2, 2), "padding": (2, 2)}], ids=str)
def test_a_convolution_that_was_changed_is_what_it_says(change, device, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    torch.manual_seed(0)
    conv = torch.nn.Conv2d(6, 6, 3, padding=1, groups=6).to(device)
    x = torch.randn(2, 5, 7, 6, device=device)
    usual = depthwise_conv(x, conv, "gelu")
    for name, value in change.items():
        setattr(conv, name, value)
    found, expected = depthwise_conv(x, conv, "gelu"), F.gelu(conv(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1))
    assert torch.equal(found, expected) and not torch.allclose(found, usual, atol=0.01)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("name", ["test_vmamba", "test_samba"])
def test_modules_with_hooks_are_called_and_give_the_same(name, device, monkeypatch):
    """Where nobody looks, convolutions with their norms or activations, and MLPs, are operators of ours on a GPU."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=10).to(device).eval()
    for module in model.modules():  # as after training: a bias of zero would show nothing
        if isinstance(module, torch.nn.Conv2d | torch.nn.Linear) and module.bias is not None:
            torch.nn.init.normal_(module.bias, std=0.3)
    x = torch.randn(2, 3, *model.pretrained_cfg["input_size"][1:], device=device)

    def passed():
        model.zero_grad()
        out = model(x)
        out.square().sum().backward()
        return {"output": out.detach()} | {n: p.grad.clone() for n, p in model.named_parameters()}

    alone, called = passed(), []
    modules = [m for m in model.modules() if isinstance(m, torch.nn.Conv2d | torch.nn.Linear | torch.nn.LayerNorm)]
    for module in modules:
        module.register_forward_hook(lambda module, *given: called.append(module))
    observed = passed()
    assert {id(m) for m in modules if isinstance(m, torch.nn.Conv2d)} <= {id(module) for module in called}
    for tensor, value in observed.items():
        assert_close(tensor, alone[tensor], value, 2e-4)
