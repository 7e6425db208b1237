_base_ = [
    "_base_/models/upernet_vim.py",
    "_base_/datasets/potsdam.py",
    "_base_/schedules/15k.py",
    "_base_/runtime.py",
]
model = dict(
    decode_head=dict(num_classes=6),
    auxiliary_head=dict(num_classes=6),
)
# The published script's values, above those of its config.
optim_wrapper = dict(optimizer=dict(lr=2e-4, weight_decay=0.1))
