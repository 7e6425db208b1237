# From scratch, on the sample set; see --cfg-options model.backbone.pretrained=FILE.
_base_ = [
    "_base_/models/upernet_vim.py",
    "_base_/datasets/camvid.py",
    "_base_/schedules/2k.py",
    "_base_/runtime.py",
]
model = dict(
    data_preprocessor=dict(size=(240, 320), seg_pad_val=11),
    backbone=dict(img_size=(240, 320), pretrained=False),
    decode_head=dict(num_classes=11, ignore_index=11),
    auxiliary_head=dict(num_classes=11, ignore_index=11),
    test_cfg=dict(_delete_=True, mode="whole"),
)
# No layer decay, and the weight decay of its peers: nothing was learned before.
optim_wrapper = dict(optimizer=dict(lr=3e-4, weight_decay=0.01), paramwise_cfg=dict(layer_decay=1.0))
