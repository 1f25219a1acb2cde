"""The tokenizer of a model folder as transformers reads it, made once and kept in the store.

The files of a folder do not tell how they are applied: classes of transformers have defaults of their own, and override
what is in the files. So `AutoTokenizer` is asked, where transformers is installed. That takes some hundred megabytes,
so a process that has not imported it already starts another one (`auto_tokenizer.py`).
"""

import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from offramp.checkpoints.source import TOKENIZER
from offramp.errors import SourceError, said
from offramp.program.program import Texts
from offramp.store import StoreWriter
from offramp.store import manifest as m
from offramp.tasks.text import TextEncoder
from offramp.tasks.tokenizer_settings import FAST_TOKENIZER, SETTINGS, TokenizerSettings

FAILURE = "failure.json"
"""File that the other process writes instead of a tokenizer."""
_SECONDS = 600
"""Time after which the other process is taken to hang."""
_OFFLINE = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
Say = Callable[[str], None]


def store_tokenizer(folder: Path, writer: StoreWriter, say: Say) -> list[m.File]:
    """Write the tokenizer that transformers makes from a model folder into a store, with the proof that it is applied
    in the same way. Returns its files; none for a folder without a tokenizer.

    Without transformers the store keeps no proof, and its tokenizer is made from the copied files. Raises SourceError
    for a tokenizer that offramp applies in another way.
    """
    if not any((folder / name).is_file() for name in TOKENIZER):
        return []
    with _made(folder) as (made, reason):
        if reason:
            say(f"the tokenizer is not proven equal to that of transformers, and is made from its files: {reason}")
            return [writer.add_file(SETTINGS, TokenizerSettings().to_json())]
        return [writer.add_copy(name, made / name) for name in (SETTINGS, FAST_TOKENIZER) if (made / name).is_file()]


def open_text_encoder(folder: Path, texts: Texts, max_length: int | None, warn: Say) -> TextEncoder:
    """Return the encoder of texts of a store or of a model folder, whose tokenizer is that of `AutoTokenizer`.

    Raises SourceError, and the errors of `TextEncoder.from_folder`.
    """
    if (folder / SETTINGS).is_file():
        return TextEncoder.from_folder(folder, texts, max_length, warn)
    with _made(folder) as (made, reason):
        return TextEncoder.from_folder(folder if reason else made, texts, max_length, warn)


@contextmanager
def _made(folder: Path) -> Iterator[tuple[Path, str]]:
    """Yield a temporary folder with the tokenizer of `AutoTokenizer`, and the reason why it has none, else ""."""
    with tempfile.TemporaryDirectory() as temporary:
        out = Path(temporary)
        if importlib.util.find_spec("transformers") is None:
            yield out, "transformers is not installed"
        elif sys.modules.get("transformers"):
            yield out, _made_here(folder, out)
        else:
            yield out, _made_by_another_process(folder, out)


def _made_here(folder: Path, out: Path) -> str:
    from offramp.checkpoints.auto_tokenizer import write_tokenizer

    try:
        write_tokenizer(folder, out)
    except SourceError:
        raise
    except Exception as error:  # transformers raises many classes for files that it cannot read
        return said(error)
    return ""


def _made_by_another_process(folder: Path, out: Path) -> str:
    words = map(str, (folder, out, out / FAILURE, os.getpid()))
    command = [sys.executable, "-m", "offramp.checkpoints.auto_tokenizer", *words]
    pipes = {"stdin": subprocess.DEVNULL, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    try:
        done = subprocess.run(command, env={**os.environ, **_OFFLINE}, timeout=_SECONDS, check=False, **pipes)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"the process that reads it did not end well ({error})"
    if done.returncode:
        return f"the process that reads it ended with {done.returncode}"
    if not (out / FAILURE).is_file():
        return ""
    failure = json.loads((out / FAILURE).read_text())
    if failure["refusal"]:
        what, remedy = failure["refusal"]
        raise SourceError(what, folder, remedy)
    return failure["reason"]
