# From scratch, on the sample set; see --cfg-options model.backbone.pretrained=FILE.
_base_ = "_base_/aerial_cars.py"
model = dict(
    backbone=dict(
        _delete_=True,
        type="VisionMambaBackbone",
        model_name="vmamba_tiny_s1l8",
        out_indices=(0, 1, 2, 3),
        drop_path_rate=0.2,
    ),
    neck=dict(in_channels=[96, 192, 384, 768]),
)
optim_wrapper = dict(constructor="VisionMambaOptimConstructor")
