"""Slow work that the process of the tests does once, or leaves out, where no test is about it.

Writing an ONNX graph takes a second, and tests divide the same small models again and again. The result depends only on
the operations of the graph, and on the types, shapes and strides of its operands.
"""

import contextlib
import hashlib
import importlib
import os
import sys


class AllPages:
    """Replaces `TouchedPages` in the process of the tests: all pages of libraries stay in memory.

    Tests have imported many libraries, and to isolate the pages of all takes longer than most tests. The real class
    runs in the processes that tests start (tests/cli/test_process.py), and in tests/runtime/test_touched_pages.py.
    """

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def narrow(self):
        """Do nothing."""


def share_onnx_graphs(monkeypatch, folder):
    """Write each ONNX graph once, and keep it in `folder`. Does nothing if no collected test has imported PyTorch."""
    torch = sys.modules.get("torch")
    if torch is None:
        return
    export = importlib.import_module("offramp.division.export")
    write, exporter = export.to_onnx, torch.onnx.export

    def share(graph, given, dynamic):
        if torch.onnx.export is not exporter:  # a test has replaced it
            return write(graph, given, dynamic)
        nodes = [(node.name, node.target, node.args, node.kwargs) for node in graph.nodes]
        operands = [(each.dtype, each.shape, each.stride()) for each in given]
        key = repr((nodes, graph.inputs, graph.outputs, operands, dynamic))
        path = folder / hashlib.sha256(key.encode()).hexdigest()
        with contextlib.suppress(FileNotFoundError):
            return path.read_bytes()
        data = write(graph, given, dynamic)
        part = folder / f"{path.name}-{os.getpid()}"
        part.write_bytes(data)
        part.rename(path)
        return data

    monkeypatch.setattr(export, "to_onnx", share)
