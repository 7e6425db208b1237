# Samba paper: AdamW 6e-4, no ImageNet weights, whole-image inference.
_base_ = "mmseg::_base_/models/upernet_swin.py"
model = dict(
    data_preprocessor=dict(size=(512, 512)),
    backbone=dict(_delete_=True, type="VisionMambaBackbone", model_name="samba", out_indices=(0, 1, 2, 3)),
    decode_head=dict(in_channels=[64, 128, 320, 448]),
    auxiliary_head=dict(in_channels=320),
)
optim_wrapper = dict(
    type="OptimWrapper",
    constructor="VisionMambaOptimConstructor",
    paramwise_cfg=dict(norm_decay_mult=0.0),
    optimizer=dict(type="AdamW", lr=6e-4, betas=(0.9, 0.999), weight_decay=0.01),
)
