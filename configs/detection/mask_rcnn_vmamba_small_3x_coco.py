_base_ = "mask_rcnn_vmamba_tiny_3x_coco.py"
model = dict(backbone=dict(model_name="vmamba_small_s2l15", drop_path_rate=0.3))
