"""How nearly answers agree on the processor of the tests: bit for bit where it can be asked for."""

from offramp.measure.hardware import instructions

HAS_AVX512 = "avx512f" in instructions()
PERMUTED_TOLERANCE = {"ort": 0, "torch": 1e-6, "numpy": 0 if HAS_AVX512 else 1e-6}
"""Backend -> largest difference between the answers of a row at two places of a batch. The products of PyTorch round by
the place of a row on some processors (Intel), those of OpenBLAS, which NumPy calls, on processors without AVX-512."""
