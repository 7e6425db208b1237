"""Measures a trained detector (COCO average precision) and draws predictions.

python tools/test_det.py configs/detection/mask_rcnn_vmamba_tiny_1x_coco.py output/run/epoch_12.pth
"""

from vision_mamba.errors import run_main


def main() -> None:
    from vision_mamba.mm.run import main_test

    main_test("det", __doc__)


if __name__ == "__main__":
    run_main(main)
