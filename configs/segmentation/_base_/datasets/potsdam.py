# Samba's configs: 8 images a GPU.
_base_ = "mmseg::_base_/datasets/potsdam.py"
train_dataloader = dict(batch_size=8)
