_base_ = [
    "_base_/models/upernet_vim.py",
    "_base_/datasets/ade20k.py",
    "_base_/schedules/60k.py",
    "_base_/runtime.py",
]
model = dict(
    decode_head=dict(num_classes=150),
    auxiliary_head=dict(num_classes=150),
)
# The published script's values, above those of its config.
train_dataloader = dict(batch_size=8)
optim_wrapper = dict(optimizer=dict(lr=2e-4, weight_decay=0.1))
