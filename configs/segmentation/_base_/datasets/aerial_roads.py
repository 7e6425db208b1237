_base_ = "small_set.py"
data_root = "data/aerial_roads"
metainfo = dict(classes=("background", "road"), palette=[[0, 0, 0], [255, 200, 0]])
train_dataloader = dict(dataset=dict(data_root=data_root, metainfo=metainfo))
val_dataloader = dict(dataset=dict(data_root=data_root, metainfo=metainfo))
test_dataloader = val_dataloader
