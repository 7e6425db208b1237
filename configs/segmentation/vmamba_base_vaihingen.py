_base_ = [
    "_base_/models/upernet_vmamba.py",
    "_base_/datasets/vaihingen.py",
    "_base_/schedules/15k.py",
    "_base_/runtime.py",
]
model = dict(
    backbone=dict(model_name="vmamba_base_s2l15", drop_path_rate=0.6),
    decode_head=dict(in_channels=[128, 256, 512, 1024], num_classes=6),
    auxiliary_head=dict(in_channels=512, num_classes=6),
)
