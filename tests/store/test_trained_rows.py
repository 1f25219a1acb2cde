import hashlib
import json

import numpy as np
import pytest

from offramp.errors import DamagedError, StoreError, VersionError
from offramp.store.trained_rows import FILE_NAME, TrainedRows, parse_trained_rows, read_trained_rows
from tests.store.small import flip, reseal, tree_of, write_small

ROWS = TrainedRows("0f" * 16, ("numbers", "word"), np.array([0, 3, 2**64 - 1], np.uint64))


def test_what_is_written_is_read():
    found = parse_trained_rows(ROWS.to_bytes(), "here")
    assert (found.salt, found.arguments) == (ROWS.salt, ROWS.arguments)
    assert found.digests_N.tolist() == ROWS.digests_N.tolist()
    assert found.to_bytes() == ROWS.to_bytes()
    assert found.among(np.array([3, 4, 2**64 - 1], np.uint64)).tolist() == [True, False, True]
    assert found.among(np.array([], np.uint64)).tolist() == []


def test_a_folder_may_have_none(tmp_path):
    assert read_trained_rows(tmp_path) is None
    (tmp_path / FILE_NAME).write_bytes(ROWS.to_bytes())
    found = read_trained_rows(tmp_path)
    assert found is not None and found.digests_N.tolist() == ROWS.digests_N.tolist()


def test_a_store_keeps_a_file_of_its_manifest_and_verifies_it(tmp_path):
    store = write_small(tmp_path / "store")
    data, tree = ROWS.to_bytes(), tree_of(store)
    (store / FILE_NAME).write_bytes(data)
    assert read_trained_rows(store) is None, "a file that is not of the store"
    tree["files"].append({"file": FILE_NAME, "bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()})
    reseal(store, tree)
    found = read_trained_rows(store)
    assert found is not None and found.to_bytes() == data
    flip(store / FILE_NAME, 800)
    with pytest.raises(DamagedError):
        read_trained_rows(store)


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"format": 2}, VersionError),
        ({"format": None}, StoreError),
        ({"salt": "short"}, StoreError),
        ({"arguments": "x"}, StoreError),
        ({"arguments": [1]}, StoreError),
        ({"digests": "AAAA"}, StoreError),
        ({"digests": "no base64"}, StoreError),
        ({"digests": 7}, StoreError),
        ({"more": 1}, StoreError),
    ],
)
def test_other_contents_are_refused(changes, error):
    tree = {**json.loads(ROWS.to_bytes()), **changes}
    with pytest.raises(error, match="remove the file"):
        parse_trained_rows(json.dumps({k: v for k, v in tree.items() if v is not None}).encode(), "here")
    for data in (b"", b"[]", b"\xff", b"[" * 10**5):
        with pytest.raises(StoreError):
            parse_trained_rows(data, "here")
