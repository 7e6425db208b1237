# Maps of four blocks at 1/8, rescaled to a pyramid. RSMamba was published for classification only; the rest is Vim's.
_base_ = "upernet_vim.py"
model = dict(
    backbone=dict(model_name="rsmamba_base", out_indices=(5, 11, 17, 23), pretrained=False),
    neck=dict(rescales=[2, 1, 0.5, 0.25]),
    test_cfg=dict(_delete_=True, mode="whole"),
)
