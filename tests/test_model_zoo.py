"""model_zoo.md is what tools/make_model_zoo.py would write. `tools/make_model_zoo.py --check` counts every model anew."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest

from vision_mamba.errors import UserError

TOOL = Path(__file__).parents[1] / "tools" / "make_model_zoo.py"


@pytest.fixture(scope="module")
def tool():
    spec = importlib.util.spec_from_file_location("make_model_zoo", TOOL)
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)  # dataclasses look for it there
    spec.loader.exec_module(module)
    return module


def test_not_stale(tool):
    """All but the counts, which are taken from the file; of every family one model is counted."""
    text = tool.ZOO.read_text()
    recorded, counted = tool.recorded(text), set()

    def numbers(entry):
        if entry.family in counted:
            return recorded(entry)
        counted.add(entry.family)
        assert tool.count(entry) == recorded(entry), f"{entry.label}: run python tools/make_model_zoo.py"
        return recorded(entry)

    lines = text.splitlines()
    assert [line for line in tool.zoo(numbers).splitlines() if line not in lines] == [], "run tools/make_model_zoo.py"
    assert tool.zoo(recorded) == text, "run python tools/make_model_zoo.py"


@pytest.mark.slow
def test_check_counts_every_model(tool, capsys):
    tool.main(["--check"])
    assert "up to date" in capsys.readouterr().out


def test_a_stale_file_is_an_error(tool, monkeypatch, tmp_path):
    text = tool.ZOO.read_text()
    monkeypatch.setattr(tool, "count", tool.recorded(text))
    monkeypatch.setattr(tool, "ZOO", tmp_path / "model_zoo.md")
    tool.main([])
    assert tool.ZOO.read_text() == text
    tool.ZOO.write_text(text.replace("top-1 76.1", "top-1 99.9"))
    with pytest.raises(UserError, match="stale.*top-1 76.1"):
        tool.main(["--check"])
    row = next(line for line in text.splitlines() if line.startswith("| `vim_nano`"))
    with pytest.raises(UserError, match="no row vim_nano; run python tools/make_model_zoo.py"):
        tool.zoo(tool.recorded(text.replace(row, "")))


def test_known_facts_of_a_row(tool):
    rows = {line.split("`")[1]: line for line in tool.ZOO.read_text().splitlines() if line.startswith("| `")}
    vim = [cell.strip() for cell in rows["vim_tiny_patch16_224"].strip("|").split("|")]
    assert vim[1] == "7.15" and vim[3] == "224" and "top-1 76.1" in vim[4] and vim[6] == "yes: `vim_tiny_224`"
    assert "hustvl/Vim-tiny-midclstok" in vim[5] and "`vim_t_midclstok_76p1acc.pth`" in vim[5]
    assert [label for label, row in rows.items() if "| yes: " in row] == ["vim_tiny_patch16_224", "vmamba_tiny_s1l8"]
    assert not [label for label in rows if label.startswith("test_")]


def test_speed_is_the_fastest_row_of_the_size(tool, monkeypatch, tmp_path):
    entry = next(e for e in tool.entries() if e.name == "vim_tiny_patch16_224")
    row = dict(model=entry.name, what="inference", size=224, batch=1, mode="eager", images_per_s=1200.4)
    rows = [
        row,
        {**row, "images_per_s": 7.0},
        {**row, "size": 512, "images_per_s": 9e9},
        {**row, "model": "deit", "images_per_s": 9e9},
    ]
    for name in ("vim-h100", "vim-h100-before", "vim-cpu"):
        (tmp_path / f"{name}.json").write_text(json.dumps({"rows": rows if "h100" in name else rows[2:]}))
    (tmp_path / "scenes-cpu.json").write_text(json.dumps({"scenes": []}))
    monkeypatch.setattr(tool, "RESULTS", tmp_path)
    files = tool.measurements()
    assert list(files) == ["vim-cpu", "vim-h100"] and tool.speed(entry, files) == "H100 1,200 / –"
    (tmp_path / "zoo-h100.json").write_text(json.dumps({"rows": [{**row, "what": "training", "images_per_s": 88.8}]}))
    assert tool.speed(entry, tool.measurements()) == "H100 1,200 / 88.8"


def test_agreement_is_read_from_the_tests(tool):
    vim = tool.agreement("vim", "https://github.com/hustvl/Vim")
    assert vim.tolerance == 2e-5 and {"vim_tiny_224", "vim_tinycfg_v2_midcls"} <= set(vim.cases)
    assert "`tests/models/test_vim.py`" in vim.sentence() and "at most 2e-05" in vim.sentence()
    assert vim.of("7.15") == "yes: `vim_tiny_224`" and vim.of("25.80") == "same code"
    assert tool.agreement("vim", "https://github.com/elsewhere/Other").of("7.15") == "no case"
    assert tool.agreement("none", "").of("7.15") == "no case"
