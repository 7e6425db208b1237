"""What a user's first import does and says."""

import subprocess
import sys
from pathlib import Path

import pytest
import timm

import vision_mamba

ROOT = Path(__file__).parent.parent


def test_models_are_registered_with_timm():
    names = timm.list_models("vim_*")
    for name in ("tiny_patch16_224", "small_patch16_224", "base_patch16_224"):
        assert f"vim_{name}" in names
    assert {"vim_tiny_patch16_stride8_224", "vim_small_patch16_stride8_224", "vim_nano"} <= set(names)
    assert "vim_tiny_patch16_224.hustvl_in1k" in timm.list_models("vim_*", pretrained=True)


def run_python(code, folder):
    return subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True)


def test_the_unrelated_distribution_beside_ours_is_an_error(tmp_path):
    folder = tmp_path / "vision_mamba-0.1.0.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text("Metadata-Version: 2.1\nName: vision-mamba\nVersion: 0.1.0\n")
    code = f"import sys; sys.path[:0] = [{str(tmp_path)!r}, {str(ROOT)!r}]; import vision_mamba"
    result = run_python(code, tmp_path)
    assert result.returncode and "pip uninstall vision-mamba vision-mamba-zoo" in result.stderr


def test_a_foreign_init_over_ours_is_an_error(tmp_path):
    package = tmp_path / "vision_mamba"
    package.mkdir()
    for entry in (ROOT / "vision_mamba").iterdir():
        if entry.name != "__init__.py":
            (package / entry.name).symlink_to(entry)
    (package / "__init__.py").write_text("class Vim: pass\n")
    code = f"import sys; sys.path[0] = {str(tmp_path)!r}; import vision_mamba.models"
    result = run_python(code, tmp_path)
    assert result.returncode and "unrelated distribution 'vision-mamba'" in result.stderr


def test_ci_runs_the_readme_command():
    readme = (ROOT / "README.md").read_text()
    commands = [line for line in readme.splitlines() if line.startswith("pip install uv && uv run ")]
    assert len(commands) == 2 and "pytest" in commands[1] and "tools/train.py" in commands[0]
    assert (ROOT / ".ci" / "run").stat().st_mode & 0o100


def test_version_is_the_distribution_version():
    tomllib = pytest.importorskip("tomllib", reason="Python 3.10 has no tomllib")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["version"] == vision_mamba.__version__ and project["name"] == vision_mamba.DISTRIBUTION
