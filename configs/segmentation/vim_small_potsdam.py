_base_ = [
    "_base_/models/upernet_vim.py",
    "_base_/datasets/potsdam.py",
    "_base_/schedules/15k.py",
    "_base_/runtime.py",
]
model = dict(
    backbone=dict(model_name="vim_small_patch16_224"),
    neck=dict(embed_dim=384),
    decode_head=dict(in_channels=[384, 384, 384, 384], channels=384, num_classes=6),
    auxiliary_head=dict(in_channels=384, num_classes=6),
)
# The published script's value.
optim_wrapper = dict(paramwise_cfg=dict(layer_decay=0.95))
