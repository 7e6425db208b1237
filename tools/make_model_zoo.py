"""Writes model_zoo.md: facts of the models' configurations, sizes and MACs counted here, agreement as the tests have
it, speed as the benchmarks measured it.

python tools/make_model_zoo.py
python tools/make_model_zoo.py --check      # exit code 2 where model_zoo.md is not what would be written
"""

from __future__ import annotations

import argparse
import ast
import inspect
import json
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from itertools import groupby
from pathlib import Path
from typing import Any

import timm
import torch
from timm.models import get_pretrained_cfg, model_entrypoint
from torch.utils.flop_counter import FlopCounterMode

from vision_mamba.engine.convert import zoo_models
from vision_mamba.errors import UserError, run_main
from vision_mamba.files import replacing

ROOT = Path(__file__).resolve().parents[1]
ZOO = ROOT / "model_zoo.md"
GOLDEN = ROOT / "tests" / "golden"
RESULTS = ROOT / "benchmarks" / "results"

INTRO = """\
# Model zoo

Made by `python tools/make_model_zoo.py`: do not edit it, but the models' configurations (`default_cfgs` in
`vision_mamba/models/`). A test fails when it is stale.

* **parameters** in millions, with the classifier.
* **GMACs** for one image (or clip) of the input size: half of the FLOPs that `torch.utils.flop_counter.FlopCounterMode`
  counts. The scan counts 9 FLOPs for each token, channel, state and path (github state-spaces/mamba, issue 110); norms,
  activations and gates count nothing; products with block-diagonal matrices, which replace several thin ones, count as
  they are run. Published "FLOPs" are usually the products' MACs plus *all* of the scan's FLOPs, or without the scan.
* **image**: side in pixels. "any": any size at every call, and the figures are those of that size. The others take
  another size by `img_size=` and any by `dynamic_img_size=True`.
* **published**: the authors' figures, from the place in brackets. None was measured here. Empty: none is recorded here.
* **weights**: what `timm.create_model(name, pretrained=True)` fetches, by the authors' names. Without a network copy
  the file here: `vision_mamba.load_checkpoint(model, FILE)` loads it, and
  `python tools/convert_checkpoint.py FILE OUT.safetensors` makes a safetensors file with our names of it.
* **agrees**: "yes" where outputs and gradients that the official code gave for this very model are in the tests, "same
  code" where they are of small models of the family, "no case" where there are none.
* **images/s**: inference / training, measured here (last section). Empty: not measured.
"""

MEASURED = """\
## Measured here

The last runs of these programs on each device; of their rows at the model's input size the fastest batch and mode, with
bfloat16 autocast on a GPU (mostly the eager kernels as one CUDA graph: the device's time without Python's), in float32
on a CPU. Inference in `vim-h100.json`, `vim-h200.json`, `vim_small-h100.json`, `vmamba_small-h100.json`,
`vmamba_base-h100.json` and `samba-h100.json` is of the model that `timm.utils.reparameterize_model` gives.
[benchmarks/README.md](benchmarks/README.md) has the peers beside them.
"""


@dataclass(frozen=True)
class Entry:
    """A row of the zoo: one model with one set of weights, or without any."""

    name: str
    tagged: str
    label: str

    @property
    def cfg(self) -> Any:
        return get_pretrained_cfg(self.tagged)

    @property
    def family(self) -> str:
        return model_entrypoint(self.name).__module__.rpartition(".")[2]


def entries() -> Iterator[Entry]:
    """Family by family, in the order of the family's file."""

    def place(name: str) -> tuple[str, int]:
        function = model_entrypoint(name)
        return function.__module__, function.__code__.co_firstlineno

    for name in sorted(zoo_models(), key=place):
        tagged = timm.list_models(name, include_tags=True)
        for full in tagged:
            yield Entry(name, full, full if len(tagged) > 1 else name)


def count(entry: Entry) -> tuple[str, str]:
    """Millions of parameters, and GMACs of one image, or clip."""
    model, macs = _counted(entry.name, entry.cfg.input_size)
    if model.num_classes != entry.cfg.num_classes:
        model.reset_classifier(entry.cfg.num_classes)
    return f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f}", f"{macs / 1e9:.2f}"


@cache
def _counted(name: str, input_size: tuple[int, int, int]) -> tuple[Any, int]:
    channels, *sides = input_size
    with torch.device("meta"):
        model = timm.create_model(name, pretrained_cfg_overlay=dict(input_size=input_size)).eval()
    frames = getattr(model, "num_frames", None)
    shape = (1, channels, *sides) if frames is None else (1, channels, frames, *sides)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(torch.empty(shape, device="meta"))
    return model, counter.get_total_flops() // 2


def recorded(text: str) -> Callable[[Entry], tuple[str, str]]:
    """The counts that a zoo already has, in place of `count`, which builds every model.

    Raises:
        UserError: a model is not in it.
    """
    rows = {
        label: (parameters, macs)
        for label, parameters, macs in re.findall(r"(?m)^\| `(\S+)` \| (\S+) \| (\S+) \|", text)
    }

    def look_up(entry: Entry) -> tuple[str, str]:
        if entry.label not in rows:
            raise UserError(f"{ZOO.name} has no row {entry.label}; run python tools/make_model_zoo.py")
        return rows[entry.label]

    return look_up


@dataclass(frozen=True)
class Agreement:
    """What tests/models/test_<family>.py compares with the official code."""

    family: str
    cases: dict[str, dict[str, Any]]
    further: dict[str, dict[str, Any]]
    tolerance: float | None

    def of(self, parameters: str) -> str:
        """``parameters``: of the model, in millions as the zoo has them."""
        exact = (n for n, case in self.cases.items() if f"{case['num_params'] / 1e6:.2f}" == parameters)
        if found := next(exact, None):
            return f"yes: `{found}`"
        return "same code" if self.cases or self.further else "no case"

    def sentence(self) -> str:
        files = {**self.cases, **self.further}
        if not files:
            return "Agreement: no case of an official implementation is in the tests."
        whole, norms = [f"`{name}`" for name in self.cases], ""
        for name, file in self.further.items():
            if "float64" in file["cases"][0]:
                whole.append(f"{len(file['cases'])} cases of `{name}`")
            else:
                norms = f"logits and norms of gradients in {len(file['cases'])} cases of `{name}`"
        found = f"Agreement with {next(iter(files.values()))['repo']} (`tests/models/test_{self.family}.py`): "
        if whole and self.tolerance is not None:
            found += (
                f"outputs, input gradient and every parameter's gradient, relative error at most {self.tolerance:.0e} "
                f"(float32 on a CPU), in {', '.join(whole)}; "
            )
        return f"{found}{norms}".rstrip("; ") + "."


def agreement(family: str, origin: str) -> Agreement:
    """Golden cases of ``origin`` that a family's test names, and its tolerance in float32 on a CPU."""
    path = ROOT / "tests" / "models" / f"test_{family}.py"
    tree = ast.parse(path.read_text()) if path.exists() else ast.Module([], [])
    cases, further, tolerances = {}, {}, []
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and re.fullmatch(r"[\w.]+", str(node.value)):
            file = GOLDEN / f"{str(node.value).removesuffix('.json')}.json"
            golden = json.loads(file.read_text()) if file.is_file() else {}
            if golden and (not origin or origin.endswith(golden["repo"])):
                (cases if "state_dict" in golden else further)[file.stem] = golden
        elif isinstance(node, ast.Call) and getattr(node.func, "id", "") == "check_case":
            given = {keyword.arg: keyword.value for keyword in node.keywords}
            if not given.keys() & {"dtype", "device"}:
                tolerances.append(ast.literal_eval(given["tolerance"]))
    return Agreement(family, cases, further, max(tolerances, default=None))


def measurements() -> dict[str, dict[str, Any]]:
    """The last results of each program and device: those of other names than WHAT-DEVICE.json are older records.

    Other programs' results (of scenes, of several GPUs) have no rows of inference and training.
    """
    files = {}
    for path in sorted(RESULTS.glob("*.json")):
        if re.fullmatch(r"[a-z0-9_]+-[a-z0-9]+", path.stem):
            results = json.loads(path.read_text())
            if any("what" in row for row in results.get("rows", ())):
                files[path.stem] = results
    return files


def fastest(entry: Entry, what: str, rows: list[dict[str, Any]]) -> dict[str, Any] | None:
    found = (row for row in rows if (row.get("model"), row.get("what")) == (entry.name, what))
    same_size = [row for row in found if row["size"] == entry.cfg.input_size[-1]]
    return max(same_size, key=lambda row: row["images_per_s"], default=None)


def speed(entry: Entry, files: dict[str, dict[str, Any]]) -> str:
    rows: dict[str, list[dict[str, Any]]] = {}
    for stem, results in files.items():
        rows.setdefault(stem.rpartition("-")[2].upper(), []).extend(results["rows"])
    cells = []
    for device in rows:
        found = [fastest(entry, what, rows[device]) for what in ("inference", "training")]
        if any(found):
            rates = [row["images_per_s"] if row else None for row in found]
            numbers = " / ".join("–" if r is None else f"{r:,.0f}" if r >= 100 else f"{r:.1f}" for r in rates)
            cells.append(f"{device} {numbers}")
    return "; ".join(cells)


def weights(cfg: Any) -> str:
    if cfg.hf_hub_id:
        return f"hub [{cfg.hf_hub_id}](https://huggingface.co/{cfg.hf_hub_id}), `{cfg.hf_hub_filename}`"
    if cfg.url:
        return f"[{cfg.url.rpartition('/')[2]}]({cfg.url})"
    return "none"


def image(entry: Entry) -> str:
    frames = re.search(r"_f(\d+)$", entry.name)
    height, width = entry.cfg.input_size[1:]
    side = str(width) if height == width else f"{height} x {width}"
    size = side if entry.cfg.fixed_input_size else f"any ({side})"
    return f"{frames[1]} x {size}" if frames else size


def heading(rows: list[Entry]) -> Iterator[str]:
    """Title, paper, code, licences and notes of a family."""
    family = rows[0].family
    module = sys.modules[model_entrypoint(rows[0].name).__module__]
    yield f"## {(inspect.getdoc(module) or family).splitlines()[0].rstrip('.')}\n"
    cfgs = [row.cfg for row in rows]

    def different(values: Iterable[Any]) -> list[Any]:
        return list(dict.fromkeys(value for value in values if value))

    if cfgs[0].paper_ids:
        number = str(cfgs[0].paper_ids).removeprefix("arXiv:")
        yield f"{cfgs[0].paper_name or 'Paper'}: [arXiv:{number}](https://arxiv.org/abs/{number})."
    if cfgs[0].origin_url:
        yield f"Official code: {cfgs[0].origin_url}."
    if licences := different(cfg.license for cfg in cfgs if cfg.has_weights):
        yield f"Licence of the weights: {', '.join(licences)}."
    yield from different(note for cfg in cfgs for note in cfg.notes or ())


def zoo(numbers: Callable[[Entry], tuple[str, str]]) -> str:
    """The text of model_zoo.md; ``numbers`` is `count`, or `recorded` of an older text."""
    files = measurements()
    parts = [INTRO]
    for family, group in groupby(entries(), key=lambda entry: entry.family):
        rows = list(group)
        tests = agreement(family, rows[0].cfg.origin_url or "")
        lines = [*heading(rows), tests.sentence(), ""]
        lines += ["| model | parameters | GMACs | image | published | weights | agrees | images/s |", "|---" * 8 + "|"]
        for entry in rows:
            parameters, macs = numbers(entry)
            cells = [
                f"`{entry.label}`",
                parameters,
                macs,
                image(entry),
                entry.cfg.description or "",
                weights(entry.cfg),
            ]
            lines.append(f"| {' | '.join([*cells, tests.of(parameters), speed(entry, files)])} |")
        parts.append("\n".join(lines) + "\n")
    parts.append(MEASURED)
    table = ["| results | device | torch, timm | date | command |", "|---" * 5 + "|"]
    for stem, results in files.items():
        table.append(
            f"| `{stem}.json` | {results['device']} | {results['torch']}, {results['timm']} | {results['date']} | "
            f"`{results['command']}` |"
        )
    return "\n".join([*parts[:-1], parts[-1] + "\n" + "\n".join(table)]) + "\n"


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="only say whether model_zoo.md is up to date")
    args = parser.parse_args(argv)
    text = zoo(count)
    old = ZOO.read_text() if ZOO.exists() else ""
    if text == old:
        print(f"{ZOO.name} is up to date")
        return
    if args.check:
        new = next(line for line in [*text.splitlines(), "(its end)"] if line not in old.splitlines())
        raise UserError(f"{ZOO.name} is stale; run python tools/make_model_zoo.py. It lacks: {new}")
    with replacing(ZOO) as temporary:
        temporary.write_text(text)
    print(f"wrote {ZOO.name}: {sum(1 for _ in entries())} rows")


if __name__ == "__main__":
    run_main(main)
