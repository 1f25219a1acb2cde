"""The zoo's transformers that see or hear."""

from specimen import Inputs, Row

TABLES: tuple[tuple[str, Inputs, list[Row]], ...] = ()
LEFT_OUT: dict[str, str] = {}
