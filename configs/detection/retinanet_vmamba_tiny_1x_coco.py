# RetinaNet with Swin's optimiser and mmdet's 1x schedule.
_base_ = [
    "mmdet::_base_/models/retinanet_r50_fpn.py",
    "mmdet::_base_/datasets/coco_detection.py",
    "mmdet::_base_/schedules/schedule_1x.py",
    "mmdet::_base_/default_runtime.py",
    "_base_/runtime.py",
]
model = dict(
    backbone=dict(
        _delete_=True,
        type="VisionMambaBackbone",
        model_name="vmamba_tiny_s1l8",
        out_indices=(1, 2, 3),
        pretrained=True,
        drop_path_rate=0.2,
    ),
    neck=dict(in_channels=[192, 384, 768], start_level=0),
)
optim_wrapper = dict(
    constructor="VisionMambaOptimConstructor",
    paramwise_cfg=dict(norm_decay_mult=0.0),
    optimizer=dict(_delete_=True, type="AdamW", lr=1e-4, betas=(0.9, 0.999), weight_decay=0.05),
)
