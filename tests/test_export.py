"""Exported files: the same numbers as the model, from one file for every batch; what they say of themselves; mistakes."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch

import vision_mamba  # noqa: F401  # registers the models
from tests.conftest import assert_close
from vision_mamba.engine.export import choose_backend, export_model, open_exported
from vision_mamba.engine.lowering import decompositions
from vision_mamba.errors import UserError, run_main
from vision_mamba.ops import add_norm, causal_conv1d, reference, selective_scan

TOOL = Path(__file__).parents[1] / "tools" / "export.py"
#: The tiny model of every family, and those that take clips.
FAMILIES = [n for n in timm.list_models("test_*") if timm.model_entrypoint(n).__module__.startswith("vision_mamba.")]
KINDS = ("pt2", "onnx")


def needs(kind):
    if kind == "onnx":
        for package in ("onnx", "onnxscript", "onnxruntime"):
            pytest.importorskip(package, reason=f"needs the extra export ({package})")


def run(*arguments, capsys):
    """Exit code, stdout and stderr of the tool."""
    spec = importlib.util.spec_from_file_location("export_tool", TOOL)
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    with pytest.raises(SystemExit) as ended:
        run_main(lambda: tool.main([str(a) for a in arguments]))
    out, err = capsys.readouterr()
    return ended.value.code, out, err


def create(name, **kwargs):
    torch.manual_seed(0)
    return timm.create_model(name, **kwargs).eval()


def images(batch, *size):
    return torch.randn(batch, *size, generator=torch.Generator().manual_seed(batch))


@torch.no_grad()
def check(model, exported, *shapes):
    for shape in shapes:
        x = images(*shape)
        assert_close(f"output for {shape}", exported.run(x), model(x), 1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", FAMILIES)
def test_family(name, kind, tmp_path):
    needs(kind)
    model = create(name)
    channels, *size = model.pretrained_cfg["input_size"]
    size = (channels, *([model.num_frames] if hasattr(model, "num_frames") else []), *size)
    report = export_model(model, tmp_path / f"m.{kind}", input_size=size)
    check(model, open_exported(report.path), (1, *size), (3, *size))
    assert report.nodes < 1500  # a graph of its own for every token would be larger


def test_families_are_found():
    assert {"test_vim", "test_vmamba", "test_rsmamba", "test_samba"} <= set(FAMILIES)


# The operators written out for ONNX


def scan_case(groups=1, states=4, gate=None, merge="sum", paths=2):
    g = torch.Generator().manual_seed(0)

    def random(*shape):
        return torch.randn(shape, generator=g)

    b, L, K, D = 2, 7, paths, 6
    table = torch.stack([torch.randperm(L, generator=g) for _ in range(K)])
    z = {None: None, "shared": random(b, L, D), "own": random(b, L, K, D)}[gate]
    tensors = [random(b, L, D), random(b, L, K, D), -random(K, D, states).exp()]
    tensors += [random(b, L, K, groups, states), random(b, L, K, groups, states), random(K, D), z, random(K, D)]
    options = dict(delta_softplus=True, paths=table, merge=merge, initial_state=random(b, K, D, states))
    return tensors, dict(options, return_last_state=True)


class Call(torch.nn.Module):
    def __init__(self, function, options):
        super().__init__()
        self.function, self.options = function, options

    def forward(self, *tensors):
        return self.function(*tensors, **self.options)


def lowered(function, tensors, **options):
    with torch.no_grad():
        program = torch.export.export(Call(function, options), tuple(tensors)).run_decompositions(decompositions())
        left = {str(node.target) for node in program.graph.nodes if "vision_mamba" in str(node.target)}
        assert left <= {"vision_mamba.recurrence.default", "vision_mamba.scalar_recurrence.default"}
        return program.module()(*tensors)


@pytest.mark.parametrize(
    "case",
    [
        dict(),
        dict(states=1, gate="shared"),
        dict(groups=3, gate="own"),
        dict(gate="shared", merge="none"),
        dict(states=1, groups=2, gate="own", merge="none", paths=1),
    ],
    ids=str,
)
def test_scan_written_out(case):
    tensors, options = scan_case(**case)
    double = [None if t is None else t.double() for t in tensors]
    expected = reference.selective_scan(*double, **{**options, "initial_state": options["initial_state"].double()})
    for name, a, e in zip(("y", "last state"), lowered(selective_scan, tensors, **options), expected, strict=True):
        assert_close(name, a, e, 1e-6)


@pytest.mark.parametrize("silu", [None, "silu"])
def test_convolution_written_out(silu):
    (x, *_), options = scan_case()
    weight, bias = torch.randn(2, 6, 4), torch.randn(2, 6)
    expected = reference.causal_conv1d(
        x.double(), weight.double(), bias.double(), activation=silu, paths=options["paths"]
    )
    found = lowered(causal_conv1d, [x, weight, bias], activation=silu, paths=options["paths"])
    assert_close("y", found, expected, 1e-6)


@pytest.mark.parametrize("norm", ["rms", "layer"])
@pytest.mark.parametrize("residual", [True, False])
def test_norm_written_out(norm, residual):
    x, r, weight, bias = torch.randn(2, 5, 6), torch.randn(2, 5, 6), torch.randn(6), torch.randn(6)
    r = r if residual else None
    expected = reference.add_norm(
        x.double(), None if r is None else r.double(), weight.double(), bias.double(), norm=norm,
        dtype=torch.float64, residual_dtype=torch.float64,
    )  # fmt: skip
    found = lowered(add_norm, [x, r, weight, bias], norm=norm)
    for name, a, e in zip(("normed", "sum"), found, expected, strict=True):
        assert_close(name, a, e, 1e-6)


# Files


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """As tools/train.py writes it, with averaged weights that differ."""
    args = dict(num_classes=3, in_chans=4, img_size=32, depth=1)
    model = create("test_vim", **args)
    path = tmp_path_factory.mktemp("run") / "best.pth"
    state = model.state_dict()
    torch.save(
        {
            "format": "vision_mamba/1",
            "arch": "test_vim",
            "model_args": args,
            "classes": ["blue", "green", "red"],
            "data_config": dict(
                input_size=[4, 32, 32], mean=[0.1, 0.2, 0.3, 0.4], std=[0.5] * 4, interpolation="bicubic", crop_pct=0.9
            ),
            "state_dict": state,
            "state_dict_ema": {k: v * (-1 if k.startswith("head") else 1) for k, v in state.items()},
            "data": {"source": None},
        },
        path,
    )
    return path, model


@pytest.mark.parametrize("kind", KINDS)
def test_tool_on_a_checkpoint(checkpoint, kind, tmp_path, capsys):
    needs(kind)
    path, model = checkpoint
    out = tmp_path / f"m.{kind}"
    code, stdout, stderr = run(path, out, "--no-ema", capsys=capsys)
    assert code == 0, stderr
    assert os.listdir(tmp_path) == [out.name] and f"wrote {out}" in stdout and stdout.count("differs from") == 2
    exported = open_exported(out)
    check(model, exported, (1, 4, 32, 32), (3, 4, 32, 32), (2, 4, 32, 32))
    about = exported.about
    assert about["classes"] == ["blue", "green", "red"] and about["input_size"] == [4, 32, 32]
    assert about["mean"] == [0.1, 0.2, 0.3, 0.4] and about["std"] == [0.5] * 4 and about["crop_pct"] == 0.9
    assert "test_vim" in about["model"] and about["dynamic_batch"] and about["torch"] == torch.__version__
    with pytest.raises(UserError, match=r"does not take images of shape \(1, 4, 64, 32\)"):
        exported.run(images(1, 4, 64, 32))
    before = out.read_bytes()
    code, _, stderr = run(path, out, capsys=capsys)
    assert code == 2 and "--overwrite" in stderr and out.read_bytes() == before


def test_onnx_file_says_it_to_other_programs(checkpoint, tmp_path):
    """With onnxruntime alone, and with nothing in the file that onnxruntime would need from us."""
    needs("onnx")
    import onnx
    import onnxruntime

    _, model = checkpoint
    export_model(model, tmp_path / "m.onnx", input_size=(4, 32, 32), about={"classes": ["a"]})
    proto = onnx.load(tmp_path / "m.onnx")
    onnx.checker.check_model(proto, full_check=True)
    assert {node.op_type for node in proto.graph.node} >= {"Scan"} and {node.domain for node in proto.graph.node} == {
        ""
    }
    session = onnxruntime.InferenceSession(tmp_path / "m.onnx", providers=["CPUExecutionProvider"])
    assert json.loads(session.get_modelmeta().custom_metadata_map["vision_mamba"])["classes"] == ["a"]
    x = images(5, 4, 32, 32)
    with torch.no_grad():
        assert_close("logits", torch.from_numpy(session.run(None, {"images": x.numpy()})[0]), model(x), 1e-5)


def test_one_image_at_once(checkpoint, tmp_path):
    export_model(checkpoint[1], tmp_path / "m.pt2", input_size=(4, 32, 32), dynamic_batch=False)
    with pytest.raises(UserError, match=r"does not take images of shape \(2, 4, 32, 32\)"):
        open_exported(tmp_path / "m.pt2").run(images(2, 4, 32, 32))


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_any_size(kind, tmp_path):
    needs(kind)
    model = create("test_vmamba", depths=(1, 1, 1, 1))
    report = export_model(model, tmp_path / f"m.{kind}", input_size=(3, 64, 64), dynamic_size=True)
    assert {c.shape[2:] for c in report.checks} == {(64, 64), (64, 128), (96, 128)}
    check(model, open_exported(report.path), (1, 3, 64, 64), (2, 3, 160, 96))


@pytest.mark.parametrize("dynamic_img_size", [False, True])
def test_a_model_of_one_size_is_not_written_for_any(dynamic_img_size, tmp_path):
    """Position tables are resampled at other sizes than the model's own: no one program does both."""
    model = create("test_vim", depth=1, dynamic_img_size=dynamic_img_size)
    with pytest.raises(UserError, match="cannot be exported with a dynamic batch and size; leave that out"):
        export_model(model, tmp_path / "m.pt2", input_size=(3, 64, 64), dynamic_size=True)
    assert not list(tmp_path.iterdir())


def test_a_file_that_differs_is_not_written(checkpoint, tmp_path, monkeypatch):
    from vision_mamba.engine import export

    real = export.open_exported
    monkeypatch.setattr(
        export, "open_exported", lambda p: export.ExportedModel(lambda x: real(p).run(x) * 1.001, {})
    )  # fmt: skip
    with pytest.raises(UserError, match="was not written"):
        export_model(checkpoint[1], tmp_path / "m.pt2", input_size=(4, 32, 32))
    assert not list(tmp_path.iterdir())


def test_pt2_without_the_package(checkpoint, tmp_path):
    """The operators are ours: loading fails without the package, and works in a fresh process with it."""
    export_model(checkpoint[1], tmp_path / "m.pt2", input_size=(4, 32, 32))
    load = f"torch.export.load({str(tmp_path / 'm.pt2')!r}).module()(torch.zeros(1, 4, 32, 32)); print('finished')"
    code = f"import torch\ntry:\n    {load}\nexcept Exception:\n    print('refused')\nimport vision_mamba\n{load}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=TOOL.parents[1])
    assert done.stdout.split() == ["refused", "finished"], done.stdout + done.stderr
    assert "failed to resolve torch.ops.vision_mamba" in done.stderr  # so says torch, which names the package


def test_backend_of_the_device_that_runs(checkpoint, tmp_path):
    export_model(checkpoint[1], tmp_path / "m.pt2", input_size=(4, 32, 32))
    program = torch.export.load(tmp_path / "m.pt2")

    def backends():
        own = [node for node in program.graph.nodes if "vision_mamba" in str(node.target)]
        return {arg for node in own for arg in node.args if isinstance(arg, str)}

    assert backends() == {"cpu"}
    choose_backend(program, "triton")
    assert backends() == {"triton"}


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["test_vim", "m.bin"], "must end in .pt2 or .onnx"),
        (["test_vimm", "m.pt2"], "did you mean 'test_vim'"),
        (["none.pth", "m.pt2"], "none.pth does not exist"),
        (["test_vim", "m.pt2", "--img-size", "30"], "30"),
        (["test_vim", "m.pt2", "--img-size", "1", "2", "3"], "height and width"),
    ],
)
def test_mistakes_are_one_line_and_write_nothing(tmp_path, capsys, monkeypatch, arguments, words):
    monkeypatch.chdir(tmp_path)
    code, _, err = run(*arguments, capsys=capsys)
    assert code == 2 and err.startswith("error: ") and words in err and err.count("\n") == 1, err
    assert not list(tmp_path.iterdir())


def test_files_that_cannot_be_opened(tmp_path):
    for name, words in (("none.pt2", "no file"), ("m.bin", "must end in"), ("m.pt2", "cannot be read by torch")):
        if "none" not in name:
            (tmp_path / name).write_text("hello")
        with pytest.raises(UserError, match=words):
            open_exported(tmp_path / name)
    needs("onnx")
    (tmp_path / "m.onnx").write_text("hello")
    with pytest.raises(UserError, match="cannot be read by onnxruntime"):
        open_exported(tmp_path / "m.onnx")
