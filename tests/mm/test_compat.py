"""The adapters: in fresh processes, where nothing has been mended yet."""

import importlib.util
import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

TOOLS = Path(__file__).parents[2] / "tools"


def python(code, *arguments):
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True)
    return done.returncode, done.stdout + done.stderr


def test_import_stays_light():
    code, out = python(
        "import vision_mamba, sys; print([m for m in sys.modules if m.startswith(('mmengine', 'mmcv', 'mmseg'))])"
    )
    assert code == 0 and out.strip() == "[]"


def test_everything_imports_and_package_configs_are_found(tmp_path):
    (tmp_path / "c.py").write_text("_base_ = ['mmseg::_base_/models/upernet_swin.py']\n")
    (tmp_path / "d.py").write_text("_base_ = ['mmdet::_base_/models/retinanet_r50_fpn.py']\n")
    code, out = python(
        "import sys, vision_mamba.mm, mmcv.ops, mmseg.apis, mmdet.apis\n"
        "from mmengine.config import Config\n"
        "print([Config.fromfile(f).model.type for f in sys.argv[1:]])",
        str(tmp_path / "c.py"),
        str(tmp_path / "d.py"),
    )
    assert code == 0 and "['EncoderDecoder', 'RetinaNet']" in out


@pytest.mark.skipif(
    importlib.util.find_spec("mmcv._ext").origin is not None, reason="the compiled mmcv._ext of this machine is in use"
)
def test_a_compiled_extension_goes_first(tmp_path):
    """A stand-in for the compiled module, where mmcv would have it."""
    (tmp_path / "_ext.py").write_text(
        "def nms(*args):\n    return 'compiled'\ndef __getattr__(name):\n    return nms\n"
    )
    code, out = python(
        "import sys, mmcv; mmcv.__path__.append(sys.argv[1])\n"
        "import vision_mamba.mm, mmcv.ops.nms as _\n"
        "print(sys.modules['mmcv.ops.nms'].ext_module.nms(), sys.modules['mmcv._ext'].__file__)",
        str(tmp_path),
    )
    assert code == 0 and f"compiled {tmp_path}" in out


def test_a_missing_package_is_named(tmp_path):
    (tmp_path / "sitecustomize.py").write_text(
        "import importlib.util as u\nfind = u.find_spec\n"
        "u.find_spec = lambda name, *a: None if name == 'mmcv' else find(name, *a)\n"
    )
    done = subprocess.run(
        [sys.executable, str(TOOLS / "train_seg.py"), "x.py"],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(tmp_path)},
    )
    message = "error: segmentation and detection need mmcv: pip install 'vision-mamba-zoo[mm]' (or mmcv-lite)\n"
    assert done.returncode == 2 and done.stderr == message


@pytest.mark.parametrize("tool", ["train_seg", "test_seg", "predict_seg", "train_det", "test_det", "predict_det"])
def test_help_has_an_example(tool, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [f"tools/{tool}.py", "--help"])
    with pytest.raises(SystemExit) as done:
        runpy.run_path(str(TOOLS / f"{tool}.py"), run_name="__main__")
    assert done.value.code == 0 and f"python tools/{tool}.py configs/" in capsys.readouterr().out
