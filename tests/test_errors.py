import errno
import os

import pytest

from offramp import errors
from offramp.errors import MissingExtraError, OfframpError, StoreError

EXIT_CODES = {
    "OfframpError": 1,
    "UsageError": 2,
    "BudgetError": 3,
    "RefusedError": 4,
    "SourceError": 4,
    "PickleError": 4,
    "StoreError": 4,
    "DamagedError": 4,
    "ChangedError": 4,
    "VersionError": 4,
    "StageError": 4,
    "NonFiniteError": 4,
    "DiskFullError": 5,
    "AbsentError": 1,
    "MissingExtraError": 1,
}


def test_exit_codes():
    classes = {name: value for name, value in vars(errors).items() if isinstance(value, type)}
    assert issubclass(classes.pop("SystemNotice"), UserWarning)
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


@pytest.mark.parametrize("number", errno.errorcode, ids=errno.errorcode.get)
def test_every_error_of_the_system_is_one_sentence_with_an_exit_code(number):
    for where in ("file", None):
        found = errors.system_error(OSError(number, os.strerror(number), where))
        what, *_, remedy = str(found).split(" - ")
        assert found.exit_code in (2, 3, 4, 5)
        assert what and remedy and str(found).isprintable()
        assert ("file" in str(found).split(" - ")) is (where is not None)


@pytest.mark.parametrize(
    ("number", "code"),
    [
        ("ENOSPC", 5),
        ("EDQUOT", 5),
        ("ENOMEM", 3),
        ("EMFILE", 2),
        ("EACCES", 2),
        ("EROFS", 2),
        ("EIO", 4),
        ("ENOENT", 2),
    ],
)
def test_exit_codes_of_the_system(number, code):
    number = getattr(errno, number)
    for error in (OSError(number, os.strerror(number), "file"), Exception(f"reading failed (os error {number})")):
        assert errors.system_error(error).exit_code == code
        try:
            raise RuntimeError("a library failed") from error
        except RuntimeError as outer:
            assert errors.system_error(outer).exit_code == code


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        ImportError("libx.so: failed to map segment from shared object"),
        RuntimeError("std::bad_alloc"),
        RuntimeError("BFCArena: Failed to allocate memory for requested buffer of size 8"),
    ],
)
def test_memory_that_cannot_be_allocated_ends_with_3(error):
    assert errors.system_error(error).exit_code == 3


@pytest.mark.parametrize("error", [ValueError("no"), KeyError("memory"), ImportError("no x"), AssertionError()])
def test_other_errors_are_not_of_the_system(error):
    assert errors.system_error(error) is None


def test_a_library_that_does_not_load_is_not_called_missing():
    absent = errors.import_error(ModuleNotFoundError("No module named 'x'", name="x"), "x", "edge")
    assert isinstance(absent, MissingExtraError)
    no_memory = errors.import_error(ImportError("x.so: cannot allocate memory in static TLS block"), "x", "edge")
    broken = errors.import_error(ImportError("libgomp.so.1: cannot open shared object file"), "x", "edge")
    assert [no_memory.exit_code, broken.exit_code] == [3, 1]
    assert "not installed" not in f"{no_memory} {broken}"
