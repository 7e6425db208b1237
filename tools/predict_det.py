"""Detects objects in images: overlays and predictions.json with boxes.

python tools/predict_det.py configs/detection/faster_rcnn_vmamba_tiny_aerial_cars.py output/run/epoch_60.pth photos/
python tools/predict_det.py CONFIG CHECKPOINT a.jpg b.jpg --score-thr 0.5
"""

from vision_mamba.errors import run_main


def main() -> None:
    from vision_mamba.mm.run import main_predict

    main_predict("det", __doc__)


if __name__ == "__main__":
    run_main(main)
