"""Trains a segmentor from an mmsegmentation config.

python tools/train_seg.py configs/segmentation/vmamba_tiny_aerial_roads.py --data-root path/to/aerial_roads
python tools/train_seg.py CONFIG --cfg-options train_dataloader.batch_size=8 model.backbone.pretrained=vmamba_t.pth
python tools/train_seg.py CONFIG --resume auto --amp bf16
torchrun --nproc-per-node 8 tools/train_seg.py CONFIG
"""

from vision_mamba.errors import run_main


def main() -> None:
    from vision_mamba.mm.run import main_train

    main_train("seg", __doc__)


if __name__ == "__main__":
    run_main(main)
