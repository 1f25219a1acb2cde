"""Vary a setting and compare: benchmarks and the demo. Every measured run is a process of its own."""
