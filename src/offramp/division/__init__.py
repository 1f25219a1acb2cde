"""Build stores: cut a model into shards, write its kernels, prove that the answers are the same."""

from offramp.division.build import add_graphs, divide

__all__ = ["add_graphs", "divide"]
