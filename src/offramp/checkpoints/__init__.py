"""Checkpoint folders: reading their tensors, the encoder families with known tensor names, models with exits."""
