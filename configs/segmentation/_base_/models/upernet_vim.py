# Vim paper: maps of blocks 6, 12, 18 and 24 at 1/16, rescaled to a pyramid; layer decay 0.92, batch 32.
_base_ = "mmseg::_base_/models/upernet_swin.py"
model = dict(
    data_preprocessor=dict(size=(512, 512)),
    backbone=dict(
        _delete_=True,
        type="VisionMambaBackbone",
        model_name="vim_tiny_patch16_224",
        out_indices=(5, 11, 17, 23),
        img_size=512,
        pretrained=True,
    ),
    neck=dict(type="Feature2Pyramid", embed_dim=192, rescales=[4, 2, 1, 0.5]),
    decode_head=dict(in_channels=[192, 192, 192, 192], channels=192),
    auxiliary_head=dict(in_channels=192),
    test_cfg=dict(mode="slide", crop_size=(512, 512), stride=(341, 341)),
)
optim_wrapper = dict(
    type="OptimWrapper",
    constructor="VisionMambaOptimConstructor",
    paramwise_cfg=dict(layer_decay=0.92, norm_decay_mult=0.0, bias_decay_mult=0.0),
    optimizer=dict(type="AdamW", lr=1e-4, betas=(0.9, 0.999), weight_decay=0.05),
)
