"""The tokenizer of a model folder as transformers reads it, made once and kept in the store.

The files of a folder do not tell how they are applied: classes of transformers have defaults of their own, and override
what is in the files. So `AutoTokenizer` is asked, where transformers is installed (`auto_tokenizer.py`). A process that
has not imported transformers starts another one for it (2.2 s of a core and 101 MiB for BERT's tokenizer, measured by
`git show 381530a:bench/tokenizing.py`):

    python -m offramp.checkpoints.tokenizing FOLDER OUT PARENT
"""

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from offramp.checkpoints.source import TOKENIZER
from offramp.errors import OfframpError, SourceError, said
from offramp.measure.processes import die_with_parent, is_orphan
from offramp.program.program import Texts
from offramp.store import StoreWriter
from offramp.store import manifest as m
from offramp.store.scratch import scratch_folder
from offramp.tasks.model_files import files_of
from offramp.tasks.text import ANY, TextEncoder
from offramp.tasks.tokenizer import has_tokenizer
from offramp.tasks.tokenizer_settings import FAST_TOKENIZER, SETTINGS, TokenizerSettings

OUTCOME = "outcome.json"
"""File that the other process writes beside the tokenizer: a refusal or the reason why there is none."""
_SECONDS = 600
"""Time after which the other process is taken to hang."""
_OFFLINE = {"HF_HUB_OFFLINE": "1"}
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
            _report_unreadable(folder, say)
            return [writer.add_file(SETTINGS, TokenizerSettings().to_json())]
        return [writer.add_copy(name, made / name) for name in (SETTINGS, FAST_TOKENIZER) if (made / name).is_file()]


def _report_unreadable(folder: Path, say: Say) -> None:
    """Report files that no tokenizer can be made from."""
    try:
        TextEncoder.from_folder(folder, ANY)
    except SourceError as error:
        say(f"the store will take no texts: {error.what}")
    except OfframpError:  # a library is missing, which another machine may have
        pass


def open_text_encoder(folder: Path, texts: Texts, max_length: int | None, warn: Say) -> TextEncoder:
    """Return the encoder of texts of a store or of a model folder, whose tokenizer is that of `AutoTokenizer`.

    Raises SourceError, and the errors of `TextEncoder.from_folder`.
    """
    files = files_of(folder)
    if files.has(SETTINGS) or (files.is_of_store and not has_tokenizer(files)):
        return TextEncoder.from_folder(files, texts, max_length, warn)
    with _made(folder) as (made, reason):
        return TextEncoder.from_folder(files if reason else made, texts, max_length, warn)


def num_token_types(folder: Path) -> int:
    """Return how many token types the tokenizer of a folder gives for a pair of texts; 0: none, or no tokenizer that
    transformers can apply. For models of transformers, which is imported.
    """
    if not any((folder / name).is_file() for name in TOKENIZER):
        return 0
    from offramp.checkpoints.auto_tokenizer import types_of_pair

    return types_of_pair(folder)


@contextmanager
def _made(folder: Path) -> Iterator[tuple[Path, str]]:
    """Yield a temporary folder with the tokenizer of `AutoTokenizer`, and the reason why it has none, else ""."""
    with scratch_folder("offramp-tokenizer-") as out:
        if importlib.util.find_spec("transformers") is None:
            yield out, "transformers is not installed"
        elif sys.modules.get("transformers"):
            yield out, _make(folder, out)
        else:
            yield out, _make_in_another_process(folder, out)


def _make(folder: Path, out: Path) -> str:
    """Write the tokenizer into a folder. Returns the reason why it cannot be written, else "". Raises SourceError."""
    try:
        from offramp.checkpoints.auto_tokenizer import write_tokenizer

        write_tokenizer(folder, out)
    except SourceError:
        raise
    except Exception as error:  # transformers raises many classes for files that it cannot read
        return said(error)
    return ""


def _make_in_another_process(folder: Path, out: Path) -> str:
    command = [sys.executable, "-m", "offramp.checkpoints.tokenizing", str(folder), str(out), str(os.getpid())]
    pipes: dict[str, Any] = {"stdin": subprocess.DEVNULL, "stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE}
    try:
        done = subprocess.run(command, env={**os.environ, **_OFFLINE}, timeout=_SECONDS, check=False, **pipes)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"the process that reads it did not end well ({error})"
    if done.returncode:
        last = done.stderr.decode(errors="replace").strip().rpartition("\n")[2]
        return f"the process that reads it ended with {done.returncode}{last and ': '}{last}"
    outcome = json.loads((out / OUTCOME).read_text())
    if outcome["refusal"]:
        what, remedy = outcome["refusal"]
        raise SourceError(what, folder, remedy)
    return outcome["reason"]


def main(folder: str, out: str, parent: str) -> int:
    """Write the tokenizer of a folder, and the outcome, into the folder `out`. The process ends with its parent."""
    die_with_parent()
    if is_orphan(int(parent)):
        return 1
    sys.modules["torch"] = None  # type: ignore[assignment]  # transformers would import it: 250 MiB instead of 70
    refusal, reason = None, ""
    try:
        reason = _make(Path(folder), Path(out))
    except SourceError as error:
        refusal = (error.what, error.remedy)
    Path(out, OUTCOME).write_text(json.dumps({"refusal": refusal, "reason": reason}))
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
