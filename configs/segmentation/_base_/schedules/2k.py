# For sample sets of some hundred images: 2000 iterations, 100 of them warm-up.
_base_ = "15k.py"
train_cfg = dict(max_iters=2000, val_interval=200)
param_scheduler = [
    dict(type="LinearLR", start_factor=1e-6, by_epoch=False, begin=0, end=100),
    dict(type="PolyLR", eta_min=0.0, power=1.0, begin=100, end=2000, by_epoch=False),
]
default_hooks = dict(checkpoint=dict(interval=200))
