"""Measures a trained segmentor (mIoU, per class too) and draws predictions.

python tools/test_seg.py configs/segmentation/vmamba_tiny_ade20k.py output/run/iter_160000.pth
"""

from vision_mamba.errors import run_main


def main() -> None:
    from vision_mamba.mm.run import main_test

    main_test("seg", __doc__)


if __name__ == "__main__":
    run_main(main)
