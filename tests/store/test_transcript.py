import dataclasses
import json
import resource
from contextlib import contextmanager

import numpy as np
import pytest
from safetensors.numpy import load_file

from offramp.errors import DamagedError, DiskFullError, StoreError, UsageError, VersionError
from offramp.store.transcript import About, TranscriptWriter, read_transcript

ABOUT = About("rte", "dev", "single_label_classification", ("no", "yes"), ("accuracy",), "f" * 64, "d" * 64, 128)
NUM_ROWS, NUM_EXITS, HIDDEN = 11, 3, 4


def arrays(seed=0, num_rows=NUM_ROWS):
    rng = np.random.default_rng(seed)
    return {
        "logits": rng.standard_normal((num_rows, NUM_EXITS, 2)).astype(np.float32),
        "lengths": rng.integers(3, 60, num_rows),
        "labels": rng.integers(0, 2, num_rows),
        "features": rng.standard_normal((num_rows, NUM_EXITS, HIDDEN)).astype(np.float32),
    }


def write(folder, given, about=ABOUT, window=4):
    sizes = (len(given["labels"]), NUM_EXITS, given["logits"].shape[2], HIDDEN if "features" in given else 0)
    with TranscriptWriter(folder, about, *sizes) as writer:
        for start in range(0, sizes[0], window):
            writer.write(start, **{name: array[start : start + window] for name, array in given.items()})
        return writer.finish()


@pytest.mark.parametrize("window", [1, 4, 11])
def test_what_is_written_is_read(tmp_path, window):
    given = arrays()
    write(tmp_path / "deep" / "t", given, window=window)
    found = read_transcript(tmp_path / "deep" / "t", "dev")
    assert found.about == ABOUT
    np.testing.assert_array_equal(found.logits_NKC, given["logits"])
    np.testing.assert_array_equal(found.lengths_N, given["lengths"])
    np.testing.assert_array_equal(found.labels_N, given["labels"])
    np.testing.assert_array_equal(found.features(2, 9), given["features"][2:9])
    with pytest.raises(ValueError, match="has no features for rows 5 to 12"):
        found.features(5, 12)
    assert sorted(path.name for path in (tmp_path / "deep" / "t").iterdir()) == ["dev.json", "dev.safetensors"]


def test_digests_of_rows_are_kept(tmp_path):
    about = dataclasses.replace(ABOUT, row_salt="ab" * 16, training_rows=3, includes_training_rows=True)
    digests_N = np.arange(NUM_ROWS, dtype=np.uint64) * np.uint64(2**60) + np.uint64(1)
    write(tmp_path, {**arrays(), "rows": digests_N}, about)
    found = read_transcript(tmp_path, "dev")
    assert found.about == about and found.rows_N is not None
    np.testing.assert_array_equal(found.rows_N, digests_N)
    np.testing.assert_array_equal(load_file(tmp_path / "dev.safetensors")["rows"], digests_N)
    np.testing.assert_array_equal(found.features(2, 9), arrays()["features"][2:9])


def test_a_transcript_of_format_1_has_none(tmp_path):
    write(tmp_path, arrays())
    edit(format=1, row_salt=None, training_rows=None, includes_training_rows=None)(tmp_path)
    found = read_transcript(tmp_path, "dev")
    assert (found.about, found.rows_N) == (ABOUT, None)
    assert found.about.training_rows is None and not found.about.includes_training_rows


def test_safetensors_reads_the_same(tmp_path):
    given = arrays()
    write(tmp_path, given)
    found = load_file(tmp_path / "dev.safetensors")
    assert set(found) == set(given)
    for name, array in given.items():
        np.testing.assert_array_equal(found[name], array)


def test_equal_contents_give_equal_bytes(tmp_path):
    for name, window in (("a", 3), ("b", 7)):
        write(tmp_path / name, arrays(), window=window)
    for name in ("dev.json", "dev.safetensors"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_values_of_a_regression_without_features(tmp_path):
    about = dataclasses.replace(ABOUT, split="tune", problem="regression", labels=())
    given = arrays()
    del given["features"]
    given = {**given, "logits": given["logits"][:, :, :1], "labels": np.linspace(0, 5, NUM_ROWS).astype(np.float32)}
    write(tmp_path, given, about)
    found = read_transcript(tmp_path, "tune")
    np.testing.assert_array_equal(found.labels_N, given["labels"])
    with pytest.raises(ValueError, match="the transcript has no features"):
        found.features(0, 1)


def test_an_existing_one_is_refused_and_kept(tmp_path):
    write(tmp_path, arrays())
    before = (tmp_path / "dev.safetensors").read_bytes()
    with pytest.raises(UsageError, match=r"target exists - .*dev.safetensors - choose another folder"):
        write(tmp_path, arrays(1))
    assert (tmp_path / "dev.safetensors").read_bytes() == before


def test_a_place_where_no_folder_can_be_is_refused(tmp_path):
    (tmp_path / "file").touch()
    for folder in (tmp_path / "file", tmp_path / "file" / "t"):
        with pytest.raises(UsageError, match=r"a transcript cannot be written there .* - choose another folder"):
            write(folder, arrays())


def test_an_interruption_leaves_nothing(tmp_path):
    with pytest.raises(KeyboardInterrupt), TranscriptWriter(tmp_path, ABOUT, NUM_ROWS, NUM_EXITS, 2) as writer:
        writer.write(0, **{name: arrays()[name][:2] for name in ("logits", "lengths", "labels")})
        raise KeyboardInterrupt
    assert not list(tmp_path.iterdir())


def test_rows_that_do_not_fit_are_a_fault_of_the_caller(tmp_path):
    with TranscriptWriter(tmp_path, ABOUT, NUM_ROWS, NUM_EXITS, 2, HIDDEN) as writer:
        with pytest.raises(ValueError, match=r"arrays must be .* got"):
            writer.write(0, logits=arrays()["logits"])
        with pytest.raises(ValueError, match="does not fit"):
            writer.write(1, **arrays())
        writer.write(0, **arrays(num_rows=5))
        with pytest.raises(ValueError, match="6 rows were not written"):
            writer.finish()
    assert not list(tmp_path.iterdir())


@contextmanager
def small_files():
    """For the call alone: pytest writes to a file as well, perhaps."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (5000, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk_is_told(tmp_path):
    with pytest.raises(DiskFullError), small_files():
        write(tmp_path, arrays(num_rows=100), window=100)
    assert not list(tmp_path.iterdir())


def damage_bytes(folder):
    data = bytearray((folder / "dev.safetensors").read_bytes())
    data[-3] ^= 1
    (folder / "dev.safetensors").write_bytes(data)


def cut_file(folder):
    (folder / "dev.safetensors").write_bytes((folder / "dev.safetensors").read_bytes()[:-1])


def edit(**changes):
    def apply(folder):
        tree = {**json.loads((folder / "dev.json").read_text()), **changes}
        kept = {name: value for name, value in tree.items() if changes.get(name, "kept") is not None}
        (folder / "dev.json").write_text(json.dumps(kept))

    return apply


def link(folder):
    (folder / "dev.safetensors").rename(folder / "elsewhere")
    (folder / "dev.safetensors").symlink_to(folder / "elsewhere")


@pytest.mark.parametrize(
    ("harm", "error", "match"),
    [
        (damage_bytes, StoreError, "sha256 differs"),
        (cut_file, DamagedError, "from the manifest"),
        (edit(format=3), VersionError, "transcript of format 3, supported are 1 and 2"),
        (edit(row_salt="ab"), StoreError, "tensor 'rows' is missing"),
        (edit(row_salt=None), StoreError, "not a description of a transcript"),
        (edit(task=None), StoreError, "not a description of a transcript"),
        (edit(file=[]), StoreError, "not a description of a transcript"),
        (lambda folder: (folder / "dev.json").write_bytes(b"\xff{"), StoreError, "not a description of a transcript"),
        (lambda folder: (folder / "dev.json").unlink(), DamagedError, "file is missing"),
        (lambda folder: (folder / "dev.safetensors").unlink(), DamagedError, "file is missing"),
        (link, DamagedError, "links or devices"),
    ],
)
def test_damage_is_told(tmp_path, harm, error, match):
    write(tmp_path, arrays())
    harm(tmp_path)
    with pytest.raises(error, match=match) as caught:
        read_transcript(tmp_path, "dev")
    assert error is not DamagedError or caught.value.remedy.endswith("offramp eval --transcript"), "it is no store"


def test_a_split_that_is_not_there_is_named(tmp_path):
    for folder in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(UsageError, match=r"no transcript of split dev - .* - create one: offramp eval --split dev"):
            read_transcript(folder, "dev")


def test_the_transcript_of_another_split_is_refused(tmp_path):
    """A policy would be certified on the rows that it was chosen by."""
    write(tmp_path, arrays())
    for path in [*tmp_path.iterdir()]:
        path.rename(path.with_name(path.name.replace("dev", "certify")))
    with pytest.raises(StoreError, match="this is the transcript of split dev, not of certify"):
        read_transcript(tmp_path, "certify")


def test_many_rows_take_the_memory_of_a_window(tmp_path):
    """300,000 rows of 12 exits with features would be 11 GB; what was never written is a hole in the file."""
    with TranscriptWriter(tmp_path, ABOUT, 300_000, 12, 3, 768) as writer:
        window = {
            "logits": np.ones((512, 12, 3), np.float32),
            "lengths": np.ones(512, np.int32),
            "labels": np.ones(512, np.int64),
            "features": np.ones((512, 12, 768), np.float32),
        }
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        for start in (0, 150_000, 299_488):
            writer.write(start, **window)
        assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 64 << 10
