_base_ = [
    "_base_/models/upernet_vmamba.py",
    "_base_/datasets/loveda.py",
    "_base_/schedules/15k.py",
    "_base_/runtime.py",
]
model = dict(
    backbone=dict(model_name="vmamba_small_s2l15", drop_path_rate=0.3),
    decode_head=dict(num_classes=7),
    auxiliary_head=dict(num_classes=7),
)
