"""Shared by all tests: poisoned memory, and comparison by relative RMS error."""

import hashlib
import os
from pathlib import Path

import pytest
import torch

# numba's cache on disk knows the file of a kernel, not those of what the kernel calls: after a change in one of these
# it would go on with the old one. So each state of all files has a cache of its own.
_CPU = Path(__file__).parents[1] / "vision_mamba" / "ops" / "cpu"
_STATE = hashlib.sha256(b"".join(path.read_bytes() for path in sorted(_CPU.glob("*.py")))).hexdigest()[:16]
os.environ.setdefault("NUMBA_CACHE_DIR", str(_CPU / "__pycache__" / f"tests-{_STATE}"))


def pytest_configure(config):
    workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    if workers > 1:  # they share the cores, and so do the programs that they start
        threads = max(1, (os.cpu_count() or 1) // workers)
        torch.set_num_threads(threads)
        os.environ.setdefault("OMP_NUM_THREADS", str(threads))
    config.addinivalue_line("markers", "gpu: needs a CUDA device")
    config.addinivalue_line("markers", "slow: takes more than ten seconds")


def pytest_collection_modifyitems(items):
    if not torch.cuda.is_available():
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="needs a GPU, and this machine has none"))


@pytest.fixture(autouse=True)
def poisoned_memory():
    """``torch.empty`` gives NaN, so a kernel that reads what it has not written fails at once."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    yield
    torch.use_deterministic_algorithms(before)


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """RMS of the difference over RMS of the expected values."""
    actual, expected = actual.detach().double().cpu(), expected.detach().double().cpu()
    return float((actual - expected).norm() / expected.norm().clamp_min(1e-30))


def assert_close(name: str, actual: torch.Tensor, expected: torch.Tensor, tolerance: float) -> None:
    assert actual.shape == expected.shape, f"{name}: shape {tuple(actual.shape)} != {tuple(expected.shape)}"
    assert bool(torch.isfinite(actual).all()), f"{name}: not finite"
    error = relative_error(actual, expected)
    if float(expected.detach().double().norm()) < 1e-12:  # nothing to be relative to
        error = float(actual.detach().double().norm())
    assert error <= tolerance, f"{name}: relative error {error:.2e} > {tolerance:.0e}"
