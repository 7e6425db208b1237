# Vim: 4 GPUs of 8 images; VMamba: 4 of 4.
_base_ = "mmseg::_base_/datasets/ade20k.py"
train_dataloader = dict(batch_size=4)
