"""Measurement of device profiles: the latency of each stage on this machine."""
