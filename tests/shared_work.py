"""Work that tests share because it is slow and no test depends on its being done anew.

ONNX graphs: writing one takes a second, and the same small models are divided again and again. What a graph becomes is
determined by its operations and by the kinds and shapes of its operands.
"""

import contextlib
import hashlib
import importlib
import os
import sys


class AllPages:
    """Stands for `TouchedPages` where engines open in the process of the tests, and leaves all pages in memory.

    To set those of all libraries apart that tests have imported takes longer than most tests. Processes that tests
    start do it (tests/cli/test_process.py), and tests/runtime/test_touched_pages.py.
    """

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def narrow(self):
        """Do nothing."""


def share_onnx_graphs(monkeypatch, folder):
    """Write each ONNX graph once, and keep it in `folder`. Where no collected test has imported PyTorch: nothing."""
    torch = sys.modules.get("torch")
    if torch is None:
        return
    export = importlib.import_module("offramp.division.export")
    write, exporter = export._to_onnx, torch.onnx.export

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

    monkeypatch.setattr(export, "_to_onnx", share)
