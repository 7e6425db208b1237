_base_ = [
    "_base_/models/upernet_rsmamba.py",
    "_base_/datasets/potsdam.py",
    "_base_/schedules/15k.py",
    "_base_/runtime.py",
]
model = dict(
    decode_head=dict(num_classes=6),
    auxiliary_head=dict(num_classes=6),
)
