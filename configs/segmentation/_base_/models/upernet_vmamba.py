# Swin's UPerNet recipe, which the VMamba paper follows: AdamW 6e-5, batch 16.
_base_ = "mmseg::_base_/models/upernet_swin.py"
model = dict(
    data_preprocessor=dict(size=(512, 512)),
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
    type="OptimWrapper",
    constructor="VisionMambaOptimConstructor",
    paramwise_cfg=dict(norm_decay_mult=0.0),
    optimizer=dict(type="AdamW", lr=6e-5, betas=(0.9, 0.999), weight_decay=0.01),
)
