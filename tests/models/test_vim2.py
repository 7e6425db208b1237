"""ViM2: there is no official code, so equations written out step by step, and the reduction to VMamba.

The rest is in test_contract.py.
"""

import re

import pytest
import timm
import torch
from torch.nn import functional as F

import vision_mamba
from tests.conftest import assert_close
from vision_mamba import VMamba
from vision_mamba.layers import ChannelMixer
from vision_mamba.models.vim2 import ViM2
from vision_mamba.paths import SS2D, scan_paths


def randomise(module, scale=0.4):
    """Every term counts: the initial values of B, C and the convolution would leave little but D."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if not name.endswith("A_log"):
                parameter.normal_(0, scale, generator=generator)
    return module


def check(actual, expected, parameters, x, tolerance):
    """Values, and the gradients of one random sum of them by every parameter and by x."""
    assert_close("output", actual, expected, tolerance)
    weights = torch.randn(expected.shape, generator=torch.Generator().manual_seed(6), dtype=expected.dtype)
    parameters = {"input": x, **parameters}
    found, wanted = (torch.autograd.grad((out * weights).sum(), parameters.values()) for out in (actual, expected))
    for name, a, b in zip(parameters, found, wanted, strict=True):
        assert b.abs().max() > 1e-9, name
        assert_close(name, a, b, tolerance)


def mix_channels(mixer, x):
    """Equations 12 to 18 for one map (H, W, dim), a channel and a direction at a time."""
    height, width, _ = x.shape
    P, N, E = mixer.summary_size, mixer.d_state, mixer.inner
    token_ids = torch.arange(height * width).reshape(height, width)
    cells = [
        token_ids[i * height // P : -(-(i + 1) * height // P), j * width // P : -(-(j + 1) * width // P)].flatten()
        for i in range(P)
        for j in range(P)
    ]
    values = x.reshape(-1, x.shape[2]) @ mixer.in_proj.weight.T  # (tokens, 2 E)
    merged = [0.0] * E
    for k, order in enumerate((range(E), reversed(range(E)))):
        past, h = [], torch.zeros(height * width, N, dtype=x.dtype)
        for c in order:
            past.append(values[:, c])
            u = mixer.conv_bias[k, 0]
            for back, weight in enumerate(mixer.conv_weight[k, 0].flip(0)):
                if back < len(past):
                    u = u + weight * past[-1 - back]
            u = u * torch.sigmoid(u)
            means = torch.stack([u[cell].mean() for cell in cells])
            dt, B, C = (mixer.x_proj_weight[k] @ means).split((1, N, N))
            step = torch.log1p(torch.exp(mixer.dt_proj_weight[k] * u + dt + mixer.dt_proj_bias[k]))
            h = torch.exp(-step[:, None] * mixer.A_log[k].exp()) * h + (step * u)[:, None] * B
            gate = values[:, E + c] * torch.sigmoid(values[:, E + c])
            merged[c] = merged[c] + (h @ C + mixer.D[k] * u) * gate
    return (mixer.out_proj.weight @ torch.stack(merged)).T.reshape(x.shape)


CASES = [((5, 3), 2, {}), ((3, 4), 5, dict(d_conv=1)), ((3, 3), 3, dict(expand=1, d_state=1)), ((1, 2), 1, {})]


@pytest.mark.parametrize("size, summary_size, kwargs", CASES)
def test_channel_mixer_is_the_equations(size, summary_size, kwargs):
    mixer = randomise(ChannelMixer(6, summary_size=summary_size, **{"d_state": 3, **kwargs}).double())
    x = torch.randn(2, *size, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).requires_grad_()
    expected = torch.stack([mix_channels(mixer, image) for image in x])
    check(mixer(x), expected, dict(mixer.named_parameters()), x, 1e-10)


def test_channel_mixer_does_not_depend_on_resolution():
    """The same picture in four times as many tokens: the same result in four times as many."""
    mixer = randomise(ChannelMixer(6, summary_size=3).double())
    x = torch.randn(1, 3, 6, 6, dtype=torch.float64)

    def finer(t):
        return t.repeat_interleave(2, 1).repeat_interleave(2, 2)

    assert_close("finer", mixer(finer(x)), finer(mixer(x)), 1e-12)


def test_four_directions_over_a_row_are_two():
    paths = scan_paths(SS2D, 1, 8)
    assert torch.equal(paths[0], paths[1]) and torch.equal(paths[2], paths[3])
    assert torch.equal(paths[0], paths[2].flip(0))


def average(stage, x):
    """Equations 19 and 20, on a stage whose mixers are taken as they are."""
    token, channel = {0: x}, {0: x}
    for number, block in enumerate(stage.blocks, start=1):
        mixed = torch.zeros_like(x)
        for i in range(number):
            mixed = mixed + block.alpha[i] * token[i] + block.beta[i] * channel[i]
        for mixer in block.token_mixers:
            mixed = mixed + mixer.mixer(F.layer_norm(mixed, mixed.shape[-1:], mixer.norm1.weight, mixer.norm1.bias))
        token[number] = mixed
        mixed = block.theta[number] * token[number]
        for i in range(number):
            mixed = mixed + block.theta[i] * token[i] + block.gamma[i] * channel[i]
        mixer = block.channel_mixer
        normed = F.layer_norm(mixed, mixed.shape[-1:], mixer.norm1.weight, mixer.norm1.bias)
        channel[number] = mixed + mixer.mixer(normed)
    return channel[len(stage.blocks)]


def model(token_mixers=2, depths=(1, 1, 3, 1), **kwargs):
    torch.manual_seed(0)
    return ViM2(
        num_classes=5, embed_dim=8, depths=depths, token_mixers=token_mixers, d_state=2, summary_size=2, **kwargs
    ).eval()


def test_weighted_average_is_the_equations():
    stage = randomise(model(depths=(3, 1, 1, 1)).stages[0].double(), 0.5)
    blocks = stage.blocks
    names = ("alpha", "beta", "theta", "gamma")
    assert [tuple(len(getattr(b, n)) for n in names) for b in blocks] == [(1, 1, 2, 1), (2, 2, 3, 2), (3, 3, 4, 3)]
    x = torch.randn(2, 4, 3, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).requires_grad_()
    check(stage(x), average(stage, x), dict(stage.named_parameters()), x, 1e-10)


def test_starts_as_a_chain():
    """Each mixer reads the one before it, once."""
    stage = model(depths=(3, 1, 1, 1)).stages[0].double()
    x = torch.randn(1, 4, 3, 8, dtype=torch.float64)
    expected = x
    for block in stage.blocks:
        for mixer in (*block.token_mixers, block.channel_mixer):
            expected = expected + mixer.mixer(mixer.norm1(expected))
    assert_close("chain", stage(x), expected, 1e-12)


def vmamba_and_vim2(token_mixers):
    """A VMamba of the first version, and a ViM2 with its weights where the two have the same parts."""
    depths = (1, 1, 2, 1)
    args = dict(d_state=2, expand=2.0, gate=True, conv_bias=True, mlp_ratio=0.0, stem="patch", downsample="merging")
    vmamba = VMamba(num_classes=5, embed_dim=8, depths=[token_mixers * d for d in depths], **args)
    randomise(vmamba, 0.2).eval()
    vim2 = model(token_mixers, depths)

    def place(match):
        block, mixer = divmod(int(match[1]), token_mixers)
        return f".blocks.{block}.token_mixers.{mixer}."

    state = {re.sub(r"\.blocks\.(\d+)\.", place, name): value for name, value in vmamba.state_dict().items()}
    missing, unexpected = vim2.load_state_dict(state, strict=False)
    weights = (".alpha", ".beta", ".theta", ".gamma")
    assert not unexpected and all(".channel_mixer." in name or name.endswith(weights) for name in missing)
    return vmamba, vim2


@pytest.mark.parametrize("token_mixers", [1, 2])
def test_reduces_to_vmamba(token_mixers):
    """Section 4.2: beta 0, alpha 1 for the last output only; then channel mixers reach nothing but a stage's end."""
    vmamba, vim2 = vmamba_and_vim2(token_mixers)
    with torch.no_grad():
        for stage in vim2.stages:
            for block in stage.blocks:
                randomise(block.channel_mixer)
                for weights, last in ((block.alpha, 1), (block.beta, 0), (block.theta, 1), (block.gamma, 0)):
                    weights.zero_()
                    weights[-1] = last
            stage.blocks[-1].channel_mixer.mixer.out_proj.weight.zero_()
    x = torch.randn(2, 3, 32, 48, generator=torch.Generator().manual_seed(1)).requires_grad_()
    (actual, levels), (expected, wanted) = (m.forward_intermediates(x) for m in (vim2, vmamba))
    assert expected.std() > 0.1
    assert_close("last map", actual, expected, 1e-6)
    for i, (a, b) in enumerate(zip(levels, wanted, strict=True)):
        assert_close(f"level {i}", a, b, 1e-6)
    weights = torch.randn_like(expected)
    gradients = [torch.autograd.grad((out * weights).sum(), x)[0] for out in (actual, expected)]
    assert_close("gradient", *gradients, 1e-5)


def test_without_channel_mixers_it_is_vmamba():
    """Section 4.2, "and/or removing": the initial weights, and channel mixers that add nothing."""
    vmamba, vim2 = vmamba_and_vim2(2)
    x = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        assert (vim2(x) - vmamba(x)).abs().max() > 1e-5
        for block in (block for stage in vim2.stages for block in stage.blocks):
            block.channel_mixer.mixer.out_proj.weight.zero_()
        assert_close("logits", vim2(x), vmamba(x), 1e-6)


def test_parameters():
    """Counted by hand from table 8, and beside what table 2 of the paper says (in millions)."""

    def token_mixer(d, n=16):
        e, r = 2 * d, -(-d // 16)
        scan = 4 * (e * (r + 2 * n) + r * e + e + e * n + e)
        return 2 * d + d * 2 * e + 10 * e + scan + 2 * e + e * d

    def channel_mixer(d, e, n=16):
        return 2 * d + d * 2 * e + 2 * (5 + (1 + 2 * n) * 49 + 2 + n + 1) + e * d

    published = {"vim2_tiny": (96, 3, 20), "vim2_small": (96, 9, 43), "vim2_base": (128, 9, 74)}
    for name, (dim, depth, millions) in published.items():
        total = 3 * 16 * dim + dim + 2 * dim
        for i, blocks in enumerate((1, 1, depth, 1)):
            d = dim * 2**i
            total += 2 * blocks * token_mixer(d) + blocks * channel_mixer(d, min(2 * d, 8 * dim))
            total += blocks * (2 * blocks + 3)
            total += 8 * (d // 2) + 4 * (d // 2) * d if i else 0
        total += 2 * 8 * dim + 8 * dim * 1000 + 1000
        with torch.device("meta"):
            assert sum(p.numel() for p in timm.create_model(name).parameters()) == total
        # The paper's tiny model is smaller than its own table can be: see model_zoo.md.
        assert total / 1e6 / millions == pytest.approx(1.2 if name == "vim2_tiny" else 1.02, abs=0.005)


@pytest.mark.parametrize("size", [(64, 96), (49, 83), (224, 32)])
def test_pyramid_of_any_size(size):
    maps = model(depths=(1, 1, 1, 1)).forward_intermediates(torch.randn(1, 3, *size), intermediates_only=True)
    sides = tuple(side // 4 for side in size)
    for i, level in enumerate(maps):
        assert level.shape == (1, 8 * 2**i, *sides) and bool(torch.isfinite(level).all())
        sides = tuple(-(-side // 2) for side in sides)


def test_stochastic_depth_rises_over_the_mixers():
    rates = [m.drop_prob for m in model(drop_path_rate=0.3).modules() if hasattr(m, "drop_prob")]
    assert rates == pytest.approx([0.3 * i / 17 for i in range(1, 18)])


def test_backbone_of_a_detector():
    state = model().state_dict()
    backbone = timm.create_model(
        "test_vim2", features_only=True, embed_dim=8, depths=(1, 1, 3, 1), token_mixers=2, d_state=2, summary_size=2
    )
    file = {**{f"backbone.{k}": v for k, v in state.items()}, "neck.conv.weight": torch.zeros(1)}
    assert not vision_mamba.load_checkpoint(backbone, {"state_dict": file}).problems()
    assert torch.equal(backbone.model.stages[2].blocks[2].theta, state["stages.2.blocks.2.theta"])


def test_bad_arguments_are_named():
    with pytest.raises(ValueError, match="token_mixers=0: a block has one or more"):
        ViM2(token_mixers=0)
    with pytest.raises(ValueError, match=r"depths=.1, 1., channel_expand=.*: give one number a stage"):
        ViM2(depths=(1, 1))


@pytest.mark.gpu
def test_agrees_with_the_cpu_on_gpu():
    torch.backends.cudnn.allow_tf32 = False
    x = torch.randn(2, 3, 64, 96, generator=torch.Generator().manual_seed(1))
    results = []
    for device, dtype in (("cpu", torch.float64), ("cuda", torch.float32)):
        net = randomise(timm.create_model("test_vim2"), 0.2).to(device=device, dtype=dtype).eval()
        out = net(x.to(device=device, dtype=dtype))
        out.square().sum().backward()
        results.append({"logits": out, **{n: p.grad for n, p in net.named_parameters()}})
    for name, expected in results[0].items():
        assert_close(name, results[1][name], expected, 1e-4)
