# Vim paper, ViTDet's recipe: large-scale jitter at 1024, 100 epochs (25 of a data set repeated 4 times), batch 64,
# AdamW 1e-4, weight decay 0.1, layer decay 0.837, LayerNorm in neck and heads.
_base_ = [
    "mmdet::_base_/models/cascade-mask-rcnn_r50_fpn.py",
    "mmdet::common/lsj-100e_coco-instance.py",
    "_base_/runtime.py",
]
image_size = (1024, 1024)
norm_cfg = dict(type="LN2d")
model = dict(
    data_preprocessor=dict(
        pad_size_divisor=32, batch_augments=[dict(type="BatchFixedSizePad", size=image_size, pad_mask=True)]
    ),
    backbone=dict(
        _delete_=True,
        type="VisionMambaBackbone",
        model_name="vim_tiny_patch16_224",
        out_indices=(-1,),
        img_size=1024,
        pretrained=True,
        drop_path_rate=0.1,
    ),
    neck=dict(_delete_=True, type="SimpleFeaturePyramid", in_channels=192, out_channels=256, num_outs=5),
    rpn_head=dict(num_convs=2),
    roi_head=dict(
        bbox_head=[
            dict(
                type="Shared4Conv1FCBBoxHead",
                in_channels=256,
                fc_out_channels=1024,
                roi_feat_size=7,
                num_classes=80,
                norm_cfg=norm_cfg,
                bbox_coder=dict(type="DeltaXYWHBBoxCoder", target_means=[0.0] * 4, target_stds=stds),
                reg_class_agnostic=True,
                loss_cls=dict(type="CrossEntropyLoss", use_sigmoid=False, loss_weight=1.0),
                loss_bbox=dict(type="SmoothL1Loss", beta=1.0, loss_weight=1.0),
            )
            for stds in (
                [0.1, 0.1, 0.2, 0.2],
                [0.05, 0.05, 0.1, 0.1],
                [0.033, 0.033, 0.067, 0.067],
            )
        ],
        mask_head=dict(norm_cfg=norm_cfg),
    ),
)
test_pipeline = [
    dict(type="LoadImageFromFile", backend_args=None),
    dict(type="Resize", scale=image_size, keep_ratio=True),
    dict(type="LoadAnnotations", with_bbox=True, with_mask=True),
    dict(type="PackDetInputs", meta_keys=("img_id", "img_path", "ori_shape", "img_shape", "scale_factor")),
]
train_dataloader = dict(batch_size=8)
val_dataloader = dict(dataset=dict(pipeline=test_pipeline))
test_dataloader = val_dataloader
optim_wrapper = dict(
    constructor="VisionMambaOptimConstructor",
    paramwise_cfg=dict(layer_decay=0.837, norm_decay_mult=0.0),
    optimizer=dict(_delete_=True, type="AdamW", lr=1e-4, betas=(0.9, 0.999), weight_decay=0.1),
)
param_scheduler = [
    dict(type="LinearLR", start_factor=0.001, by_epoch=False, begin=0, end=250),
    dict(type="MultiStepLR", begin=0, end=25, by_epoch=True, milestones=[22, 24], gamma=0.1),
]
