"""Resolves the name of a model to a folder: an existing folder, or a download from the Hugging Face hub.

Only what a division reads is downloaded, and pickles only where there is no safetensors. All files of a model are of
one commit, which `checkpoints.downloads` records. huggingface_hub is imported where it is used, and keeps its own
cache, tokens and environment variables (`HF_HOME`, `HF_HUB_OFFLINE`).
"""

import os
from pathlib import Path

from offramp.checkpoints import source
from offramp.checkpoints.downloads import commit_of
from offramp.errors import OfframpError, SourceError, UsageError, disk_full, import_error, require_folder

_COMMON = [source.CONFIG, source.ADAPTER, "adapter_model.safetensors", *source.COMPANIONS, *source.EXITS]
_SAFETENSORS = [source.SAFETENSORS, source.SAFETENSORS + source.INDEX]
_PICKLES = [source.PICKLE, source.PICKLE + source.INDEX, "adapter_model.bin"]


def resolve(model: str, offline: bool = False) -> Path:
    """Return the folder of `model`, which is a folder or an id on the hub. `offline`: use only the cache of the hub.

    `ID@REVISION` names a commit, a branch or a tag; an id alone is the newest commit of the main branch.

    Raises UsageError (no such folder, not found), SourceError (gated, download failed), DiskFullError, and
    MissingExtraError without huggingface_hub.
    """
    name, _, revision = model.partition("@")
    is_path = name.startswith((".", "/", "~")) or name.endswith("/") or "\\" in name or name.count("/") > 1
    if is_path or not name or os.path.lexists(model):
        require_folder(model, "folder", f"{source.WANTED}, or the id of a model on the hub")
        return Path(model)
    folder = _snapshot(name, revision, offline, [*_COMMON, *_SAFETENSORS, "model-*.safetensors"])
    if not any((folder / each).exists() for each in _SAFETENSORS):  # of the same commit: the branch may have moved on
        revision = commit_of(folder) or revision
        folder = _snapshot(name, revision, offline, [*_COMMON, *_PICKLES, "pytorch_model-*.bin"])
    return folder


def _snapshot(model: str, revision: str, offline: bool, patterns: list[str]) -> Path:
    try:
        from huggingface_hub import constants, snapshot_download
    except ImportError as error:
        raise import_error(error, "huggingface_hub", "divide") from None
    offline = offline or constants.HF_HUB_OFFLINE
    try:
        folder = snapshot_download(  # the commit is recorded
            model, revision=revision or None, allow_patterns=patterns, local_files_only=offline
        )
    except Exception as error:  # the hub's transport raises errors of whichever HTTP library it was built on
        raise _explained(error, model, offline) from error
    return Path(folder)


def _explained(error: Exception, model: str, offline: bool) -> OfframpError:
    from huggingface_hub import errors

    full = disk_full(error, model)
    if full is not None:
        return full
    if isinstance(error, errors.GatedRepoError):
        return SourceError("model is gated", model, "accept its terms on the hub and log in with `hf auth login`")
    if isinstance(error, errors.RevisionNotFoundError):
        return UsageError("the model on the hub has no such revision", model, "check what follows the @")
    if isinstance(error, (errors.RepositoryNotFoundError, errors.HFValidationError)):
        return UsageError("neither a folder nor a model on the hub", model, "check the spelling")
    if isinstance(error, errors.LocalEntryNotFoundError) and offline:
        what, remedy = "no such folder, nor in the cache of the hub", "run once without --offline and HF_HUB_OFFLINE"
        return UsageError(what, model, remedy)
    if isinstance(error, errors.LocalEntryNotFoundError):
        what, remedy = "no such folder, and the hub cannot be reached", "check the network, or give a folder"
        return UsageError(what, model, remedy)
    reason = str(error).strip().partition("\n")[0][:200]
    return SourceError(f"download failed ({type(error).__name__}: {reason})", model, "try again, or give a folder")
