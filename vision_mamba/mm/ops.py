"""The functions of mmcv's compiled module ``mmcv._ext`` that torchvision and PyTorch can compute.

Names, arguments and meaning are those of the compiled functions, so that mmcv's own Python code runs on these
unchanged: results go to tensors that the caller allocated. Every device that torchvision has kernels for is served.
float16 and bfloat16 are computed in float32 and rounded once, which is more exact than the compiled kernels; float64
stays float64.

Sources: RoIAlign, He et al. 2017 (arXiv 1703.06870), section 3; RoIPool, Girshick 2015 (arXiv 1504.08083), section
2.1, in mmcv's form without rounding of the box; deformable convolution, Dai et al. 2017 (1703.06211) and Zhu et al.
2018 (1811.11168); Soft-NMS, Bodla et al. 2017 (1704.04503); focal loss, Lin et al. 2017 (1708.02002); multi-scale
deformable attention, Zhu et al. 2020 (2010.04159).
"""

from __future__ import annotations

import numpy as np
import torch
import torchvision  # noqa: F401  registers torch.ops.torchvision
from torch import Tensor

# Elements of the largest intermediate of roi_pool and of roi_align's maximum: 128 MB of float32.
_CHUNK = 1 << 25


def nms(boxes: Tensor, scores: Tensor, iou_threshold: float, offset: int) -> Tensor:
    """Indices of the boxes kept, best first. A side is ``x2 - x1 + offset``; IoU above the threshold suppresses."""
    boxes = _wide(boxes)
    # Half-open boxes shifted at one end have the areas and overlaps of boxes counted with the offset.
    boxes = boxes + boxes.new_tensor([0, 0, offset, offset])
    # Equal scores in the order that the compiled function takes them; torchvision's own sort is another.
    order = scores.sort(0, descending=True)[1]
    ranks = torch.arange(len(order), 0, -1, dtype=boxes.dtype, device=boxes.device)
    # The compiled function takes the threshold as a C float.
    return order[torch.ops.torchvision.nms(boxes[order], ranks, float(np.float32(iou_threshold)))]


def softnms(
    boxes: Tensor,
    scores: Tensor,
    dets: Tensor,
    iou_threshold: float,
    sigma: float,
    min_score: float,
    method: int,
    offset: int,
) -> Tensor:
    """Soft-NMS on the CPU; writes boxes and decayed scores to the first rows of ``dets`` (N, 5) and returns indices.

    ``method``: 0 drops, 1 multiplies by ``1 - IoU``, both at IoU >= threshold; 2 multiplies by ``exp(-IoU^2 / sigma)``.
    Boxes below ``min_score`` are replaced by the last one, as in the compiled loop: this decides the order among ties.
    """
    table = _wide(boxes).detach().numpy()
    x1, y1, x2, y2 = (table[:, i].copy() for i in range(4))
    score = scores.detach().numpy(force=True).astype(table.dtype)
    area = (x2 - x1 + offset) * (y2 - y1 + offset)
    index = np.arange(len(table))
    columns = (x1, y1, x2, y2, score, area, index)
    float_ = score.dtype.type
    iou_threshold, sigma, min_score = float_(np.float32(iou_threshold)), float_(np.float32(sigma)), float_(min_score)
    count, i = len(table), 0
    with np.errstate(invalid="ignore", divide="ignore"):  # boxes without an area
        while i < count:
            rest = score[i:count]
            best = i if np.isnan(score[i]) else i + int(np.argmax(np.where(np.isnan(rest), -np.inf, rest)))
            for column in columns:
                column[i], column[best] = column[best], column[i]
            others = slice(i + 1, count)
            width = np.maximum(np.minimum(x2[i], x2[others]) - np.maximum(x1[i], x1[others]) + offset, 0)
            height = np.maximum(np.minimum(y2[i], y2[others]) - np.maximum(y1[i], y1[others]) + offset, 0)
            inter = width * height
            iou = inter / (area[i] + area[others] - inter)
            if method == 2:
                score[others] *= np.exp(-(iou * iou) / sigma)
            else:
                score[others] *= np.where(iou >= iou_threshold, 0 if method == 0 else 1 - iou, 1).astype(float_)
            dead = score[others] < min_score
            count -= int(dead.sum())
            # Gaps among the survivors' places are filled from the end.
            gaps = np.flatnonzero(dead) + i + 1
            gaps = gaps[gaps < count]
            tail = np.flatnonzero(~dead) + i + 1
            tail = tail[tail >= count][::-1]
            for column in columns:
                column[gaps] = column[tail]
            i += 1
    kept = np.stack([column[:count] for column in columns[:5]], axis=1)
    dets[:count] = torch.from_numpy(kept).to(dets)
    return torch.from_numpy(index[:count].copy())


def nms_match(dets: Tensor, iou_threshold: float) -> list[list[int]]:
    """Groups of box indices: each kept box followed by those it suppresses (IoU >= threshold), best first."""
    table = _wide(dets).detach().numpy()
    x1, y1, x2, y2 = table[:, :4].T
    area = (x2 - x1) * (y2 - y1)
    order = torch.from_numpy(table[:, 4].copy()).sort(0, descending=True)[1].numpy()
    threshold, groups = table.dtype.type(np.float32(iou_threshold)), []
    with np.errstate(invalid="ignore", divide="ignore"):
        while len(order):
            best, order = order[0], order[1:]
            width = np.maximum(np.minimum(x2[best], x2[order]) - np.maximum(x1[best], x1[order]), 0)
            height = np.maximum(np.minimum(y2[best], y2[order]) - np.maximum(y1[best], y1[order]), 0)
            inter = width * height
            taken = inter / (area[best] + area[order] - inter) >= threshold
            groups.append([int(best), *order[taken].tolist()])
            order = order[~taken]
    return groups


def roi_align_forward(
    input: Tensor,
    rois: Tensor,
    output: Tensor,
    argmax_y: Tensor,
    argmax_x: Tensor,
    aligned_height: int,
    aligned_width: int,
    spatial_scale: float,
    sampling_ratio: int,
    pool_mode: int,
    aligned: bool,
) -> None:
    """RoIAlign of ``input`` (N, C, H, W) at ``rois`` (R, 5); ``pool_mode`` 1 averages the samples of a bin, 0 takes the
    greatest and notes where it was sampled."""
    features = _wide(input)
    boxes = rois.to(features.dtype)
    size = (aligned_height, aligned_width)
    if pool_mode == 1:
        output.copy_(torch.ops.torchvision.roi_align(features, boxes, spatial_scale, *size, sampling_ratio, aligned))
        return
    channels = features.shape[1]
    for rows in _chunks(boxes, channels * _largest_bin(boxes, size, spatial_scale, sampling_ratio, aligned)):
        chunk = boxes[rows]
        ys, xs, valid_y, valid_x = _sample_points(chunk, size, spatial_scale, sampling_ratio, aligned)
        grid = (len(chunk), *size, ys.shape[2], xs.shape[2])
        y = ys[:, :, None, :, None].expand(grid).flatten(3)
        x = xs[:, None, :, None, :].expand(grid).flatten(3)
        valid = (valid_y[:, None, None, :, None] & valid_x[:, None, None, None, :]).expand(grid).flatten(3)
        corners, weights = _bilinear(y, x, features.shape[2:])
        flat = features.flatten(2)[chunk[:, 0].long()]  # (r, C, H * W)
        values = sum(
            flat.gather(2, corner.flatten(1)[:, None].expand(-1, channels, -1)) * weight.flatten(1)[:, None]
            for corner, weight in zip(corners, weights, strict=True)
        )
        values = values.unflatten(2, y.shape[1:])
        # A bin without samples (a box of no size, and no sampling ratio) has the compiled code's initial value.
        values = values.masked_fill(~valid[:, None], torch.finfo(torch.float32).min)
        best, where = values.max(-1)
        output[rows] = best.to(output.dtype)
        none = ~valid.any(-1)[:, None]
        for argmax, positions in ((argmax_y, y), (argmax_x, x)):
            taken = positions[:, None].expand(-1, channels, -1, -1, -1).gather(-1, where[..., None])[..., 0]
            argmax[rows] = taken.masked_fill(none, -1).to(argmax.dtype)


def roi_align_backward(
    grad_output: Tensor,
    rois: Tensor,
    argmax_y: Tensor,
    argmax_x: Tensor,
    grad_input: Tensor,
    aligned_height: int,
    aligned_width: int,
    spatial_scale: float,
    sampling_ratio: int,
    pool_mode: int,
    aligned: bool,
) -> None:
    """Gradient of :func:`roi_align_forward` in ``grad_input`` (N, C, H, W)."""
    grad = _wide(grad_output)
    boxes = rois.to(grad.dtype)
    if pool_mode == 1:
        grad_input.copy_(
            torch.ops.torchvision._roi_align_backward(
                grad,
                boxes,
                spatial_scale,
                aligned_height,
                aligned_width,
                *grad_input.shape,
                sampling_ratio,
                aligned,
            )
        )
        return
    y, x = argmax_y.to(grad.dtype), argmax_x.to(grad.dtype)
    corners, weights = _bilinear(y, x, grad_input.shape[2:])
    sampled = y != -1
    total = torch.zeros_like(grad_input, dtype=grad.dtype).flatten(2)
    for corner, weight in zip(corners, weights, strict=True):
        _scatter(total, boxes[:, 0].long(), corner, grad * weight * sampled)
    grad_input.copy_(total.view_as(grad_input))


def roi_pool_forward(
    input: Tensor,
    rois: Tensor,
    output: Tensor,
    argmax: Tensor,
    pooled_height: int,
    pooled_width: int,
    spatial_scale: float,
) -> None:
    """RoIPool: greatest pixel of each bin, 0 for an empty bin; ``argmax`` (R, C, h, w) is its index in the map, or -1.

    mmcv's bins start at the scaled box itself (torchvision rounds the box first), and reach one image pixel further.
    """
    features = _wide(input)
    boxes = rois.to(features.dtype)
    channels, height, width = features.shape[1:]
    start_x, start_y = boxes[:, 1] * spatial_scale, boxes[:, 2] * spatial_scale
    size_x, size_y = (boxes[:, 3] + 1) * spatial_scale - start_x, (boxes[:, 4] + 1) * spatial_scale - start_y

    def edges(start: Tensor, size: Tensor, bins: int, limit: int) -> tuple[Tensor, Tensor]:
        step = (size / bins)[:, None]
        numbers = torch.arange(bins, device=boxes.device, dtype=boxes.dtype)
        low = (numbers * step + start[:, None]).floor().clamp(0, limit)
        high = ((numbers + 1) * step + start[:, None]).ceil().clamp(0, limit)
        return low.long(), high.long()

    low_y, high_y = edges(start_y, size_y, pooled_height, height)
    low_x, high_x = edges(start_x, size_x, pooled_width, width)
    side_y = int((high_y - low_y).amax().clamp_min(1)) if len(boxes) else 1
    side_x = int((high_x - low_x).amax().clamp_min(1)) if len(boxes) else 1
    for rows in _chunks(boxes, channels * pooled_height * pooled_width * side_y * side_x):
        y = low_y[rows, :, None] + torch.arange(side_y, device=boxes.device)  # (r, bins, side)
        x = low_x[rows, :, None] + torch.arange(side_x, device=boxes.device)
        grid = (len(y), pooled_height, pooled_width, side_y, side_x)
        inside_y, inside_x = y < high_y[rows, :, None], x < high_x[rows, :, None]
        inside = (inside_y[:, :, None, :, None] & inside_x[:, None, :, None, :]).expand(grid).flatten(3)
        pixel = y.clamp_max(height - 1)[:, :, None, :, None] * width + x.clamp_max(width - 1)[:, None, :, None, :]
        pixel = pixel.expand(grid).flatten(3)
        flat = features.flatten(2)[boxes[rows, 0].long()]
        values = flat.gather(2, pixel.flatten(1)[:, None].expand(-1, channels, -1)).unflatten(2, pixel.shape[1:])
        best, where = values.masked_fill(~inside[:, None], torch.finfo(torch.float32).min).max(-1)
        where = pixel[:, None].expand(-1, channels, -1, -1, -1).gather(-1, where[..., None])[..., 0]
        empty = ~inside.any(-1)[:, None]
        skipped = ((size_x[rows] <= 0) | (size_y[rows] <= 0))[:, None, None, None]
        output[rows] = best.masked_fill(empty | skipped, 0).to(output.dtype)
        # Boxes without a size are skipped by the compiled kernel: their argmax stays what the caller put there, 0.
        argmax[rows] = where.masked_fill(empty, -1).masked_fill(skipped, 0).to(argmax.dtype)


def roi_pool_backward(
    grad_output: Tensor,
    rois: Tensor,
    argmax: Tensor,
    grad_input: Tensor,
    pooled_height: int,
    pooled_width: int,
    spatial_scale: float,
) -> None:
    """Gradient of :func:`roi_pool_forward` in ``grad_input`` (N, C, H, W)."""
    grad = _wide(grad_output)
    total = torch.zeros_like(grad_input, dtype=grad.dtype).flatten(2)
    _scatter(total, rois[:, 0].long(), argmax.long().clamp_min(0), grad * (argmax >= 0))
    grad_input.copy_(total.view_as(grad_input))


def deform_conv_forward(
    input: Tensor,
    weight: Tensor,
    offset: Tensor,
    output: Tensor,
    columns: Tensor,
    ones: Tensor,
    kW: int,
    kH: int,
    dW: int,
    dH: int,
    padW: int,
    padH: int,
    dilationW: int,
    dilationH: int,
    group: int,
    deformable_group: int,
    im2col_step: int,
) -> None:
    """Deformable convolution; ``offset`` (N, groups * kH * kW * 2, h, w) holds (y, x) pairs. No scratch is used."""
    geometry = (dH, dW, padH, padW, dilationH, dilationW, group, deformable_group)
    output.copy_(_deform_conv(input, weight, offset, None, None, geometry))


def deform_conv_backward_input(
    input: Tensor,
    offset: Tensor,
    gradOutput: Tensor,
    gradInput: Tensor,
    gradOffset: Tensor,
    weight: Tensor,
    columns: Tensor,
    kW: int,
    kH: int,
    dW: int,
    dH: int,
    padW: int,
    padH: int,
    dilationW: int,
    dilationH: int,
    group: int,
    deformable_group: int,
    im2col_step: int,
) -> None:
    """Gradients of :func:`deform_conv_forward` for input and offset."""
    geometry = (dH, dW, padH, padW, dilationH, dilationW, group, deformable_group)
    grads = _deform_conv_backward(gradOutput, input, weight, offset, None, None, geometry)
    gradInput.copy_(grads[0])
    gradOffset.copy_(grads[2])


def deform_conv_backward_parameters(
    input: Tensor,
    offset: Tensor,
    gradOutput: Tensor,
    gradWeight: Tensor,
    columns: Tensor,
    ones: Tensor,
    kW: int,
    kH: int,
    dW: int,
    dH: int,
    padW: int,
    padH: int,
    dilationW: int,
    dilationH: int,
    group: int,
    deformable_group: int,
    scale: float,
    im2col_step: int,
) -> None:
    """Adds ``scale`` times the weight's gradient of :func:`deform_conv_forward` to ``gradWeight``."""
    geometry = (dH, dW, padH, padW, dilationH, dilationW, group, deformable_group)
    grads = _deform_conv_backward(gradOutput, input, gradWeight, offset, None, None, geometry)
    gradWeight.add_(grads[1].to(gradWeight.dtype), alpha=scale)


def modulated_deform_conv_forward(
    input: Tensor,
    weight: Tensor,
    bias: Tensor,
    ones: Tensor,
    offset: Tensor,
    mask: Tensor,
    output: Tensor,
    columns: Tensor,
    kernel_h: int,
    kernel_w: int,
    stride_h: int,
    stride_w: int,
    pad_h: int,
    pad_w: int,
    dilation_h: int,
    dilation_w: int,
    group: int,
    deformable_group: int,
    with_bias: bool,
) -> None:
    """Modulated deformable convolution (v2): samples are multiplied by ``mask`` (N, groups * kH * kW, h, w)."""
    geometry = (stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w, group, deformable_group)
    output.copy_(_deform_conv(input, weight, offset, mask, bias if with_bias else None, geometry))


def modulated_deform_conv_backward(
    input: Tensor,
    weight: Tensor,
    bias: Tensor,
    ones: Tensor,
    offset: Tensor,
    mask: Tensor,
    columns: Tensor,
    grad_input: Tensor,
    grad_weight: Tensor,
    grad_bias: Tensor,
    grad_offset: Tensor,
    grad_mask: Tensor,
    grad_output: Tensor,
    kernel_h: int,
    kernel_w: int,
    stride_h: int,
    stride_w: int,
    pad_h: int,
    pad_w: int,
    dilation_h: int,
    dilation_w: int,
    group: int,
    deformable_group: int,
    with_bias: bool,
) -> None:
    """Gradients of :func:`modulated_deform_conv_forward`."""
    geometry = (stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w, group, deformable_group)
    grads = _deform_conv_backward(grad_output, input, weight, offset, mask, bias if with_bias else None, geometry)
    for out, grad in zip((grad_input, grad_weight, grad_offset, grad_mask), grads[:4], strict=True):
        out.copy_(grad)
    if with_bias:
        grad_bias.copy_(grads[4])


def sigmoid_focal_loss_forward(
    input: Tensor, target: Tensor, weight: Tensor, output: Tensor, gamma: float, alpha: float
) -> None:
    """Focal loss of logits ``input`` (N, classes); ``target`` (N,) is a class, or ``classes`` for background.

    ``weight`` is empty, or one factor a class, that of each row's target.
    """
    x = _wide(input)
    p, positive = x.sigmoid(), _one_hot(target, x)
    loss = torch.where(positive, -alpha * (1 - p) ** gamma * _safe_log(p), -(1 - alpha) * p**gamma * _safe_log(1 - p))
    output.copy_(_weighted(loss, weight, target))


def sigmoid_focal_loss_backward(
    input: Tensor, target: Tensor, weight: Tensor, grad_input: Tensor, gamma: float, alpha: float
) -> None:
    """Derivative of :func:`sigmoid_focal_loss_forward` by each logit."""
    x = _wide(input)
    p, positive = x.sigmoid(), _one_hot(target, x)
    grad = torch.where(
        positive,
        -alpha * (1 - p) ** gamma * (1 - p - gamma * p * _safe_log(p)),
        -(1 - alpha) * p**gamma * (gamma * (1 - p) * _safe_log(1 - p) - p),
    )
    grad_input.copy_(_weighted(grad, weight, target))


def ms_deform_attn_forward(
    value: Tensor,
    value_spatial_shapes: Tensor,
    value_level_start_index: Tensor,
    sampling_locations: Tensor,
    attention_weights: Tensor,
    im2col_step: int,
) -> Tensor:
    """Multi-scale deformable attention (batch, queries, heads * channels) by mmcv's own PyTorch function."""
    from mmcv.ops.multi_scale_deform_attn import multi_scale_deformable_attn_pytorch

    shapes = value_spatial_shapes.tolist()
    tensors = (_wide(t) for t in (value, sampling_locations, attention_weights))
    wide, locations, weights = tensors
    return multi_scale_deformable_attn_pytorch(wide, shapes, locations, weights).to(value.dtype)


def ms_deform_attn_backward(
    value: Tensor,
    value_spatial_shapes: Tensor,
    value_level_start_index: Tensor,
    sampling_locations: Tensor,
    attention_weights: Tensor,
    grad_output: Tensor,
    grad_value: Tensor,
    grad_sampling_loc: Tensor,
    grad_attn_weight: Tensor,
    im2col_step: int,
) -> None:
    """Gradients of :func:`ms_deform_attn_forward`, by running it again under autograd."""
    inputs = [_wide(t).detach().requires_grad_() for t in (value, sampling_locations, attention_weights)]
    with torch.enable_grad():
        output = ms_deform_attn_forward(
            inputs[0], value_spatial_shapes, value_level_start_index, inputs[1], inputs[2], im2col_step
        )
    grads = torch.autograd.grad(output, inputs, _wide(grad_output))
    for out, grad in zip((grad_value, grad_sampling_loc, grad_attn_weight), grads, strict=True):
        out.copy_(grad)


def get_compiler_version() -> str:
    """What mmcv's environment report says in place of the compiler."""
    return "none: operators on torchvision, supplied by vision_mamba.mm"


def get_compiling_cuda_version() -> str:
    """What mmcv's environment report says in place of the CUDA version."""
    return "none"


def _wide(tensor: Tensor) -> Tensor:
    """float16 and bfloat16 as float32; others as they are."""
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor


def _deform_conv(input, weight, offset, mask, bias, geometry):
    x = _wide(input)
    mask_, bias_ = _optional(mask, bias, x, weight)
    return torch.ops.torchvision.deform_conv2d(
        x, weight.to(x.dtype), offset.to(x.dtype), mask_, bias_, *geometry, mask is not None
    )


def _deform_conv_backward(grad_output, input, weight, offset, mask, bias, geometry):
    x = _wide(input)
    mask_, bias_ = _optional(mask, bias, x, weight)
    return torch.ops.torchvision._deform_conv2d_backward(
        grad_output.to(x.dtype),
        x,
        weight.to(x.dtype),
        offset.to(x.dtype),
        mask_,
        bias_,
        *geometry,
        mask is not None,
    )


def _optional(mask: Tensor | None, bias: Tensor | None, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    mask_ = x.new_zeros((x.shape[0], 1)) if mask is None else mask.to(x.dtype)
    return mask_, x.new_zeros(weight.shape[0]) if bias is None else bias.to(x.dtype)


def _one_hot(target: Tensor, x: Tensor) -> Tensor:
    return target[:, None] == torch.arange(x.shape[1], device=x.device)


def _safe_log(p: Tensor) -> Tensor:
    return p.clamp_min(torch.finfo(torch.float32).tiny).log()


def _weighted(loss: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    return loss * weight.to(loss.dtype)[target][:, None] if weight.numel() else loss


def _chunks(boxes: Tensor, elements_a_box: int) -> list[slice]:
    step = max(1, _CHUNK // max(elements_a_box, 1))
    return [slice(start, start + step) for start in range(0, len(boxes), step)]


def _roi_geometry(boxes: Tensor, spatial_scale: float, aligned: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Start and size of boxes (R, 5) on the map: y, x, height, width."""
    x1, y1, x2, y2 = (boxes[:, 1:] * spatial_scale - (0.5 if aligned else 0.0)).unbind(1)
    height, width = y2 - y1, x2 - x1
    return (y1, x1, height, width) if aligned else (y1, x1, height.clamp_min(1), width.clamp_min(1))


def _samples(size: Tensor, bins: int, sampling_ratio: int) -> Tensor:
    """How many points a bin has along an axis, for each box."""
    if sampling_ratio > 0:
        return torch.full_like(size, sampling_ratio)
    return (size / bins).ceil().clamp_min(0)


def _largest_bin(boxes: Tensor, size, spatial_scale: float, sampling_ratio: int, aligned: bool) -> int:
    if not len(boxes):
        return 1
    _, _, height, width = _roi_geometry(boxes, spatial_scale, aligned)
    most = [int(_samples(s, n, sampling_ratio).amax()) for s, n in zip((height, width), size, strict=True)]
    return size[0] * size[1] * max(most[0], 1) * max(most[1], 1)


def _sample_points(boxes: Tensor, size, spatial_scale: float, sampling_ratio: int, aligned: bool):
    """Sampling positions (R, bins, points) along y and x, and which of the points a box has, (R, points)."""
    y, x, height, width = _roi_geometry(boxes, spatial_scale, aligned)
    points, valid = [], []
    for start, extent, bins in ((y, height, size[0]), (x, width, size[1])):
        count = _samples(extent, bins, sampling_ratio)
        number = torch.arange(max(int(count.amax()), 1), device=boxes.device, dtype=boxes.dtype)
        step = (extent / bins)[:, None, None]
        inside = (number + 0.5) * step / count.clamp_min(1)[:, None, None]
        first = torch.arange(bins, device=boxes.device, dtype=boxes.dtype)[:, None] * step + start[:, None, None]
        points.append(first + inside)
        valid.append(number < count[:, None])
    return *points, *valid


def _bilinear(y: Tensor, x: Tensor, size) -> tuple[list[Tensor], list[Tensor]]:
    """The four pixels (as indices in the flattened map) around points, and their weights; RoIAlign's border rule."""
    height, width = size
    outside = (y < -1) | (y > height) | (x < -1) | (x > width)
    low, high, fraction = [], [], []
    for position, limit in ((y, height), (x, width)):
        position = position.clamp(0, limit - 1)
        floor = position.floor()
        low.append(floor.long())
        high.append((floor.long() + 1).clamp_max(limit - 1))
        fraction.append(position - floor)
    ly, lx = fraction
    corners = [a * width + b for a in (low[0], high[0]) for b in (low[1], high[1])]
    weights = [(1 - ly) * (1 - lx), (1 - ly) * lx, ly * (1 - lx), ly * lx]
    return corners, [weight.masked_fill(outside, 0) for weight in weights]


def _scatter(total: Tensor, image: Tensor, pixel: Tensor, values: Tensor) -> None:
    """Adds ``values`` (R, C, h, w) to ``total`` (N, C, H * W) at ``pixel`` (R, C, h, w) of ``image`` (R,)."""
    channels, pixels = total.shape[1:]
    row = image[:, None] * channels + torch.arange(channels, device=total.device)
    place = row[:, :, None, None] * pixels + pixel
    total.view(-1).index_add_(0, place.flatten(), values.flatten())
