"""Multiply without torch: ONNX Runtime, one small session a kind, weights as inputs."""

from offramp.edge.backend import OrtBackend

__all__ = ["OrtBackend"]
