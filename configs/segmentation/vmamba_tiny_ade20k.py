_base_ = [
    "_base_/models/upernet_vmamba.py",
    "_base_/datasets/ade20k.py",
    "_base_/schedules/160k.py",
    "_base_/runtime.py",
]
model = dict(
    decode_head=dict(num_classes=150),
    auxiliary_head=dict(num_classes=150),
)
