"""Multiply without torch: ONNX Runtime, one small session a kind, weights as inputs."""

from offramp.edge.backend import OrtBackend
from offramp.edge.segments import OrtSegments

__all__ = ["OrtBackend", "OrtSegments"]
