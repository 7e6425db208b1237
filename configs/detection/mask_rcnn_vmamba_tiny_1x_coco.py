# VMamba paper: Swin's recipe of 12 epochs; AdamW 1e-4, weight decay 0.05, batch 16.
_base_ = ["mmdet::swin/mask-rcnn_swin-t-p4-w7_fpn_1x_coco.py", "_base_/runtime.py"]
model = dict(
    backbone=dict(
        _delete_=True,
        type="VisionMambaBackbone",
        model_name="vmamba_tiny_s1l8",
        out_indices=(0, 1, 2, 3),
        pretrained=True,
        drop_path_rate=0.2,
    ),
)
optim_wrapper = dict(
    constructor="VisionMambaOptimConstructor",
    paramwise_cfg=dict(_delete_=True, norm_decay_mult=0.0),
)
