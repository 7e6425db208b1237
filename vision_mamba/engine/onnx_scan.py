"""The recurrences of ``lowering`` as ONNX functions. Imports onnx and onnxscript: load it where an export begins."""

from typing import Any

import torch
from onnx_ir.passes.common import CommonSubexpressionEliminationPass
from onnxscript import FLOAT, graph, script, values
from onnxscript import opset18 as op

from vision_mamba.engine.lowering import decompositions

_DOMAIN = values.Opset("vision_mamba", 1)


# onnxscript reads these functions' source; torch's exporter reads from the annotations how many results there are.
@script(_DOMAIN, default_opset=op)
def recurrence(state: FLOAT, steps: FLOAT, x: FLOAT, B: FLOAT, C: FLOAT, A: FLOAT) -> tuple[FLOAT, FLOAT]:
    @graph()
    def step(h, dt, x_t, b, c):
        new = op.Add(op.Mul(op.Exp(op.Mul(dt, A)), h), op.Mul(b, x_t))
        return new, op.MatMul(c, new)

    last, y = op.Scan(state, steps, x, B, C, body=step, num_scan_inputs=4)
    return last, y


@script(_DOMAIN, default_opset=op)
def scalar_recurrence(state: FLOAT, decay: FLOAT, x: FLOAT) -> FLOAT:
    @graph()
    def step(h, a, x_t):
        new = op.Add(op.Mul(a, h), x_t)
        return new, op.Identity(new)

    last, states = op.Scan(state, decay, x, body=step, num_scan_inputs=2)
    return states


def _stable_sort(x, *, stable=True, dim=-1, descending=False):
    # TopK gives equal values in the order of their indices, says its definition; torch's exporter has no stable sort.
    size = op.Gather(op.Shape(x), op.Constant(value_ints=[dim]))
    return op.TopK(x, size, axis=dim, largest=int(descending), sorted=1)


def to_onnx(program: torch.export.ExportedProgram, *, input_name: str, output_name: str) -> Any:
    """Translates an exported program of one input and one output to torch's ``ONNXProgram``."""
    translated = torch.onnx.export(
        program.run_decompositions(decompositions()),
        dynamo=True,
        custom_translation_table={
            torch.ops.vision_mamba.recurrence.default: recurrence,
            torch.ops.vision_mamba.scalar_recurrence.default: scalar_recurrence,
            torch.ops.aten.sort.stable: _stable_sort,
        },
        input_names=[input_name],
        output_names=[output_name],
        opset_version=18,
        verbose=False,
        optimize=False,
    )
    # Every block computes the same tables. Merged first: torch's optimiser takes minutes for a deep model otherwise.
    CommonSubexpressionEliminationPass()(translated.model)
    translated.optimize()
    return translated
