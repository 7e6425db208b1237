"""Segments images: masks with palette, overlays, and predictions.json with the classes' shares.

python tools/predict_seg.py configs/segmentation/vmamba_tiny_aerial_roads.py output/run/iter_2000.pth photos/ more.jpg
"""

from vision_mamba.errors import run_main


def main() -> None:
    from vision_mamba.mm.run import main_predict

    main_predict("seg", __doc__)


if __name__ == "__main__":
    run_main(main)
