"""These tests need the extra ``mm``; without it each file is skipped, and says so."""

import importlib.util

import pytest

MISSING = [name for name in ("mmengine", "mmcv", "mmseg", "mmdet") if importlib.util.find_spec(name) is None]


class SkippedModule(pytest.Module):
    def collect(self):
        pytest.skip(f"{', '.join(MISSING)} not installed: pip install 'vision-mamba-zoo[mm]'", allow_module_level=True)


def pytest_pycollect_makemodule(module_path, parent):
    return SkippedModule.from_parent(parent, path=module_path) if MISSING else None
