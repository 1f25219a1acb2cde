"""What is asked of a model: texts as token ids (`text`), files of texts (`inputs`), labelled tables
(`tables`, `glue`), labelled images (`images`) and their pixels (`pixels`), metrics, the demo's data (`bbc`).

Only `text` is re-exported: it also runs where Python is 3.8, the others are imported by name where they are used.
"""

from offramp.tasks.text import Batch, TextEncoder, has_tokenizer

__all__ = ["Batch", "TextEncoder", "has_tokenizer"]
