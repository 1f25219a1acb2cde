"""Adapters of peft: a folder that holds changes of the weights of a model. peft merges them, then the result is divided
as any other model.
"""

import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from offramp.checkpoints.downloads import DOWNLOADS, downloads_of, to_bytes
from offramp.checkpoints.hub import resolve
from offramp.checkpoints.source import ADAPTER, CONFIG, PROCESSOR, TOKENIZER, open_source, require_files
from offramp.checkpoints.weights import read_json
from offramp.division.config import DivisionConfig
from offramp.division.messages import ADAPTER_TENSOR, MERGE, MERGED, listed
from offramp.errors import SourceError, said
from offramp.store.scratch import scratch_folder

CLASSES = {
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "TOKEN_CLS": "AutoModelForTokenClassification",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
    "CAUSAL_LM": "AutoModelForCausalLM",
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
    "FEATURE_EXTRACTION": "AutoModel",
}
"""Task type in an adapter's description -> the class of transformers that loads its model."""
WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
"""Names of the file of an adapter's weights."""
INPUTS = (
    "PROMPT_TUNING", "MULTITASK_PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING", "ADAPTION_PROMPT", "CPT", "CARTRIDGE",
    "XLORA", "POLY", "SHADOW",
)  # fmt: skip
"""Kinds of adapters that peft merges no more than offramp: they add inputs, or weigh adapters by the input."""
MOST_STEPS, MOST_LAYERS = 64, 1 << 10
"""Most steps of an initialisation that settings may ask for, and most layers."""
_STARTS = re.compile(r"gaussian|olora|orthogonal|pissa(_niter_\d{1,2})?|loftq|eva|corda")
_REPETITION = re.compile(r"[*+{]\??|(?<!\()\?")
_TOO_SLOW = re.compile(r"^[*+?{]|\)[*+{]|\(\?(?![:=!<P])")
"""Parts that no pattern of a name may have: flags, and repetitions of a group, also of one that peft puts before it."""
MOST_REPETITIONS, MOST_PARTS, LONGEST = 2, 4, 300
"""Most repetitions in the pattern of a name, most of them and groups, and most characters: more may take hours."""
_PATTERNS = ("rank_pattern", "alpha_pattern", "n_frequency_pattern")
"""Settings whose keys are patterns."""
_REPLACED = ("target_modules", "exclude_modules", "layers_pattern")
"""Settings that are patterns where they are one text: the names of the modules that have weights say the same."""
_PREFIX = "base_model.model."
HEADS = ("classifier.weight", "score.weight", "out_proj.weight")
"""Ends of the names of weights that have one row a label."""


@contextmanager
def merged(folder: Path, store: Path, config: DivisionConfig) -> Iterator[Path]:
    """Yield a temporary folder beside the store: the model that an adapter changes, with the adapter merged into it.

    As transformers does, takes the model that lies beside the adapter, else the one that its description names. The
    model is in memory as a whole while it is merged. Raises SourceError where the two do not fit, or where a tensor is
    in neither.
    """
    require_files(folder)
    settings = read_json(folder / ADAPTER)
    named = str(settings.get("base_model_name_or_path"))
    parent = store.parent if store.parent.is_dir() else None  # where there is room for a store
    with scratch_folder(".offramp-merged-", parent) as scratch:
        if (folder / CONFIG).is_file():
            base = _without_adapter(folder, scratch / "base")
        else:
            revision = settings.get("revision")  # of the model, not of the adapter
            base = resolve(f"{named}@{revision}" if revision and not os.path.lexists(named) else named, config.offline)
        with open_source(base) as source:
            source.require_unquantised()
        config.say(f"adapter: peft merges it into {named}, which is in memory as a whole meanwhile")
        model = _merge(base, folder, settings)
        target = scratch / "model"
        model.save_pretrained(target)
        for name in (*TOKENIZER, PROCESSOR):
            found = next((each / name for each in _with_tokenizer(folder, base) if (each / name).is_file()), None)
            if found is not None:
                shutil.copyfile(found, target / name)
        downloads = downloads_of(folder, base)
        if downloads:
            (target / DOWNLOADS).write_bytes(to_bytes(downloads))
        del model
        yield target


def _without_adapter(folder: Path, base: Path) -> Path:
    """Make a folder of links to the files of a model: transformers would add the adapter to it by itself."""
    base.mkdir()
    for path in folder.iterdir():
        if not path.name.startswith("adapter_"):
            (base / path.name).symlink_to(path.resolve())
    return base


def _with_tokenizer(folder: Path, base: Path) -> tuple[Path, ...]:
    """Return where tokenizer files are taken from: all of the adapter's, else all of the model's."""
    return (folder,) if any((folder / name).is_file() for name in TOKENIZER) else (base,)


def _weights_of(folder: Path) -> dict[str, Any]:
    """Return the weights of an adapter. Raises SourceError where its folder has none that can be read."""
    from peft.utils import load_peft_weights

    try:
        if not any((folder / name).is_file() for name in WEIGHTS):  # peft would look for them on the hub
            raise FileNotFoundError(f"there is no {' or '.join(WEIGHTS)}")
        return load_peft_weights(str(folder), device="cpu")
    except Exception as error:  # safetensors and torch raise classes of their own
        what = f"the weights of the adapter cannot be read ({said(error)})"
        raise SourceError(what, folder, "get the whole folder of the adapter again") from error


def _is_slow(pattern: str) -> bool:
    """Say whether matching a pattern with the names of modules may take more than moments."""
    repeated = len(_REPETITION.findall(pattern))
    parts = repeated + pattern.count("(")
    too_many = len(pattern) > LONGEST or repeated > MOST_REPETITIONS or parts > MOST_PARTS
    return too_many or _TOO_SLOW.search(pattern) is not None


def _patterns(settings: Mapping[str, Any], weights: Mapping[str, Any]) -> list[str]:
    """Return what peft matches the names of modules with, without what `_described` puts names in place of."""
    found = [each for name in (*_PATTERNS, "modules_to_save") for each in settings.get(name) or ()]
    texts = ["feedforward_modules"]
    if settings.get("target_parameters"):
        texts += _REPLACED
    found += [settings[name] for name in texts if isinstance(settings.get(name), str)]
    for name in ("target_modules", "layers_pattern"):
        if isinstance(settings.get(name), list):
            found += settings[name]
    return found + (sorted(_modules(weights)) if settings.get("ensure_weight_tying") else [])


def _rank(said_as: Any) -> Any:
    """Return the rank that a value of `rank_pattern` stands for: AdaLoRA says of each row whether it is kept."""
    is_mask = isinstance(said_as, list) and all(type(each) is bool for each in said_as)
    return len(said_as) if is_mask else said_as


def _largest_rank(kind: str, weights: Mapping[str, Any]) -> int:
    """Return the largest rank that weights of an adapter can have, at least 1."""
    if kind == "VERA":  # its projections may be made again from a seed: a vector is as long as the rank
        return max([1, *(len(each) for key, each in weights.items() if key.endswith("vera_lambda_d"))])
    of_sides = min if MERGED[kind] == "lora" else max
    sides = [each.shape[:2] for each in weights.values() if each.dim() > 1]  # without those of kernels
    return max([1, *map(of_sides, sides)])


def _wrong_settings(settings: Mapping[str, Any], weights: Mapping[str, Any]) -> str | None:
    """Return what settings ask for that no weights of an adapter account for, or None: peft does it unasked."""
    if not all(isinstance(settings.get(name) or {}, dict) for name in _PATTERNS):
        return "patterns that are none"
    wrong = next((each for each in _patterns(settings, weights) if _is_slow(each)), None)
    if wrong is not None:
        return f"the pattern {wrong!r:.100}"
    largest = _largest_rank(str(settings.get("peft_type")), weights)
    ranks = map(_rank, (settings.get("rank_pattern") or {}).values())
    for rank in (*ranks, *(settings[name] for name in ("r", "init_r", "target_r") if settings.get(name))):
        if type(rank) is not int or not 0 < rank <= max(largest, MOST_STEPS):
            return f"the rank {rank!r:.40}, and its weights have at most {largest}"
    start, steps = settings.get("init_lora_weights"), (settings.get("loftq_config") or {}).get("loftq_iter", 1)
    if (isinstance(start, str) and not _STARTS.fullmatch(start)) or type(steps) is not int or steps > MOST_STEPS:
        return f"the initialisation {start!r:.40} of {steps!r:.40} steps"
    layers = settings.get("layer_replication") or []
    if len(layers) > MOST_LAYERS or sum(last - first for first, last in layers) > MOST_LAYERS:
        return f"more than {MOST_LAYERS} layers"
    return "modules of another library" if settings.get("megatron_config") else None


def _modules(weights: Mapping[str, Any]) -> set[str]:
    """Return the names of the modules that weights of an adapter change."""
    own = [key for key in weights if key.startswith(_PREFIX) and ADAPTER_TENSOR.search(key)]
    return {ADAPTER_TENSOR.split(key)[0][len(_PREFIX) :] for key in own}


def _described(folder: Path, weights: Mapping[str, Any]) -> Any:
    """Return the settings of an adapter with the names of its modules in place of patterns: its weights name them."""
    import peft

    config: Any = peft.PeftConfig.from_pretrained(str(folder), local_files_only=True)
    has_patterns = any(isinstance(getattr(config, name, None), str) for name in _REPLACED)
    if has_patterns and not getattr(config, "target_parameters", None):  # their weights name parameters too
        config.target_modules = _modules(weights)
        for name in (*_REPLACED[1:], "layers_to_transform"):
            if hasattr(config, name):
                setattr(config, name, None)
    return config


def _require_settings(folder: Path, settings: Mapping[str, Any], weights: Mapping[str, Any]) -> None:
    """Raise SourceError for a kind that is not merged, and for settings that would take time, memory or other files."""
    kind = str(settings.get("peft_type"))
    if kind not in MERGED:
        if kind not in INPUTS:
            raise SourceError(f"an adapter of kind {kind:.40}, which offramp does not merge", folder, MERGE)
        what = f"an adapter of kind {kind}, which no weights can hold"
        raise SourceError(what, folder, "train an adapter that changes weights, such as LoRA")
    try:
        wrong = _wrong_settings(settings, weights)
    except (TypeError, ValueError, AttributeError) as error:  # values of any type may come
        wrong = f"what it cannot ask for ({said(error)})"
    if wrong is not None:
        raise SourceError(f"{ADAPTER} asks for {wrong}", folder, "get the whole folder of the adapter again")


def _merge(base: Path, folder: Path, settings: dict[str, Any]) -> Any:
    """Return the model with the adapter in its weights."""
    import transformers
    from peft import PeftModel

    name = CLASSES.get(str(settings.get("task_type")))
    if name is None:
        name = (read_json(base / CONFIG).get("architectures") or ["AutoModel"])[0]
    weights = _weights_of(folder)
    _require_settings(folder, settings, weights)
    rows = next((len(weight) for key, weight in weights.items() if key.endswith(HEADS)), None)
    try:
        described = transformers.AutoConfig.from_pretrained(base, local_files_only=True)  # a folder  # nosec B615
        if rows not in (None, described.num_labels):
            described.num_labels = rows
        cls = getattr(transformers, name)
        model, loaded = cls.from_pretrained(base, config=described, local_files_only=True, output_loading_info=True)
        lacking = [key for key in loaded["missing_keys"] if not any(each.endswith(key) for each in weights)]
        adapted = None
        if not lacking:
            config = _described(folder, weights)
            adapted = PeftModel.from_pretrained(model, str(folder), config=config, local_files_only=True)
    except Exception as error:  # transformers and peft raise classes of many kinds for what does not fit
        what = f"the adapter does not fit the model that it names ({said(error)})"
        raise SourceError(what, folder, "check base_model_name_or_path in adapter_config.json") from error
    if adapted is None:
        what = f"{len(lacking)} tensors are neither in the adapter nor in its model: {listed(sorted(lacking))}"
        raise SourceError(what, folder, "save the adapter with modules_to_save=[...] that names its new head")
    return adapted.merge_and_unload()
