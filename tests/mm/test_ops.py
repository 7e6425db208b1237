"""mmcv's operators on torchvision: against their published definitions, written out in float64."""

import importlib
import math

import numpy as np
import pytest
import torch

import vision_mamba.mm  # noqa: F401  supplies mmcv._ext
from tests.conftest import assert_close
from vision_mamba.mm import ops as ext

ops = pytest.importorskip("mmcv.ops")

mmcv_ext = importlib.import_module("mmcv._ext")
if mmcv_ext.nms is not ext.nms:
    pytest.skip("a compiled mmcv._ext is installed; ours stands aside", allow_module_level=True)


def random_boxes(n, generator, *, degenerate=False, extent=60.0):
    start = torch.rand(n, 2, generator=generator) * extent
    size = torch.rand(n, 2, generator=generator) * extent / 2
    if degenerate:
        size[::5] = 0
    return torch.cat([start, start + size], 1)


def random_rois(n, images, generator, *, scale=1.0):
    batch = torch.randint(0, images, (n, 1), generator=generator).double()
    return torch.cat([batch, random_boxes(n, generator).double() * scale - 8], 1)


def iou(a, b, offset):
    width = max(0.0, min(a[2], b[2]) - max(a[0], b[0]) + offset)
    height = max(0.0, min(a[3], b[3]) - max(a[1], b[1]) + offset)
    area = [(x[2] - x[0] + offset) * (x[3] - x[1] + offset) for x in (a, b)]
    union = sum(area) - width * height
    return width * height / union if union else math.nan


def plain_nms(boxes, scores, threshold, offset):
    order = sorted(range(len(scores)), key=lambda i: -scores[i])
    kept = []
    for i in order:
        if not any(iou(boxes[i], boxes[j], offset) > threshold for j in kept):
            kept.append(i)
    return kept


def plain_soft_nms(boxes, scores, threshold, sigma, min_score, method, offset):
    """Bodla et al. 2017, figure 2: repeatedly take the best box and decay the others."""
    scores, left, out = list(scores), list(range(len(scores))), []
    while left:
        best = max(left, key=lambda i: scores[i])
        left.remove(best)
        out.append((best, scores[best]))
        for i in left:
            overlap = iou(boxes[best], boxes[i], offset)
            if method == "gaussian":
                scores[i] *= math.exp(-(overlap**2) / sigma)
            elif overlap >= threshold:
                scores[i] *= 1 - overlap if method == "linear" else 0
        left = [i for i in left if scores[i] >= min_score]
    return out


@pytest.mark.parametrize("offset", [0, 1])
@pytest.mark.parametrize("n", [0, 1, 2, 40])
def test_nms(n, offset):
    g = torch.Generator().manual_seed(n)
    boxes, scores = random_boxes(n, g), torch.rand(n, generator=g)
    for threshold in (0.1, 0.3, 0.5):
        dets, kept = ops.nms(boxes, scores, threshold, offset=offset)
        assert kept.tolist() == plain_nms(boxes.double().tolist(), scores.tolist(), threshold, offset)
        assert torch.equal(dets, torch.cat([boxes, scores[:, None]], 1)[kept])


def test_nms_limits_half_and_float64():
    g = torch.Generator().manual_seed(1)
    boxes, scores = random_boxes(30, g).round(), torch.rand(30, generator=g).double()
    expected = plain_nms(boxes.double().tolist(), scores.tolist(), 0.3, 0)
    assert ops.nms(boxes.half(), scores, 0.3)[1].tolist() == expected
    assert ops.nms(boxes.double(), scores, 0.3)[1].tolist() == expected
    assert ops.nms(boxes, scores, 0.3, max_num=3)[1].tolist() == expected[:3]
    above = [i for i in expected if scores[i] > 0.6]
    assert ops.nms(boxes, scores, 0.3, score_threshold=0.6)[1].tolist() == above
    kept = ops.nms(boxes.numpy(), scores.numpy(), 0.3)[1]
    assert isinstance(kept, np.ndarray) and kept.tolist() == expected


def test_nms_threshold_is_exclusive():
    boxes = torch.tensor([[0.0, 0, 10, 10], [0, 5, 10, 15]])  # IoU 1/3
    assert len(ops.nms(boxes, torch.tensor([0.9, 0.8]), 1 / 3)[1]) == 2
    assert len(ops.nms(boxes, torch.tensor([0.9, 0.8]), 0.33)[1]) == 1


def test_batched_nms_keeps_classes_apart():
    g = torch.Generator().manual_seed(2)
    boxes, scores, classes = random_boxes(40, g), torch.rand(40, generator=g), torch.randint(0, 3, (40,), generator=g)
    for cfg, agnostic in ((dict(type="nms", iou_threshold=0.3), False), (dict(type="nms", iou_threshold=0.3), True)):
        _, kept = ops.batched_nms(boxes, scores, classes, dict(cfg), class_agnostic=agnostic)
        groups = [torch.arange(40)] if agnostic else [(classes == c).nonzero().flatten() for c in range(3)]
        expected = [int(m[i]) for m in groups for i in plain_nms(boxes[m].tolist(), scores[m].tolist(), 0.3, 0)]
        assert kept.tolist() == sorted(expected, key=lambda i: -float(scores[i]))
    dets, kept = ops.batched_nms(boxes, scores, classes, dict(type="soft_nms", iou_threshold=0.3, min_score=0.05))
    assert dets.shape == (len(kept), 5) and bool((dets[:-1, 4] >= dets[1:, 4]).all())
    dets, kept = ops.batched_nms(boxes[:0], scores[:0], classes[:0], None)
    assert dets.shape == (0, 5)


@pytest.mark.parametrize("method", ["naive", "linear", "gaussian"])
@pytest.mark.parametrize("offset", [0, 1])
def test_soft_nms(method, offset):
    for n in (0, 1, 2, 25):
        g = torch.Generator().manual_seed(n)
        boxes, scores = random_boxes(n, g), torch.rand(n, generator=g)
        expected = plain_soft_nms(boxes.double().tolist(), scores.tolist(), 0.3, 0.5, 0.05, method, offset)
        dets, kept = ops.soft_nms(boxes, scores, 0.3, 0.5, 0.05, method, offset)
        assert kept.tolist() == [i for i, _ in expected]
        assert torch.equal(dets[:, :4], boxes[kept])
        assert torch.allclose(dets[:, 4].double(), torch.tensor([s for _, s in expected]).double(), rtol=1e-5)


def test_soft_nms_order_among_ties_is_the_compiled_loops():
    # Four equal scores, two far boxes below the minimum: the C loop fills their places from the end, by hand 5 then 4.
    boxes = torch.tensor([[float(10 * i), 0, 10 * i + 5, 5] for i in range(6)])
    scores = torch.tensor([0.5, 0.01, 0.01, 0.5, 0.5, 0.5])
    assert ops.soft_nms(boxes, scores, min_score=0.1)[1].tolist() == [0, 5, 4, 3]


def test_nms_match():
    g = torch.Generator().manual_seed(3)
    boxes, scores = random_boxes(30, g), torch.rand(30, generator=g)
    left, expected = sorted(range(30), key=lambda i: -float(scores[i])), []
    while left:
        best = left.pop(0)
        taken = [i for i in left if iou(boxes[best].tolist(), boxes[i].tolist(), 0) >= 0.2]
        expected.append([best, *taken])
        left = [i for i in left if i not in taken]
    found = ops.nms_match(torch.cat([boxes, scores[:, None]], 1), 0.2)
    assert [group.tolist() for group in found] == expected
    assert ops.nms_match(torch.zeros(0, 5), 0.2) == []


def plain_sample(image, y, x):
    """RoIAlign's bilinear value of image (C, H, W): zero beyond one pixel outside, clamped within it."""
    height, width = image.shape[1:]
    if y < -1 or y > height or x < -1 or x > width:
        return None
    y, x = min(max(y, 0), height - 1), min(max(x, 0), width - 1)
    y0, x0 = int(y), int(x)
    y1, x1 = min(y0 + 1, height - 1), min(x0 + 1, width - 1)
    dy, dx = y - y0, x - x0
    return (
        image[:, y0, x0] * (1 - dy) * (1 - dx)
        + image[:, y0, x1] * (1 - dy) * dx
        + image[:, y1, x0] * dy * (1 - dx)
        + image[:, y1, x1] * dy * dx
    )


def plain_roi_align(features, rois, size, scale, ratio, mode, aligned):
    out = []
    for roi in rois.tolist():
        image = features[int(roi[0])]
        x1, y1, x2, y2 = (v * scale - (0.5 if aligned else 0) for v in roi[1:])
        height, width = y2 - y1, x2 - x1
        if not aligned:
            height, width = max(height, 1.0), max(width, 1.0)
        bin_h, bin_w = height / size[0], width / size[1]
        ny, nx = (ratio, ratio) if ratio > 0 else (math.ceil(bin_h), math.ceil(bin_w))
        for py in range(size[0]):
            for px in range(size[1]):
                values = []
                for iy in range(ny):
                    for ix in range(nx):
                        y = y1 + py * bin_h + (iy + 0.5) * bin_h / ny
                        x = x1 + px * bin_w + (ix + 0.5) * bin_w / nx
                        value = plain_sample(image, y, x)
                        values.append(torch.zeros_like(image[:, 0, 0]) if value is None else value)
                stacked = torch.stack(values)
                out.append(stacked.mean(0) if mode == "avg" else stacked.max(0).values)
    return torch.stack(out).view(len(rois), *size, -1).permute(0, 3, 1, 2)


@pytest.mark.parametrize("aligned", [True, False])
@pytest.mark.parametrize("ratio", [0, 1, 2])
@pytest.mark.parametrize("mode", ["avg", "max"])
def test_roi_align(mode, ratio, aligned, monkeypatch):
    monkeypatch.setattr(ext, "_CHUNK", 400)  # so that the boxes are taken in several portions
    g = torch.Generator().manual_seed(4)
    features = torch.randn(2, 3, 11, 14, generator=g, dtype=torch.float64)
    rois = random_rois(6, 2, g)
    expected_in = features.clone().requires_grad_()
    expected = plain_roi_align(expected_in, rois, (3, 2), 0.25, ratio, mode, aligned)
    ours_in = features.clone().requires_grad_()
    ours = ops.roi_align(ours_in, rois, (3, 2), 0.25, ratio, mode, aligned)
    assert_close("value", ours, expected, 1e-12)
    weights = torch.randn(expected.shape, generator=g, dtype=torch.float64)
    expected.backward(weights)
    ours.backward(weights)
    assert_close("gradient", ours_in.grad, expected_in.grad, 1e-12)
    single = ops.roi_align(features.float(), rois.float(), (3, 2), 0.25, ratio, mode, aligned)
    assert_close("float32", single, expected, 1e-4)


@pytest.mark.parametrize("mode", ["avg", "max"])
def test_roi_align_without_boxes_and_in_half(mode):
    g = torch.Generator().manual_seed(5)
    features = torch.randn(2, 3, 8, 8, generator=g, requires_grad=True)
    empty = ops.RoIAlign((7, 7), 0.5, 0, mode)(features, torch.zeros(0, 5))
    assert empty.shape == (0, 3, 7, 7)
    empty.sum().backward()
    assert float(features.grad.abs().sum()) == 0
    rois = random_rois(4, 2, g, scale=0.3)
    expected = ops.roi_align(features, rois.float(), (3, 3), 0.5, 2, mode, True)
    for dtype, tolerance in ((torch.float16, 2e-3), (torch.bfloat16, 1e-2)):
        with torch.autocast("cpu", torch.bfloat16):
            low = ops.roi_align(features.to(dtype), rois, (3, 3), 0.5, 2, mode, True)
        assert low.dtype is dtype
        assert_close(str(dtype), low.float(), expected, tolerance)


def test_roi_align_maximum_of_no_samples():
    """A box of no size has none with ratio 0: the compiled kernel's initial value, and no gradient."""
    features = torch.randn(1, 2, 8, 8, requires_grad=True)
    out = ops.roi_align(features, torch.tensor([[0.0, 5, 5, 5, 5]]), (2, 2), 1.0, 0, "max", True)
    assert bool((out == torch.finfo(torch.float32).min).all())
    out.sum().backward()
    assert float(features.grad.abs().sum()) == 0


def plain_roi_pool(features, rois, size, scale):
    out = []
    height, width = features.shape[2:]
    for roi in rois.tolist():
        x1, y1, x2, y2 = roi[1] * scale, roi[2] * scale, (roi[3] + 1) * scale, (roi[4] + 1) * scale
        bin_h, bin_w = (y2 - y1) / size[0], (x2 - x1) / size[1]
        for py in range(size[0]):
            for px in range(size[1]):
                top, bottom = math.floor(py * bin_h + y1), math.ceil((py + 1) * bin_h + y1)
                left, right = math.floor(px * bin_w + x1), math.ceil((px + 1) * bin_w + x1)
                top, bottom = min(max(top, 0), height), min(max(bottom, 0), height)
                left, right = min(max(left, 0), width), min(max(right, 0), width)
                part = features[int(roi[0]), :, top:bottom, left:right].flatten(1)
                out.append(
                    part.amax(1) if part.numel() and x2 > x1 and y2 > y1 else features.new_zeros(features.shape[1])
                )
    return torch.stack(out).view(len(rois), *size, -1).permute(0, 3, 1, 2)


def test_roi_pool(monkeypatch):
    monkeypatch.setattr(ext, "_CHUNK", 400)
    g = torch.Generator().manual_seed(6)
    features = torch.randn(2, 3, 11, 14, generator=g, dtype=torch.float64)
    rois = random_rois(7, 2, g)
    rois[0, 3:] = rois[0, 1:3] - 5  # malformed: no size
    rois[1, 1:] += 300  # outside the map
    inputs = [features.clone().requires_grad_() for _ in range(2)]
    expected, ours = plain_roi_pool(inputs[0], rois, (3, 2), 0.25), ops.roi_pool(inputs[1], rois, (3, 2), 0.25)
    assert_close("value", ours, expected, 1e-12)
    weights = torch.randn(expected.shape, generator=g, dtype=torch.float64)
    weights[0] = 0  # the compiled kernel leaves index 0 for boxes without a size
    expected.backward(weights)
    ours.backward(weights)
    assert_close("gradient", inputs[1].grad, inputs[0].grad, 1e-12)
    assert ops.roi_pool(features, rois[:0], (3, 2), 0.25).shape == (0, 3, 3, 2)


def plain_deform_conv(x, offset, mask, weight, bias, stride, padding, dilation, groups, deform_groups):
    """Dai et al. 2017, eq. 2 (with the modulation of Zhu et al. 2018, eq. 1), by one weighted gather a kernel point."""
    batch, channels, height, width = x.shape
    kernel_h, kernel_w = weight.shape[2:]
    out_h, out_w = offset.shape[2:]
    columns = []
    padded = torch.nn.functional.pad(x, (1, 2, 1, 2))  # a frame of zeros, in which every neighbour lies
    for i in range(kernel_h):
        for j in range(kernel_w):
            samples = []
            for d in range(deform_groups):
                k = (d * kernel_h + i) * kernel_w + j
                y = torch.arange(out_h, dtype=x.dtype)[:, None] * stride - padding + i * dilation + offset[:, 2 * k]
                z = torch.arange(out_w, dtype=x.dtype)[None, :] * stride - padding + j * dilation + offset[:, 2 * k + 1]
                inside = (y > -1) & (y < height) & (z > -1) & (z < width)
                y, z = y.clamp(-1, height), z.clamp(-1, width)
                y0, z0 = y.floor().detach(), z.floor().detach()
                group = slice(d * channels // deform_groups, (d + 1) * channels // deform_groups)
                value = 0
                for dy in (0, 1):
                    for dz in (0, 1):
                        factor = (y - y0 if dy else y0 + 1 - y) * (z - z0 if dz else z0 + 1 - z) * inside
                        rows, cols = (y0 + dy + 1).long(), (z0 + dz + 1).long()
                        pixels = torch.stack([padded[b, group][:, rows[b], cols[b]] for b in range(batch)])
                        value = value + pixels * factor[:, None]
                samples.append(value if mask is None else value * mask[:, k, None])
            columns.append(torch.cat(samples, 1))
    columns = torch.stack(columns, 2)  # (batch, channels, kernel, out_h, out_w)
    parts = [
        torch.einsum("bckhw,ock->bohw", c, w.flatten(2))
        for c, w in zip(columns.chunk(groups, 1), weight.chunk(groups, 0), strict=True)
    ]
    out = torch.cat(parts, 1)
    return out if bias is None else out + bias[:, None, None]


@pytest.mark.parametrize("groups,deform_groups", [(1, 1), (2, 1), (1, 2), (2, 2)])
@pytest.mark.parametrize("stride,padding,dilation", [(1, 1, 1), (2, 0, 1), (1, 2, 2)])
def test_deform_conv(groups, deform_groups, stride, padding, dilation):
    g = torch.Generator().manual_seed(7)

    def randn(*shape):
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    sides = [(n + 2 * padding - (dilation * 2 + 1)) // stride + 1 for n in (7, 9)]
    x, weight = randn(2, 4, 7, 9), randn(6, 4 // groups, 3, 3)
    offset, mask = randn(2, deform_groups * 18, *sides) * 2, randn(2, deform_groups * 9, *sides)
    tail = (stride, padding, dilation, groups, deform_groups)
    first = ops.deform_conv2d(x, offset, weight, *tail)
    assert_close("v1", first, plain_deform_conv(x, offset, None, weight, None, *tail), 1e-12)
    bias = randn(6)
    for last in (bias, None):
        ours_in = [t.clone().requires_grad_() for t in (x, offset, mask, weight)]
        plain_in = [t.clone().requires_grad_() for t in (x, offset, mask, weight)]
        ours = ops.modulated_deform_conv2d(*ours_in, last, *tail)
        expected = plain_deform_conv(*plain_in, last, *tail)
        assert_close("v2", ours, expected, 1e-12)
        weights = randn(*expected.shape)
        ours.backward(weights)
        expected.backward(weights)
        for name, a, b in zip(("input", "offset", "mask", "weight"), ours_in, plain_in, strict=True):
            assert_close(name, a.grad, b.grad, 1e-10)


def test_deform_conv_gradcheck():
    g = torch.Generator().manual_seed(8)

    def leaf(*shape):
        return torch.rand(*shape, generator=g, dtype=torch.float64).sub(0.45).requires_grad_()

    x, weight, bias = leaf(2, 2, 4, 4), leaf(2, 2, 3, 3), leaf(2)
    offset, mask = leaf(2, 18, 4, 4), leaf(2, 9, 4, 4)
    assert torch.autograd.gradcheck(lambda *t: ops.deform_conv2d(*t, 1, 1), (x, offset, weight), fast_mode=True)
    inputs = (x, offset, mask, weight, bias)
    assert torch.autograd.gradcheck(lambda *t: ops.modulated_deform_conv2d(*t, 1, 1), inputs, fast_mode=True)


def test_deform_conv_layer_under_autocast():
    torch.manual_seed(0)
    layer = ops.ModulatedDeformConv2dPack(4, 6, 3, padding=1)
    torch.nn.init.normal_(layer.conv_offset.weight, std=0.1)
    x = torch.randn(2, 4, 8, 8)
    expected = layer(x)
    with torch.autocast("cpu", torch.bfloat16):
        low = layer(x)
    assert low.dtype is torch.bfloat16
    assert_close("autocast", low.float(), expected, 3e-2)
    low.sum().backward()
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in layer.parameters())


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("gamma,alpha", [(2.0, 0.25), (0.0, 0.5), (1.5, 0.75)])
def test_sigmoid_focal_loss(gamma, alpha, weighted):
    from torchvision.ops import sigmoid_focal_loss

    g = torch.Generator().manual_seed(9)
    logits = torch.randn(12, 4, generator=g, dtype=torch.float64) * 3
    target = torch.randint(0, 4 if weighted else 5, (12,), generator=g)  # 4 is background
    weight = torch.rand(4, generator=g, dtype=torch.float64) if weighted else None
    inputs = [logits.clone().requires_grad_() for _ in range(2)]
    one_hot = torch.nn.functional.one_hot(target, 5)[:, :4].double()
    expected = sigmoid_focal_loss(inputs[0], one_hot, alpha, gamma)
    if weighted:
        expected = expected * weight[target][:, None]
    for reduction, value in (("none", expected), ("sum", expected.sum()), ("mean", expected.sum() / 12)):
        assert_close(reduction, ops.sigmoid_focal_loss(logits, target, gamma, alpha, weight, reduction), value, 1e-12)
    expected.sum().backward()
    ops.sigmoid_focal_loss(inputs[1], target, gamma, alpha, weight, "sum").backward()
    assert_close("gradient", inputs[1].grad, inputs[0].grad, 1e-10)


def test_sigmoid_focal_loss_extreme_logits_and_empty():
    logits = torch.tensor([[200.0, -200.0]])
    loss = ops.sigmoid_focal_loss(logits, torch.tensor([1]), 2.0, 0.25, None, "none")
    floor = -math.log(torch.finfo(torch.float32).tiny)
    assert torch.allclose(loss, torch.tensor([[0.75 * floor, 0.25 * floor]]))
    assert ops.sigmoid_focal_loss(logits[:0], torch.zeros(0, dtype=torch.long), 2.0, 0.25, None, "sum") == 0


def test_multi_scale_deformable_attention():
    """Zhu et al. 2020, eq. 3: a weighted sum of bilinear samples at normalised places, pixel centres at (i + 0.5)."""
    attention = importlib.import_module("mmcv.ops.multi_scale_deform_attn")
    g = torch.Generator().manual_seed(10)
    shapes = torch.tensor([[5, 4], [3, 2]])
    value = torch.randn(2, 26, 2, 3, generator=g, dtype=torch.float64)
    places = torch.rand(2, 7, 2, 2, 3, 2, generator=g, dtype=torch.float64) * 1.2 - 0.1
    weights = torch.rand(2, 7, 2, 2, 3, generator=g, dtype=torch.float64)
    expected = torch.zeros(2, 7, 2, 3, dtype=torch.float64)
    for b, q, h, level, p in np.ndindex(2, 7, 2, 2, 3):
        rows, cols = shapes[level].tolist()
        start = 0 if level == 0 else 20
        image = value[b, start : start + rows * cols, h].T.reshape(3, rows, cols)
        image = torch.nn.functional.pad(image, (1, 1, 1, 1))
        x, y = (places[b, q, h, level, p] * torch.tensor([cols, rows]) - 0.5).tolist()
        if -1 < x < cols and -1 < y < rows:
            y0, x0 = math.floor(y), math.floor(x)
            for dy, dx in ((0, 0), (0, 1), (1, 0), (1, 1)):
                factor = (y - y0 if dy else y0 + 1 - y) * (x - x0 if dx else x0 + 1 - x)
                expected[b, q, h] += weights[b, q, h, level, p] * factor * image[:, y0 + dy + 1, x0 + dx + 1]
    starts = torch.tensor([0, 20])
    apply = attention.MultiScaleDeformableAttnFunction.apply
    assert_close("value", apply(value, shapes, starts, places, weights, 64), expected.flatten(2), 1e-12)
    half = apply(value.bfloat16(), shapes, starts, places, weights, 64)
    assert half.dtype is torch.bfloat16
    assert_close("bfloat16", half.float(), expected.flatten(2), 3e-2)
    leaves = [t[:, :2].clone().requires_grad_() for t in (places, weights)]
    v = value.clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda v, p, w: apply(v, shapes, starts, p, w, 64), (v, *leaves))


def test_other_operators_say_what_is_missing():
    with pytest.raises(NotImplementedError, match=r"'carafe_forward' is not installed.*pip install"):
        ops.carafe(torch.randn(1, 4, 4, 4), torch.randn(1, 9, 8, 8), 3, 1, 2)
    with pytest.raises(NotImplementedError, match="'bbox_overlaps'"):
        ops.bbox_overlaps(torch.rand(2, 4), torch.rand(2, 4))
