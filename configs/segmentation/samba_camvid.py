# From scratch, on the sample set.
_base_ = [
    "_base_/models/upernet_samba.py",
    "_base_/datasets/camvid.py",
    "_base_/schedules/2k.py",
    "_base_/runtime.py",
]
model = dict(
    data_preprocessor=dict(size=(240, 320), seg_pad_val=11),
    decode_head=dict(num_classes=11, ignore_index=11),
    auxiliary_head=dict(num_classes=11, ignore_index=11),
)
optim_wrapper = dict(optimizer=dict(lr=3e-4))
