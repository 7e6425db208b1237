# Peer for comparisons: Swin-T with its own recipe, which is VMamba's too.
_base_ = "mmseg::_base_/models/upernet_swin.py"
model = dict(data_preprocessor=dict(size=(512, 512)), backbone=dict(drop_path_rate=0.2))
optim_wrapper = dict(
    type="OptimWrapper",
    paramwise_cfg=dict(norm_decay_mult=0.0, custom_keys=dict(relative_position_bias_table=dict(decay_mult=0.0))),
    optimizer=dict(type="AdamW", lr=6e-5, betas=(0.9, 0.999), weight_decay=0.01),
)
