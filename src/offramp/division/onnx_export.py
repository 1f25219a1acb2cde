"""Captured graphs for ONNX Runtime, each compared with the PyTorch graph that it is made from."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from offramp.backends.torch_graphs import CapturedGraph
from offramp.errors import StageError

OPSET, IR = 18, 8
"""Versions that torch writes; ONNX Runtime 1.14 reads them."""
TOLERANCE = 1e-4
"""Largest accepted difference of ONNX Runtime, relative to the largest value of a result."""


def to_onnx(graph: CapturedGraph, given: Sequence[Tensor], dynamic: Sequence[Sequence[int]]) -> bytes:
    """Return a graph as ONNX bytes. Raises StageError where PyTorch cannot write it.

    Args:
        given: example operands.
        dynamic: axes whose sizes may differ from call to call, of the first operands.
    """
    moving = [dict.fromkeys(each, torch.export.Dim.DYNAMIC) or None for each in dynamic]
    shapes = tuple(moving) + (None,) * (len(given) - len(moving))
    try:
        with _quiet():
            program = torch.onnx.export(
                graph, tuple(given), dynamo=True, dynamic_shapes=(shapes,), input_names=list(graph.inputs),
                opset_version=OPSET, verbose=False, external_data=False, optimize=True,
            )  # fmt: skip
        assert program is not None
        proto = program.model_proto
    except Exception as error:  # the exporter raises many classes
        said = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
        what = f"a stage cannot be written as ONNX ({type(error).__name__}: {said[:200]})"
        raise StageError(what, None, "run it on torch") from None
    for node in proto.graph.node:
        node.doc_string = ""
        del node.metadata_props[:]
    for info in (*proto.graph.value_info, *proto.graph.input, *proto.graph.output):
        del info.metadata_props[:]
    del proto.graph.value_info[:]
    proto.ir_version = IR
    return proto.SerializeToString(deterministic=True)


def difference(data: bytes, names: Sequence[str], given: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """Return the largest difference between ONNX Runtime's results and those expected, relative to the largest value.

    Raises StageError where it is larger than TOLERANCE, or the graph does not run.
    """
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.log_severity_level = 3
    try:
        session = ort.InferenceSession(data, options, providers=["CPUExecutionProvider"])
        taken = {each.name for each in session.get_inputs()}
        feeds = {n: t.detach().contiguous().numpy() for n, t in zip(names, given, strict=True) if n in taken}
        results: Any = session.run(None, feeds)
    except Exception as error:  # onnxruntime's exceptions have no common base
        raise StageError(f"a stage does not run as ONNX ({str(error).splitlines()[0][:200]})", None, "") from None
    worst = 0.0
    for found, wanted in zip(results, expected, strict=True):
        wanted = wanted.detach().numpy()
        if found.dtype.kind == "f" and wanted.size:
            scale = max(float(np.abs(wanted[np.isfinite(wanted)]).max(initial=0)), 1e-6)
            worst = max(worst, float(np.abs(found - wanted)[np.isfinite(wanted)].max(initial=0)) / scale)
        elif not np.array_equal(found, wanted):
            worst = float("inf")
    if worst > TOLERANCE:
        raise StageError(f"ONNX Runtime differs by {worst:.1e} of the largest value", None, "run it on torch")
    return worst


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Suppress the exporter's progress on stdout, in warnings and in logs."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
