import contextlib
import json
import os
import struct
import tracemalloc

import numpy as np
import pytest
import safetensors
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import save

from offramp.errors import DamagedError
from offramp.program.dtypes import DTYPES
from offramp.store.safetensors import Entry, header_bytes, num_bytes, parse_header, read_header
from tests.store.small import refused

NAMES = st.text(st.characters(exclude_categories=["Cs"]), max_size=20).filter(lambda name: name != "__metadata__")
SHAPES = st.lists(st.integers(0, 5), max_size=4).map(tuple)
TENSORS = st.dictionaries(NAMES, st.tuples(st.sampled_from(sorted(DTYPES)), SHAPES), max_size=6)
DTYPES = {
    "BOOL": np.bool_,
    "U8": np.uint8,
    "I8": np.int8,
    "I16": np.int16,
    "U16": np.uint16,
    "F16": np.float16,
    "I32": np.int32,
    "U32": np.uint32,
    "F32": np.float32,
    "F64": np.float64,
    "I64": np.int64,
    "U64": np.uint64,
}


def file_of(tensors, fill=b"\x5a"):
    """A file of name -> (dtype, shape), by our writer."""
    entries, start = [], 0
    for name, (dtype, shape) in tensors.items():
        entries.append((name, dtype, shape, start))
        start += num_bytes(dtype, shape)
    return header_bytes(entries) + (fill * start)[:start]


def by_hand(header, data=b"", length=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def tensor(shape=(2,), offsets=(0, 8), dtype="F32"):
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


def test_golden_bytes():
    """The format, byte for byte: 0x0ff8 is 4088 bytes of header, so that data begin at 4096."""
    data = struct.pack("<3f", 1, 2, 3)
    header = (
        b'{"__metadata__":{"format":"pt"},'
        b'"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},'
        b'"b":{"dtype":"F32","shape":[1,1],"data_offsets":[8,12]}}'
    )
    written = header_bytes([("a", "F32", (2,), 0), ("b", "F32", (1, 1), 8)]) + data
    assert written == b"\xf8\x0f\0\0\0\0\0\0" + header + b" " * (4088 - len(header)) + data


@given(TENSORS)
def test_write_read_write_gives_the_same_bytes(tensors):
    written = file_of(tensors)
    header = parse_header(written, len(written), "file")
    again = header_bytes((name, entry.dtype, entry.shape, entry.start) for name, entry in header.tensors.items())
    assert again == written[: header.data_start]
    assert header.data_start % 4096 == 0
    assert {name: (entry.dtype, entry.shape) for name, entry in header.tensors.items()} == tensors


@given(TENSORS)
def test_the_official_library_reads_what_we_write(tensors):
    found = dict(safetensors.deserialize(file_of(tensors)))
    assert {name: (value["dtype"], tuple(value["shape"])) for name, value in found.items()} == tensors
    assert all(bytes(value["data"]) == b"\x5a" * num_bytes(*tensors[name]) for name, value in found.items())


@given(TENSORS)
def test_we_read_what_the_official_library_writes(tensors):
    arrays = {name: np.full(shape, 7, DTYPES[dtype]) for name, (dtype, shape) in tensors.items() if dtype in DTYPES}
    written = save(arrays, {"format": "np"})
    header = parse_header(written, len(written), "file")
    assert header.metadata == {"format": "np"}
    assert header.tensors.keys() == arrays.keys()
    for name, array in arrays.items():
        entry = header.tensors[name]
        assert (entry.dtype, entry.shape) == tensors[name]
        assert written[header.data_start + entry.start : header.data_start + entry.end] == array.tobytes()


def test_the_header_of_an_open_file(tmp_path):
    (tmp_path / "file").write_bytes(file_of({"a": ("F32", (2,))}))
    header = header_of(tmp_path / "file")
    assert header.tensors == {"a": Entry("F32", (2,), 0, 8)}
    assert (header.data_start, header.metadata) == (4096, {"format": "pt"})


def test_metadata_may_be_null():
    data = by_hand({"__metadata__": None, "a": tensor()}, b"12345678")
    assert safetensors.deserialize(data) and parse_header(data, len(data), "file").metadata == {}


GOOD = file_of({"a": ("F32", (2,)), "b": ("F32", (1, 1))})
DATA = b"\x5a" * 8
BAD_FILES = {
    "0 bytes": (b"", "0"),
    "7 bytes": (GOOD[:7], "7"),
    "8 bytes": (GOOD[:8], "does not fit"),
    "cut inside the header": (GOOD[:50], "does not fit"),
    "cut at the end of the header": (GOOD[:4096], "tensors take 12 bytes, the file holds 0"),
    "cut inside the first tensor": (GOOD[:4103], "holds 7"),
    "cut before the last byte": (GOOD[:-1], "holds 11"),
    "one byte more": (GOOD + b"\0", "holds 13"),
    "a page more": (GOOD + bytes(4096), "holds 4108"),
    "a zip appended": (GOOD + b"PK\3\4 polyglot", "holds 25"),
    "two files": (GOOD + GOOD, "the file holds"),
    "header of 0 bytes": (by_hand(b""), "not JSON"),
    "header of 1 byte": (by_hand(b"{"), "not JSON"),
    "header one longer than the file": (by_hand(b"{}", length=3), "does not fit"),
    "header of 2^31": (by_hand(b"{}", length=2**31), "does not fit"),
    "header of 2^32": (by_hand(b"{}", length=2**32), "does not fit"),
    "header of 2^63": (by_hand(b"{}", length=2**63), "does not fit"),
    "header of 2^64-1": (by_hand(b"{}", length=2**64 - 1), "does not fit"),
    "not UTF-8": (by_hand(b'{"\xff\xfe":1}'), "not JSON"),
    "byte order mark": (by_hand(b"\xef\xbb\xbf{}"), "not JSON"),
    "too deep": (by_hand(b"[" * 100_000), "nested too deeply"),
    "too deep in objects": (by_hand(b'{"a":' * 100_000), "nested too deeply"),
    "a list": (by_hand(b"[]"), "header must be an object"),
    "null": (by_hand(b"null"), "header must be an object"),
    "same name, same offsets": (
        by_hand(b'{"a":%s,"a":%s}' % ((json.dumps(tensor()).encode(),) * 2), DATA),
        "duplicate key",
    ),
    "two __metadata__": (by_hand(b'{"__metadata__":{},"__metadata__":{}}'), "duplicate key"),
    "__metadata__ of numbers": (by_hand({"__metadata__": {"a": 1}}), "__metadata__"),
    "__metadata__ a list": (by_hand({"__metadata__": []}), "__metadata__"),
    "NaN": (by_hand(b'{"a":{"dtype":"F32","shape":[NaN],"data_offsets":[0,8]}}', DATA), "NaN is not"),
    "1e999": (by_hand(b'{"a":{"dtype":"F32","shape":[1e999],"data_offsets":[0,8]}}', DATA), "1e999 is not"),
    "a number of 4000 digits": (by_hand(b'{"a":' + b"9" * 4000 + b"}"), "4000 digits"),
    "a float": (by_hand({"a": tensor(offsets=(0, 8.0))}, DATA), "data_offsets must "),
    "a negative": (by_hand({"a": tensor(shape=(-2,))}, DATA), "shape must be "),
    "negative offsets": (by_hand({"a": tensor(offsets=(-8, 0))}, DATA), "data_offsets must "),
    "a bool": (by_hand({"a": tensor(shape=(True, 2))}, DATA), "shape must be "),
    "a string": (by_hand({"a": tensor(shape="22")}, DATA), "shape must be "),
    "one offset": (by_hand({"a": tensor(offsets=(8,))}, DATA), "data_offsets must "),
    "no dtype": (by_hand({"a": {"shape": [2], "data_offsets": [0, 8]}}, DATA), "lacks ['dtype']"),
    "one key more": (by_hand({"a": {**tensor(), "strides": [1]}}, DATA), "has unknown keys ['strides']"),
    "overlap": (by_hand({"a": tensor(), "b": tensor(offsets=(4, 12))}, DATA + b"1234"), "'b' begins at 4, not at 8"),
    "a hole": (by_hand({"a": tensor(), "b": tensor(offsets=(12, 20))}, bytes(20)), "'b' begins at 12, not at 8"),
    "not from 0": (by_hand({"a": tensor(offsets=(1, 9))}, bytes(9)), "'a' begins at 1, not at 0"),
    "reversed": (by_hand({"a": tensor(offsets=(8, 0))}, DATA), "cannot occupy -8 bytes"),
    "beyond the file": (by_hand({"a": tensor((4,), (0, 16))}, DATA), "tensors take 16 bytes, the file holds 8"),
    "product of 2^64": (by_hand({"a": tensor((2**32, 2**30), (0, 0))}), "cannot occupy 0 bytes"),
    "product that wraps to 8": (by_hand({"a": tensor((2**61 + 1, 2**4), (0, 8))}, DATA), "shape must be "),
    "extent of 2^62": (by_hand({"a": tensor((0, 2**62), (0, 0))}), "shape must be "),
    "sizes of no elements": (by_hand({"a": tensor((0, 2**50, 2**50), (0, 0))}), "no array can have"),
    "shape against bytes": (by_hand({"a": tensor((3,))}, DATA), "[3] cannot occupy 8 bytes"),
    "rank 65": (by_hand({"a": tensor((1,) * 65, (0, 4))}, b"1234"), "shape has 65 elements"),
    "F32 that is F16": (by_hand({"a": tensor((4,))}, DATA), "F32 [4] cannot occupy 8 bytes"),
    "dtype must be one of": (by_hand({"a": tensor(dtype="F31")}, DATA), "not 'F31'"),
    "dtype of half bytes": (by_hand({"a": tensor((1,), (0, 1), "F4")}, b"1"), "is F4, whose values share bytes"),
    "big-endian": (by_hand({"a": tensor(dtype=">F32")}, DATA), "dtype must be one of"),
    "dtype a list": (by_hand({"a": tensor(dtype=["F32"])}, DATA), "dtype must be one of"),
    "name of a path": (by_hand({"../../x": tensor((3,))}, DATA), "../../x"),
    "name with NUL": (by_hand({"a\0b": tensor((3,))}, DATA), r"a\x00b"),
    "name that paints": (by_hand({"\x1b[31mred\nline": tensor((3,))}, DATA), r"\x1b[31mred\nline"),
    "name with markup": (by_hand({"<script>": tensor((3,))}, DATA), "<script>"),
    "lone surrogate": (by_hand(b'{"\\ud800":1}'), "ud800"),
    "name of a megabyte": (by_hand({"x" * 1_000_000: tensor((3,))}, DATA), "cannot occupy"),
    "a pickle": (b"\x80\x04\x95\x0b\0\0\0\0\0\0\0K*.", "does not fit"),
    "a zip": (b"PK\3\4\x14\0\0\0\x08\0" + bytes(100), "does not fit"),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_a_bad_file_is_refused(name, tmp_path):
    data, mentions = BAD_FILES[name]
    (tmp_path / "file").write_bytes(data)
    message = refused(DamagedError, lambda: header_of(tmp_path / "file"), mentions)
    assert str(tmp_path / "file") in message


def test_we_are_nowhere_laxer_than_the_official_library():
    taken = {name for name, (data, _) in BAD_FILES.items() if _official_takes(data)}
    assert taken == {"same name, same offsets", "one key more", "extent of 2^62", "rank 65", "sizes of no elements"}


def _official_takes(data):
    try:
        safetensors.deserialize(data)
    except safetensors.SafetensorError:
        return False
    return True


def test_names_are_not_judged():
    """They are never used as paths."""
    written = file_of({"../../x": ("F32", (1,)), "\x1b[31m": ("F32", (1,)), "": ("F32", (0,))})
    assert parse_header(written, len(written), "file").tensors.keys() == {"../../x", "\x1b[31m", ""}


def test_a_lying_length_costs_no_memory(tmp_path):
    """101 MB of header, which the file does hold: refused before it is read."""
    with open(tmp_path / "file", "wb") as file:
        file.write((101_000_000).to_bytes(8, "little"))
        file.truncate(101_000_008)
    tracemalloc.start()
    refused(DamagedError, lambda: header_of(tmp_path / "file"), "does not fit")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1 << 20


def empty_tensors(numbers):
    return by_hand(b"{%s}" % b",".join(b'"%d":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}' % n for n in numbers))


def test_fifty_thousand_names_with_the_last_one_twice():
    data = empty_tensors([*range(50_000), 49_999])
    refused(DamagedError, lambda: parse_header(data, len(data), "file"), "duplicate key '49999'")


@pytest.mark.parametrize(
    "data",
    [empty_tensors(range(100_000)), by_hand(b'{"a":[%s]}' % b",".join([b"[]"] * 300_000))],
    ids=["tensors", "lists"],
)
def test_a_header_of_many_values_costs_no_memory(data):
    tracemalloc.start()
    refused(DamagedError, lambda: parse_header(data, len(data), "file"), "more than 400,000 values")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < len(data) + (1 << 20)


@given(st.binary(max_size=300))
def test_random_headers_are_refused_or_read(text):
    data = by_hand(text)
    with contextlib.suppress(DamagedError):
        parse_header(data, len(data), "file")


@given(st.data())
def test_spoilt_headers_are_refused_or_read(data):
    spoilt = bytearray(by_hand({"__metadata__": {"format": "pt"}, "a": tensor(), "b": tensor(offsets=(8, 16))}))
    for _ in range(data.draw(st.integers(1, 4))):
        spoilt[data.draw(st.integers(0, len(spoilt) - 1))] = data.draw(st.sampled_from(b'{}[]":,0129-e \\u\xff'))
    with contextlib.suppress(DamagedError):
        parse_header(bytes(spoilt), len(spoilt) + 16, "file")


def header_of(path):
    fd = os.open(path, os.O_RDONLY)
    try:
        return read_header(fd, os.fstat(fd).st_size, path)
    finally:
        os.close(fd)


@pytest.mark.parametrize(("dtype", "bits"), [("F4", 4), ("F6_E2M3", 6), ("F6_E3M2", 6)])
def test_dtypes_whose_values_share_bytes_are_refused_by_name(dtype, bits):
    """The official library reads such a file: it is not damaged."""
    data = by_hand({"a": {"dtype": dtype, "shape": [8], "data_offsets": [0, bits]}}, bytes(bits))
    assert safetensors.deserialize(data)
    refused(DamagedError, lambda: parse_header(data, len(data), "file"), f"tensor 'a' is {dtype}, whose values share")


def test_a_header_that_ends_early_is_refused_as_that():
    """Also where what is there is valid JSON: the file may become shorter between two reads."""
    data = by_hand(b"{}" + b" " * 40)
    assert parse_header(data, len(data), "here").data_start == len(data)
    refused(DamagedError, lambda: parse_header(data[:20], len(data), "here"), "file ends inside its header")
