_base_ = [
    "_base_/models/upernet_vmamba.py",
    "_base_/datasets/loveda.py",
    "_base_/schedules/15k.py",
    "_base_/runtime.py",
]
model = dict(
    decode_head=dict(num_classes=7),
    auxiliary_head=dict(num_classes=7),
)
