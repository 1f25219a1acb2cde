"""Build stores: cut a model into shards, write its kernels, prove that the answers are the same."""

from offramp.division.build import divide

__all__ = ["divide"]
