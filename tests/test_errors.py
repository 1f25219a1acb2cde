import errno

import pytest

from offramp import errors
from offramp.errors import MissingExtraError, OfframpError, StoreError, is_out_of_memory

EXIT_CODES = {
    "OfframpError": 1,
    "UsageError": 2,
    "BudgetError": 3,
    "RefusedError": 4,
    "SourceError": 4,
    "PickleError": 4,
    "StoreError": 4,
    "DamagedError": 4,
    "VersionError": 4,
    "StageError": 4,
    "NonFiniteError": 4,
    "DiskFullError": 5,
    "MissingExtraError": 1,
}


def test_exit_codes():
    classes = {name: value for name, value in vars(errors).items() if isinstance(value, type)}
    assert {name: value.exit_code for name, value in classes.items()} == EXIT_CODES
    assert all(issubclass(value, OfframpError) for value in classes.values())


def test_a_message_says_what_where_and_what_to_do():
    assert str(StoreError("file is missing", "a/b", "divide again")) == "file is missing - a/b - divide again"
    assert str(StoreError("file is missing", None, "divide again")) == "file is missing - divide again"
    assert str(StoreError("file is missing")) == "file is missing"
    assert str(MissingExtraError("onnx", "divide")) == "onnx is not installed - pip install 'offramp[divide]'"


@pytest.mark.parametrize(
    "name",
    ["red\x1b[31m", "two\nlines", "\r over", "bell\a", "\x9b31m", "right\u202eleft", "lone \ud800", "nul\0", "\u2028"],
)
@pytest.mark.parametrize("part", [0, 1, 2])
def test_what_a_stranger_put_into_a_name_does_not_reach_the_terminal(name, part):
    parts = ["what", "where", "what to do"]
    parts[part] = name
    message = str(OfframpError(*parts))
    assert message.isprintable()
    assert message.encode()
    assert "\\" in message


def test_letters_of_any_script_stay():
    assert str(OfframpError("Größe 模型 مدل")) == "Größe 模型 مدل"


def test_endless_names_are_cut():
    message = str(OfframpError("begin " + "x" * 1_000_000 + " end", "path"))
    assert len(message) < 1100
    assert message.startswith("begin xxx")
    assert message.endswith("xxx end - path")


SHORT = [
    MemoryError(),
    OSError(errno.ENOMEM, "Cannot allocate memory"),
    RuntimeError("can't start new thread"),
    RuntimeError("std::bad_alloc"),
    RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"),
    ImportError("libx.so: failed to map segment from shared object: Cannot allocate memory"),
]
OTHER = [ValueError("bad"), OSError(errno.ENOENT, "No such file"), StoreError("file allocate memory is missing"), None]


@pytest.mark.parametrize(("error", "is_short"), [*((each, True) for each in SHORT), *((each, False) for each in OTHER)])
def test_memory_is_short_whichever_library_says_so(error, is_short):
    assert is_out_of_memory(error) == is_short
    outer = StoreError("graph does not load")
    outer.__cause__ = error
    assert is_out_of_memory(outer) == is_short
