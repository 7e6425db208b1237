# Peer for comparisons: ResNet-50, trained like VMamba.
_base_ = "mmseg::_base_/models/upernet_r50.py"
model = dict(pretrained=None, data_preprocessor=dict(size=(512, 512)))
optim_wrapper = dict(
    type="OptimWrapper",
    paramwise_cfg=dict(norm_decay_mult=0.0),
    optimizer=dict(type="AdamW", lr=6e-5, betas=(0.9, 0.999), weight_decay=0.01),
)
