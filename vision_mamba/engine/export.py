"""A model in one file for other programs: ``.pt2`` (torch.export) or ``.onnx`` (onnxruntime and others).

A ``.pt2`` file calls this package's operators, so whoever loads it needs the package, imported first::

    import torch, vision_mamba
    model = torch.export.load("model.pt2").module()

An ``.onnx`` file holds ONNX's own operators alone. :func:`open_exported` opens both. What the model's images must look
like is in the file as one JSON text: in ``.pt2`` the extra file ``vision_mamba.json``, in ``.onnx`` the metadata entry
``vision_mamba``.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
from timm.data import ImageNetInfo, resolve_model_data_config
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from vision_mamba import ops  # noqa: F401  # defines the operators that .pt2 files call
from vision_mamba.engine.build import create_any_size
from vision_mamba.engine.checkpoint import versions
from vision_mamba.engine.evaluate import TrainedModel
from vision_mamba.errors import UserError, nearest
from vision_mamba.files import replacing
from vision_mamba.ops.backend import resolve_backend

SUFFIXES = (".pt2", ".onnx")
INPUT, OUTPUT = "images", "output"
TOLERANCE = 1e-4
_KEY = "vision_mamba"
_MISSING = "{0} files need {1}: pip install 'vision-mamba-zoo[export]'"


@dataclass(frozen=True)
class Check:
    """A run of a written file beside the model: shape of the images, largest and relative (RMS) difference."""

    shape: tuple[int, ...]
    largest: float
    relative: float


@dataclass(frozen=True)
class ExportReport:
    """What was written: the file, its size in bytes, operators in its graph, seconds taken, and the checks made."""

    path: Path
    size: int
    nodes: int
    seconds: float
    checks: list[Check]


@dataclass(frozen=True)
class ExportedModel:
    """An opened file.

    Attributes:
        run: images (batch, C, H, W), float32, normalised -> what the model gives, on the images' device.
        about: what :func:`describe` said of the model when the file was written; empty for files of other programs.
    """

    run: Callable[[Tensor], Tensor]
    about: dict[str, Any]


def new_model(name: str, *, img_size: Sequence[int] | None = None, pretrained: bool = False) -> TrainedModel:
    """A model by its name alone, with random or published weights, as :func:`load_trained` opens one from a file.

    Raises:
        UserError: an unknown name, a size that the model does not take, or weights that cannot be had.
    """
    if not timm.is_model(name):
        raise UserError(
            f"{name!r} is neither a file nor a model{nearest(name, timm.list_models())}; timm.list_models() lists all"
        )
    args: dict[str, Any] = {}
    if img_size is not None:
        if len(img_size) not in (1, 2) or min(img_size) < 1:
            raise UserError(f"image size {list(img_size)} must be one positive number or height and width")
        args["img_size"] = img_size[0] if img_size[0] == img_size[-1] else tuple(img_size)
    try:
        model = create_any_size(name, args, pretrained=pretrained).eval()
    except Exception as error:  # whatever a constructor or a download raises is about these arguments
        raise UserError(f"cannot make {name} with {args}, pretrained={pretrained}: {_first_line(error)}") from None
    config = resolve_model_data_config(model)
    if img_size is not None:
        config["input_size"] = (config["input_size"][0], img_size[0], img_size[-1])
    classes = [str(i) for i in range(int(model.num_classes))]  # type: ignore[arg-type]
    if pretrained and len(classes) == 1000:
        info = ImageNetInfo()
        classes = [info.label_name_to_description(label) for label in info.label_names()]
    return TrainedModel(
        model=model, classes=classes, labels=None, data_config=config, profile=None, source=None,
        description=f"{name}, {'published' if pretrained else 'random'} weights", name=name, args=args,
    )  # fmt: skip


def example_size(trained: TrainedModel) -> tuple[int, ...]:
    """(C, H, W) of what the model takes, or (C, frames, H, W)."""
    channels, *size = trained.data_config["input_size"]
    frames = [] if trained.num_frames is None else [trained.num_frames]
    return (channels, *frames, *size)


def describe(trained: TrainedModel) -> dict[str, Any]:
    """What whoever runs the model needs to know: preprocessing, class names, where it comes from."""
    config = trained.data_config
    names = ("input_size", "mean", "std", "interpolation", "crop_pct", "raster")
    return {
        "model": trained.description,
        "classes": list(trained.classes),
        **{name: config[name] for name in names if config.get(name) is not None},
    }


def export_model(
    model: nn.Module,
    path: str | os.PathLike,
    *,
    input_size: Sequence[int],
    dynamic_batch: bool = True,
    dynamic_size: bool = False,
    about: Mapping[str, Any] | None = None,
) -> ExportReport:
    """Writes a model for inference in float32, and runs the file beside the model before it gets its name.

    Args:
        model: on the CPU, in evaluation mode; images (batch, C, H, W), or clips with an axis more, -> one tensor.
        path: ends in ``.pt2`` or ``.onnx``; ONNX models of more than 2 GB cannot be in one file.
        input_size: (C, H, W) of an image.
        dynamic_batch: the file takes any number of images at once; otherwise one.
        dynamic_size: it takes images of other heights and widths too.
        about: kept in the file; anything that JSON can hold.

    Raises:
        UserError: another ending, a missing package, or a model that cannot be exported like this.
        ValueError: the model is in training mode or not on the CPU.
    """
    path, begun = Path(path), time.monotonic()
    check_suffix(path)
    if model.training or any(p.device.type != "cpu" for p in model.parameters()):
        raise ValueError("export a model on the CPU and in evaluation mode: model.cpu().eval()")
    if resolve_backend(None, torch.device("cpu")) == "reference":
        raise UserError("VISION_MAMBA_BACKEND=reference would write every step of a scan into the file; unset it")
    batch = 2 if dynamic_batch else 1
    sizes = [tuple(input_size)]
    if dynamic_size:
        height, width = input_size[-2:]
        # The example is of another shape than the model's own, whose branches would otherwise be taken for all sizes.
        sizes = [
            (*input_size[:-2], *other) for other in ((height + 32, width + 64), (height, width), (height, 2 * width))
        ]
    program = _trace(model, torch.zeros(batch, *sizes[0]), dynamic_batch, dynamic_size)
    text = json.dumps({**(about or {}), "dynamic_batch": dynamic_batch, "dynamic_size": dynamic_size, **versions()})
    shapes = [(n, *size) for size in sizes for n in ((1, 3) if dynamic_batch else (1,))]
    with replacing(path) as temporary:
        if path.suffix == ".pt2":
            torch.export.save(program, temporary, extra_files={f"{_KEY}.json": text})
            nodes = sum(node.op == "call_function" for node in program.graph.nodes)
        else:
            nodes = _write_onnx(program, temporary, text)
        exported = open_exported(temporary)
        try:
            checks = _compare(model, exported, shapes)
        except UserError as error:  # the program is of some of the shapes only
            raise _cannot(model, dynamic_batch, dynamic_size, error) from None
        worst = max(checks, key=lambda check: check.relative)
        if not worst.relative <= TOLERANCE:
            raise UserError(
                f"{path} was not written: on images {worst.shape} the file differs from the model by "
                f"{worst.largest:.1e} ({worst.relative:.1e} of its output); please report it with the model's name"
            )
        size = temporary.stat().st_size
    return ExportReport(path, size, nodes, time.monotonic() - begun, checks)


def check_suffix(path: Path) -> None:
    """
    Raises:
        UserError: neither kind of file, or what writes it is not installed.
    """
    if path.suffix not in SUFFIXES:
        raise UserError(f"{path}: the name of an exported model must end in {' or '.join(SUFFIXES)}")
    if path.suffix == ".onnx":
        try:
            import onnxruntime  # noqa: F401
            import onnxscript  # noqa: F401
        except ImportError as error:
            raise UserError(_MISSING.format(".onnx", error.name)) from None


def _trace(model: nn.Module, x: Tensor, dynamic_batch: bool, dynamic_size: bool) -> ExportedProgram:
    axes: dict[int, Any] = {}
    if dynamic_batch:
        axes[0] = Dim("batch", min=1)
    if dynamic_size:
        axes |= {x.ndim - 2: Dim.DYNAMIC, x.ndim - 1: Dim.DYNAMIC}
    # Without gradients: in a program traced with them every scan would save its border states.
    with torch.no_grad():
        try:
            out = model(x)
            program = torch.export.export(model, (x,), dynamic_shapes=(axes,))
        except Exception as error:  # whatever the model and torch's tracer meet is about these axes
            raise _cannot(model, dynamic_batch, dynamic_size, error) from None
    if not isinstance(out, Tensor):
        raise UserError(f"the model gives a {type(out).__name__}; export one that gives a tensor")
    # torch.export writes a node without outputs (an unbind of nothing) and cannot read it.
    program.graph.eliminate_dead_code()
    program.graph_module.recompile()
    # The model's own parameters want gradients, and a loaded program's would too: its scans cannot give any.
    for name, tensor in program.state_dict.items():
        if isinstance(tensor, nn.Parameter):
            program.state_dict[name] = nn.Parameter(tensor.detach(), requires_grad=False)
    return program


def _cannot(model: nn.Module, dynamic_batch: bool, dynamic_size: bool, error: Exception) -> UserError:
    wanted = [name for name, asked in (("batch", dynamic_batch), ("size", dynamic_size)) if asked]
    remedy = f" with a dynamic {' and '.join(wanted)}; leave that out (a file a shape)" if wanted else ""
    return UserError(f"{type(model).__name__} cannot be exported{remedy} ({_first_line(error)})")


def _write_onnx(program: ExportedProgram, path: Path, text: str) -> int:
    from vision_mamba.engine.onnx_scan import to_onnx

    with torch.no_grad():
        translated = to_onnx(program, input_name=INPUT, output_name=OUTPUT)
    translated.model.metadata_props[_KEY] = text
    translated.save(path, external_data=False)
    return sum(1 for _ in translated.model.graph.all_nodes())


def _compare(model: nn.Module, exported: ExportedModel, shapes: Sequence[tuple[int, ...]]) -> list[Check]:
    checks = []
    for shape in shapes:
        x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            expected, found = model(x).double(), exported.run(x).double()
        difference = found - expected
        relative = difference.norm() / expected.norm().clamp_min(1e-30)
        checks.append(Check(shape, float(difference.abs().max()), float(relative)))
    return checks


def open_exported(path: str | os.PathLike, *, device: torch.device | str = "cpu") -> ExportedModel:
    """Opens a ``.pt2`` or an ``.onnx`` file of one input and one output, ours or another program's.

    A ``.pt2`` file of ours runs on any device, whichever it was written on.

    Raises:
        UserError: no such file, another ending, onnxruntime is missing, or the file cannot be read. ``run`` raises it
            for images of a shape that the file does not take.
    """
    path, device = Path(path), torch.device(device)
    if not path.is_file():
        raise UserError(f"no file {path}")
    if path.suffix == ".pt2":
        return _open_pt2(path, device)
    if path.suffix == ".onnx":
        return _open_onnx(path, device)
    raise UserError(f"{path} is no exported model: its name must end in .pt2 or .onnx")


def _open_pt2(path: Path, device: torch.device) -> ExportedModel:
    extra = {f"{_KEY}.json": ""}
    try:
        program = torch.export.load(path, extra_files=extra)
    except Exception as error:  # zip, JSON, schema versions, unknown operators: torch.export has no class for these
        raise UserError(
            f"{path} cannot be read by torch {torch.__version__}: it may be damaged, or of a newer torch or "
            f"vision_mamba ({_first_line(error)})"
        ) from None
    choose_backend(program, resolve_backend(None, device))
    if device.type != "cpu":
        from torch.export.passes import move_to_device_pass

        program = move_to_device_pass(program, device)
    module = program.module()

    def run(x: Tensor) -> Tensor:
        try:
            with torch.no_grad():
                return module(x)
        except AssertionError as error:  # the guards of torch.export
            raise _wrong_shape(path, x, error) from None

    text = extra[f"{_KEY}.json"]
    return ExportedModel(run, json.loads(text) if text else {})


def choose_backend(program: ExportedProgram, name: str) -> None:
    """Makes our operators in ``program`` run on a backend; they were written with that of the exporting device."""
    for module in program.graph_module.modules():
        if isinstance(module, torch.fx.GraphModule):
            for node in module.graph.nodes:
                schema = getattr(node.target, "_schema", None)
                if schema is not None and schema.name.startswith("vision_mamba::"):
                    place = [argument.name for argument in schema.arguments].index("backend")
                    node.update_arg(place, name)
            module.recompile()


def _open_onnx(path: Path, device: torch.device) -> ExportedModel:
    try:
        import onnxruntime
    except ImportError:
        raise UserError(_MISSING.format(".onnx", "onnxruntime")) from None
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    cpu = ["CPUExecutionProvider"]
    providers = cpu if device.type == "cpu" else onnxruntime.get_available_providers()
    try:
        session = onnxruntime.InferenceSession(str(path), options, providers=providers)
    except Exception as error:  # onnxruntime's classes are not public
        raise UserError(
            f"{path} cannot be read by onnxruntime {onnxruntime.__version__}: {_first_line(error)}"
        ) from None
    name, expected, kind = (getattr(session.get_inputs()[0], key) for key in ("name", "shape", "type"))
    numbers = {f"tensor({text})": dtype for text, dtype in (("float", "f4"), ("float16", "f2"), ("double", "f8"))}
    if kind not in numbers:
        raise UserError(f"{path} takes {kind} where normalised images are floating-point numbers")

    def run(x: Tensor) -> Tensor:
        given = tuple(x.shape)
        if len(given) != len(expected) or any(
            isinstance(e, int) and e != g for e, g in zip(expected, given, strict=True)
        ):
            raise _wrong_shape(path, x, f"expected {tuple(expected)}")
        images = x.detach().cpu().numpy().astype(numbers[kind], copy=False)
        try:
            found = session.run(None, {name: images})[0]
        except Exception as error:  # of sizes that are free in the file and do not fit its operators
            raise _wrong_shape(path, x, error) from None
        return torch.from_numpy(found).to(x.device)

    text = session.get_modelmeta().custom_metadata_map.get(_KEY)
    return ExportedModel(run, json.loads(text) if text else {})


def _wrong_shape(path: Path, x: Tensor, reason: object) -> UserError:
    return UserError(
        f"{path} does not take images of shape {tuple(x.shape)}; give it batches and sizes as it was exported with, or "
        f"export it again ({_first_line(reason)})"
    )


def _first_line(error: object) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
