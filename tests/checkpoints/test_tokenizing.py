"""Tokenizers of model folders: ids and token types are those of `AutoTokenizer`, whatever the folder's files say."""

import json
import os
import random
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest

from offramp.errors import SourceError, UsageError
from offramp.program.program import Texts
from offramp.store import StoreWriter
from offramp.tasks.model_files import ModelFiles
from offramp.tasks.text import TextEncoder
from offramp.tasks.tokenizer_settings import FAST_TOKENIZER, SETTINGS, read_settings
from tests.processes import is_running, wait_until
from tests.tasks.test_text import BERT_VOCABULARY, WORDS, bert_folder, expected, roberta_folder, rows
from tests.tiny_families import write_classifier

pytest.importorskip("transformers")

from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import AutoTokenizer

from offramp.checkpoints import auto_tokenizer, tokenizing
from offramp.checkpoints.auto_tokenizer import save_tokenizer, write_tokenizer
from offramp.checkpoints.inputs import texts_of
from offramp.checkpoints.tokenizing import OUTCOME, open_text_encoder, store_tokenizer
from offramp.streaming.weightless import class_of_folder, of_class

TEXTS = Texts(vocab_size=1 << 20, max_length=1 << 20, num_token_types=2, pad_token=0)
USER = {"content": "<user>", "special": True, "lstrip": False, "rstrip": False, "normalized": False}
SPACED = {**USER, "content": "New York", "special": False, "lstrip": True, "normalized": True, "single_word": True}
PIECES = ["<s>", "<pad>", "</s>", "<unk>", "▁", "▁the", "▁cat", "s", "a", "aa", "aaa", "e", "l", "o", "he", "▁w", "中"]


@pytest.fixture(autouse=True)
def nothing_proven(monkeypatch):
    """Every test compares its tokenizers with those of transformers, whatever tests before it did."""
    monkeypatch.setattr(auto_tokenizer, "_PROVEN", {})


def as_json(folder, **config):
    """A BERT folder of `tokenizer.json`, whose `tokenizer_config.json` has more to say."""
    bert_folder(folder)
    AutoTokenizer.from_pretrained(folder).save_pretrained(folder)
    (folder / "vocab.txt").unlink(missing_ok=True)
    return configured(folder, tokenizer_class="BertTokenizer", **config)


def configured(folder, **config):
    path = folder / "tokenizer_config.json"
    found = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps({**found, **config}))
    return folder


def added_by_a_file(folder):
    bert_folder(folder)
    (folder / "added_tokens.json").write_text(json.dumps({"<user>": len(BERT_VOCABULARY)}))
    return folder


def saved(folder, tokenizer, cls="PreTrainedTokenizerFast", model_type="bert", **config):
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"model_type": model_type}))
    tokenizer.save(str(folder / "tokenizer.json"))
    return configured(folder, tokenizer_class=cls, **config)


def padding_and_cutting(folder):
    as_json(folder)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.enable_padding(length=64)
    tokenizer.enable_truncation(24, direction="left")
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


def unigram(folder, split=True, **options):
    pieces = [(piece, 0.0 if index < 4 else -1.0 - index / 9) for index, piece in enumerate(PIECES)]
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=3))
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(split=split)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", pair="<s> $A </s> </s> $B:1 </s>:1", special_tokens=[("<s>", 0), ("</s>", 2)]
    )
    return saved(folder, tokenizer, pad_token="<pad>", **options)


def letters(folder):
    tokenizer = Tokenizer(models.BPE({token: index for index, token in enumerate(["[PAD]", "[CLS]", *"ACGT"])}, []))
    tokenizer.post_processor = processors.BertProcessing(("[PAD]", 0), ("[CLS]", 1))
    return saved(folder, tokenizer, pad_token="[PAD]")


def added_letters(folder):
    tokenizer = Tokenizer(models.BPE({"[PAD]": 0, "[CLS]": 1}, []))
    tokenizer.add_special_tokens(["[PAD]", "[CLS]"])
    tokenizer.add_tokens([*"ACGT"])
    return saved(folder, tokenizer, pad_token="[PAD]")


def word_level(folder):
    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(["[UNK]", *WORDS])}, "[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return saved(folder, tokenizer, pad_token="[UNK]", extra_special_tokens=["<user>"])


SENTENCEPIECE = {
    "XLNet": "xlnet",
    "XLMRoberta": "xlm-roberta",
    "DebertaV2": "deberta-v2",
    "T5": "t5",
}
"""Classes with rules of their own for a vocabulary of sentencepiece, and their model types."""
CONFIGURATIONS = {
    "vocabulary": bert_folder,
    "cased": lambda folder: bert_folder(folder, do_lower_case=False),
    "accents": lambda folder: bert_folder(folder, do_lower_case=True, strip_accents=False),
    "Chinese": lambda folder: bert_folder(folder, tokenize_chinese_chars=False),
    "other special tokens": lambda folder: bert_folder(folder, cls_token="[unused1]", sep_token="[MASK]"),
    "short": lambda folder: bert_folder(folder, model_max_length=16),
    "short by another name": lambda folder: bert_folder(folder, max_len=16),
    "no limit": lambda folder: bert_folder(folder, model_max_length=1e30),
    "left": lambda folder: bert_folder(folder, truncation_side="left", model_max_length=20),
    "split special tokens": lambda folder: bert_folder(folder, split_special_tokens=True),
    "DistilBERT": lambda folder: bert_folder(folder, tokenizer_class="DistilBertTokenizer"),
    "no types": lambda folder: bert_folder(folder, model_input_names=["input_ids", "attention_mask"]),
    "token of a file": added_by_a_file,
    "json": as_json,
    "json, cased": lambda folder: as_json(folder, do_lower_case=False),
    "json and tokens": lambda folder: as_json(folder, added_tokens_decoder={str(len(BERT_VOCABULARY)): USER}),
    "json and words": lambda folder: as_json(folder, added_tokens_decoder={str(len(BERT_VOCABULARY)): SPACED}),
    "json, generic class": lambda folder: as_json(folder) and configured(
        folder, tokenizer_class="PreTrainedTokenizerFast", do_lower_case=False, extra_special_tokens=["<user>"]
    ),
    "json, padding and cutting": padding_and_cutting,
    "RoBERTa": roberta_folder,
    "RoBERTa, space first": lambda folder: roberta_folder(folder, add_prefix_space=True, model_max_length=12),
    "Unigram": unigram,
    "Unigram, one word": lambda folder: unigram(folder, split=False, model_max_length=24),
    "begin and end": lambda folder: unigram(folder, bos_token="<s>", eos_token="</s>", add_eos_token=True),
    **{cls: partial(unigram, cls=f"{cls}Tokenizer", model_type=kind) for cls, kind in SENTENCEPIECE.items()},
    "letters": letters,
    "letters that are added": added_letters,
    "words": word_level,
}  # fmt: skip


@pytest.fixture(params=CONFIGURATIONS)
def folder(request, tmp_path):
    return CONFIGURATIONS[request.param](tmp_path / "model")


def as_in_a_store(folder, place, said=None):
    """The folder of a store's tokenizer, with the files of the model as division copies them."""
    with StoreWriter(place / "store", "fingerprint") as writer:
        for path in folder.iterdir():
            writer.add_copy(path.name, path)
        store_tokenizer(folder, writer, (lambda line: None) if said is None else said.append)
    return writer.partial


def some_texts(num, seed):
    """Texts of words, special tokens, and characters of many scripts, some of them long."""
    choose = random.Random(seed)
    words = [
        *WORDS,
        "<user>",
        "[SEP]",
        "[MASK]",
        "<s>",
        "</s>",
        "ACGT",
        "aaaa",
        "Café",
        "e\u0301",
        "😀",
        "New York",
        "  ",
    ]
    characters = [*map(chr, range(32, 0x250)), *"中国語العربيةहिन्दीไทย😀👍🏽ﬁ①\u200b\u3000\t\n\u0000\ufffd"]

    def text(sizes=(0, 1, 3, 10, 40, 800)):
        kind, size = choose.randrange(3), choose.choice(sizes)
        alphabet = (words, characters, ["a", "aa", "é"])[kind]
        return ("", " ", " ")[choose.randrange(3)].join(choose.choices(alphabet, k=size))

    def pair():  # transformers keeps each combination of the parts that it cuts off: one text is short
        return tuple(choose.sample([text(), text((0, 1, 3, 10))], 2))

    return [text() if choose.random() < 0.6 else pair() for _ in range(num)]


def outcome(call, *args):
    """What a call returns; of a vocabulary that lacks a word, only that it fails."""
    try:
        return call(*args)
    except Exception:
        return None


def encoded(ours, text):
    return rows(ours.encode([text]))[0]


@pytest.mark.parametrize("num", [25, pytest.param(500, marks=pytest.mark.slow)])
def test_a_store_gives_the_tokens_of_transformers(folder, tmp_path, monkeypatch, num):
    if num < 100:
        monkeypatch.setattr(auto_tokenizer, "_NUM_RANDOM", 10)
        monkeypatch.setattr(auto_tokenizer, "_NUM_WORDS", 10)
    place, theirs = as_in_a_store(folder, tmp_path), AutoTokenizer.from_pretrained(folder)
    settings = read_settings(ModelFiles(place))
    assert settings and settings.proof and settings.proof.num_probes > 100
    for length in (None, 12):
        ours = TextEncoder.from_folder(place, TEXTS, length, warn=lambda message: None)
        for text in some_texts(num, seed=num):
            want = outcome(expected, theirs, text, length, "token_type_ids" in theirs.model_input_names)
            want = ([0], [0]) if want and not want[0] else want  # a text without tokens is one of padding
            assert outcome(encoded, ours, text) == want, text


def test_a_run_folder_gives_the_tokens_of_its_source(folder, tmp_path):
    out = tmp_path / "run"
    out.mkdir()
    shutil.copy(folder / "config.json", out)
    save_tokenizer(folder, out)
    theirs, again = AutoTokenizer.from_pretrained(folder), AutoTokenizer.from_pretrained(out)
    texts = some_texts(40, seed=7)
    assert [outcome(expected, again, text, None, False) for text in texts] == [
        outcome(expected, theirs, text, None, False) for text in texts
    ]


def test_the_tokenizer_of_the_model_is_kept_once_where_it_is_the_same(tmp_path):
    same, other = as_json(tmp_path / "same"), as_json(tmp_path / "other", do_lower_case=False)
    assert not (as_in_a_store(same, tmp_path / "a") / FAST_TOKENIZER).exists()
    assert (as_in_a_store(other, tmp_path / "b") / FAST_TOKENIZER).exists()


def test_without_transformers_the_store_has_no_proof_and_says_so(tmp_path, monkeypatch):
    folder, said = bert_folder(tmp_path / "model", model_max_length=9), []
    monkeypatch.setitem(sys.modules, "transformers", None)
    place = as_in_a_store(folder, tmp_path, said)
    assert said == ["the tokenizer is not proven equal to that of transformers, and is made from its files: "
                    "transformers is not installed"]  # fmt: skip
    assert json.loads((place / SETTINGS).read_text())["proof"] is None and read_settings(ModelFiles(place)) is None
    assert TextEncoder.from_folder(place, TEXTS).max_length == 9


def test_a_tokenizer_that_transformers_cannot_read_is_not_proven(tmp_path):
    folder, said = bert_folder(tmp_path / "model", tokenizer_class="BertJapaneseTokenizer"), []
    as_in_a_store(folder, tmp_path, said)
    assert ["not proven" in said[0], "will take no texts" in said[1], len(said)] == [True, True, 2]


def test_a_folder_without_a_tokenizer_gets_no_files(tmp_path):
    with StoreWriter(tmp_path / "store", "fingerprint") as writer:
        assert store_tokenizer(tmp_path, writer, print) == []


def test_a_difference_is_refused_with_the_text(tmp_path, monkeypatch):
    class Upper(TextEncoder):
        def encode(self, inputs):
            return super().encode([text.upper() if isinstance(text, str) else text for text in inputs])

    monkeypatch.setattr(auto_tokenizer, "TextEncoder", Upper)
    folder = bert_folder(tmp_path / "model", do_lower_case=False)
    with pytest.raises(SourceError, match="other tokens than transformers for 'a'"):
        as_in_a_store(folder, tmp_path)


def test_a_tokenizer_is_compared_once_wherever_it_lies_and_again_where_anything_differs(tmp_path, monkeypatch):
    compare, compared = auto_tokenizer._compare, []
    monkeypatch.setattr(auto_tokenizer, "_compare", lambda *args: compared.append(args[2].name) or compare(*args))
    changes = {"first": {}, "again": {}, "cased": {"do_lower_case": False}, "left": {"truncation_side": "left"}}
    for name, change in (changes | {"other class": {"tokenizer_class": "DistilBertTokenizer"}}).items():
        folder = bert_folder(tmp_path / name, **change)
        for number in range(2):
            proof = read_settings(ModelFiles(as_in_a_store(folder, tmp_path / f"{name} {number}"))).proof
            assert proof.num_probes > 100
    assert compared == ["first", "cased", "left", "other class"]


class Characters:
    """A tokenizer of Python code: one token a character, between two others."""

    def __init__(self, vocabulary):
        self._vocabulary, self.model_max_length, self.model_input_names = vocabulary, 1e30, ["input_ids"]
        self.added_tokens_encoder = {}

    def get_vocab(self):
        return self._vocabulary

    def __call__(self, *texts, truncation, max_length, padding):
        (text,) = texts[0]
        return {"input_ids": [[3, *(self._vocabulary.get(letter, 2) for letter in text)][:max_length]]}


@pytest.mark.parametrize("others", [("tokenizer.json",), ("vocab.txt",), ("tokenizer.json", "vocab.txt")])
def test_a_tokenizer_of_python_code_with_files_of_another_one_is_refused(tmp_path, monkeypatch, others):
    """The message names the files that are there, without which the store takes no texts."""
    folder = bert_folder(tmp_path / "model", tokenizer_class="BertTokenizer")
    vocabulary = {token: id for id, token in enumerate(BERT_VOCABULARY)}
    if "tokenizer.json" in others:
        shutil.copy(as_json(tmp_path / "made") / "tokenizer.json", folder)
    if "vocab.txt" not in others:
        (folder / "vocab.txt").unlink()
    monkeypatch.setattr(AutoTokenizer, "from_pretrained", lambda *args, **options: Characters(vocabulary))
    with pytest.raises(SourceError, match=f"other tokens than transformers .* - remove {' and '.join(others)} in a"):
        as_in_a_store(folder, tmp_path)
    for name in others:
        (folder / name).unlink()
    said = []
    as_in_a_store(folder, tmp_path, said)
    assert said[0].endswith("TypeError: Characters is no fast tokenizer")
    assert said[1].startswith("the store will take no texts: no tokenizer")


def test_a_vocabulary_that_only_transformers_reads_makes_a_store_of_texts(tmp_path, monkeypatch):
    made = AutoTokenizer.from_pretrained(as_json(tmp_path / "made"))
    folder, said = write_classifier(tmp_path / "model", "albert", num_layers=1), []
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer_config.json").unlink()
    (folder / "spiece.model").write_bytes(b"of sentencepiece")
    module = of_class(class_of_folder(folder), folder)
    assert texts_of(module, folder) is not None
    as_in_a_store(folder, tmp_path / "unread", said)
    assert said[-1] == "the store will take no texts: only a sentencepiece tokenizer (spiece.model)"
    monkeypatch.setattr(AutoTokenizer, "from_pretrained", lambda *args, **options: made)
    place = as_in_a_store(folder, tmp_path)
    assert encoded(TextEncoder.from_folder(place, TEXTS), "the cat") == expected(made, "the cat", None, True)


@pytest.mark.parametrize("cls", ["BertTokenizer", "XLMRobertaTokenizer", "T5Tokenizer", "RobertaTokenizer"])
def test_a_folder_whose_vocabulary_is_absent_is_refused(tmp_path, cls):
    """transformers makes a tokenizer of special tokens from it, by which all texts are alike."""
    folder = bert_folder(tmp_path / "model", tokenizer_class=cls)
    (folder / "vocab.txt").unlink()
    with pytest.raises(
        SourceError, match=f"{cls} without a vocabulary of this folder - .* - copy the tokenizer's files"
    ):
        as_in_a_store(folder, tmp_path)


def test_a_tokenizer_without_a_template_of_pairs_takes_single_texts(tmp_path):
    folder = as_json(tmp_path / "model")
    tree = json.loads((folder / "tokenizer.json").read_text())
    tree["post_processor"]["pair"] = tree["post_processor"]["single"]
    (folder / "tokenizer.json").write_text(json.dumps(tree))
    configured(folder, tokenizer_class="PreTrainedTokenizerFast")
    ours = TextEncoder.from_folder(as_in_a_store(folder, tmp_path), TEXTS)
    assert encoded(ours, "the cat") == expected(AutoTokenizer.from_pretrained(folder), "the cat", None, False)
    with pytest.raises(UsageError, match="no place for the second text of a pair"):
        ours.encode([("the cat", "sat")])


@pytest.mark.parametrize(("length", "is_proven"), [(20.0, True), (-1, True), ("20", False)])
def test_a_length_that_is_no_whole_number_is_proven_or_named(tmp_path, length, is_proven):
    folder, said = bert_folder(tmp_path / "model", model_max_length=length), []
    settings = read_settings(ModelFiles(as_in_a_store(folder, tmp_path, said)))
    assert (settings is not None and settings.proof is not None) == is_proven
    assert is_proven or said[0].endswith("TypeError: model_max_length is '20', not a number of tokens")


def test_a_tokenizer_that_takes_more_than_texts_is_not_proven(tmp_path):
    folder, said = configured(as_json(tmp_path / "model"), tokenizer_class="LayoutLMv2Tokenizer"), []
    as_in_a_store(folder, tmp_path, said)
    assert len(said) == 1 and said[0].endswith("TypeError: LayoutLMv2Tokenizer takes more than a text")


def test_a_length_without_room_for_a_pair_is_proven_for_texts(tmp_path):
    place = as_in_a_store(bert_folder(tmp_path / "model", model_max_length=4), tmp_path)
    settings, ours = read_settings(ModelFiles(place)), TextEncoder.from_folder(place, TEXTS, warn=lambda message: None)
    assert settings and settings.proof and encoded(ours, "a b c")[0] == encoded(ours, "a b d e")[0]
    with pytest.raises(UsageError, match="max_length 4 is too short for a pair of texts"):
        ours.encode([("a", "b")])


def test_rows_of_a_model_folder_and_of_its_store_are_equal(tmp_path):
    folder = as_json(tmp_path / "model", added_tokens_decoder={str(len(BERT_VOCABULARY)): USER})
    text, quiet = "the <user> cat", {"max_length": 32, "warn": lambda message: None}
    store = as_in_a_store(folder, tmp_path)
    encoders = [open_text_encoder(place, TEXTS, **quiet) for place in (folder, store)]
    first, second = (rows(encoder.encode([text])) for encoder in encoders)
    user = AutoTokenizer.from_pretrained(folder).convert_tokens_to_ids("<user>")
    assert first == second and user in first[0][0]


def test_a_process_without_transformers_asks_another_one(tmp_path):
    folder = bert_folder(tmp_path / "model", model_max_length=9)
    code = f"""
import sys
from pathlib import Path
from offramp.checkpoints.tokenizing import store_tokenizer
from offramp.store import StoreWriter
with StoreWriter(Path({str(tmp_path / "store")!r}), "fingerprint") as writer:
    print([file.file for file in store_tokenizer(Path({str(folder)!r}), writer, print)])
print(sorted({{"torch", "transformers", "tokenizers"}} & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == [str([SETTINGS, FAST_TOKENIZER]), "[]"] and done.stderr == ""
    settings = read_settings(ModelFiles(tmp_path / "store.partial"))
    assert settings and settings.proof and settings.max_length == 9


def test_what_another_process_refuses_is_refused_here(tmp_path, monkeypatch):
    def refuse(command, **options):
        Path(command[4], OUTCOME).write_text(json.dumps({"refusal": ["it differs", "report it"], "reason": ""}))
        return subprocess.CompletedProcess(command, 0)

    folder = bert_folder(tmp_path / "model")
    monkeypatch.delitem(sys.modules, "transformers")
    monkeypatch.setattr(subprocess, "run", refuse)
    with pytest.raises(SourceError, match=r"it differs .* report it"):
        as_in_a_store(folder, tmp_path)


@pytest.mark.parametrize(
    ("outcome", "reason"),
    [
        (subprocess.CompletedProcess([], -9, stderr=b""), "ended with -9"),
        (subprocess.CompletedProcess([], 1, stderr=b"Traceback\nImportError: x\n"), "ended with 1: ImportError: x"),
        (OSError("no process"), "did not end well (no process)"),
        (subprocess.TimeoutExpired("python", 600), "timed out after 600 seconds)"),
    ],
)
def test_a_process_that_fails_leaves_the_store_without_proof(tmp_path, monkeypatch, outcome, reason):
    def fail(command, **options):
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    folder, said = bert_folder(tmp_path / "model"), []
    monkeypatch.delitem(sys.modules, "transformers")
    monkeypatch.setattr(subprocess, "run", fail)
    as_in_a_store(folder, tmp_path, said)
    assert len(said) == 1 and said[0].endswith(reason)


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux ends a process with its parent")
def test_the_other_process_ends_with_its_parent(tmp_path):
    folder, stub = bert_folder(tmp_path / "model"), tmp_path / "path" / "transformers.py"
    stub.parent.mkdir()
    stub.write_text(f"""
import os, pathlib, time
pathlib.Path({str(tmp_path / "pid")!r}).write_text(str(os.getpid()))
time.sleep(60)
""")
    code = f"from offramp.checkpoints.tokenizing import *\nstore_tokenizer(Path({str(folder)!r}), None, print)"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(stub.parent), *sys.path])}
    with subprocess.Popen([sys.executable, "-c", code], env=environment) as parent:
        wait_until(lambda: (tmp_path / "pid").is_file() and (tmp_path / "pid").read_text(), "no process was started")
        parent.kill()
    pid = int((tmp_path / "pid").read_text())
    wait_until(lambda: not is_running(pid), "the process runs for a minute if nothing ends it")


def test_a_process_whose_parent_has_ended_already_writes_nothing(tmp_path):
    words = [bert_folder(tmp_path / "model"), tmp_path, 1 << 30]
    command = [sys.executable, "-m", tokenizing.__name__, *map(str, words)]
    assert subprocess.run(command, check=False).returncode == 1
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_write_tokenizer_needs_no_network_and_keeps_the_log_quiet(tmp_path, capfd):
    folder = configured(as_json(tmp_path / "model"), tokenizer_class="RobertaTokenizer")
    (tmp_path / "out").mkdir()
    outcome(write_tokenizer, folder, tmp_path / "out")
    assert capfd.readouterr() == ("", "")
