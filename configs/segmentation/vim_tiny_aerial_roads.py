# From scratch, on the sample set; see --cfg-options model.backbone.pretrained=FILE.
_base_ = [
    "_base_/models/upernet_vim.py",
    "_base_/datasets/aerial_roads.py",
    "_base_/schedules/2k.py",
    "_base_/runtime.py",
]
model = dict(
    data_preprocessor=dict(size=(320, 320)),
    backbone=dict(img_size=(320, 320), pretrained=False),
    decode_head=dict(num_classes=2),
    auxiliary_head=dict(num_classes=2),
    test_cfg=dict(_delete_=True, mode="whole"),
)
# No layer decay, and the weight decay of its peers: nothing was learned before.
optim_wrapper = dict(optimizer=dict(lr=3e-4, weight_decay=0.01), paramwise_cfg=dict(layer_decay=1.0))
