"""Trains a detector from an mmdetection config.

python tools/train_det.py configs/detection/faster_rcnn_vmamba_tiny_aerial_cars.py --data-root path/to/aerial_cars
python tools/train_det.py CONFIG --cfg-options train_dataloader.batch_size=4 model.backbone.pretrained=vmamba_t.pth
python tools/train_det.py CONFIG --resume auto --amp bf16
torchrun --nproc-per-node 8 tools/train_det.py CONFIG
"""

from vision_mamba.errors import run_main


def main() -> None:
    from vision_mamba.mm.run import main_train

    main_train("det", __doc__)


if __name__ == "__main__":
    run_main(main)
