"""Cut, write graphs, verify: the building of stores. The one room that speaks ONNX; what runs a store never does."""

from offramp.export.build import add_graphs, divide

__all__ = ["add_graphs", "divide"]
