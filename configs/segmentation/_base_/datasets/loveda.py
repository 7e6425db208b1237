# Samba's configs: 8 images a GPU.
_base_ = "mmseg::_base_/datasets/loveda.py"
train_dataloader = dict(batch_size=8)
