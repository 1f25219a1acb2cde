"""GLUE as the hub has it, from a folder of the same layout: this place has no hub."""

import re
import sys

import pytest

from offramp.errors import MissingExtraError, SourceError, UsageError
from offramp.tasks.glue import TASKS, load_files, load_hub, task_of

pytest.importorskip("datasets")
pa = pytest.importorskip("pyarrow")
from pyarrow import parquet  # noqa: E402

PLACES = {"train": "train", "dev": "validation", "dev_matched": "validation_matched"}
PLACES["dev_mismatched"] = "validation_mismatched"


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()
    yield
    datasets.enable_progress_bars()


def table(task, split, num_rows):
    rows = []
    for number in range(num_rows):
        texts = {name: f"{name} {split} {number}" for name in task.texts[0]}
        label = number / 10 if not task.labels else number % len(task.labels)
        rows.append({**texts, "label": label, "idx": number})
    return pa.Table.from_pylist(rows)


def write(folder, name, num_train=60):
    """A data set card that names the files of one configuration, and the files."""
    task = task_of(name)
    lines = ["---", "configs:", f"- config_name: {name}", "  data_files:"]
    (folder / name).mkdir(parents=True)
    for split in ("train", *task.dev_splits):
        file = f"{name}/{PLACES[split]}-00000-of-00001.parquet"
        parquet.write_table(table(task, split, num_train if split == "train" else 20), folder / file)
        lines += [f"  - split: {PLACES[split]}", f"    path: {file}"]
    (folder / "README.md").write_text("\n".join([*lines, "---", ""]))
    return str(folder)


@pytest.mark.parametrize("name", TASKS)
def test_every_task_loads(name, tmp_path):
    task = task_of(name)
    found = load_hub(task, repository=write(tmp_path / "glue", name))
    assert set(found.examples) == {"train", "tune", "certify", *task.dev_splits}
    assert sum(len(found.examples[split]) for split in ("train", "tune", "certify")) == 60
    assert all(len(found.examples[split]) == 20 for split in task.dev_splits)
    assert (found.labels, found.metrics, found.partial) == (task.labels, task.metrics, ())


def test_the_hub_and_files_are_cut_alike(tmp_path):
    repository = write(tmp_path / "glue", "rte")
    folder = tmp_path / "plain" / "rte"
    folder.mkdir(parents=True)
    for split in ("train", "dev"):
        rows = table(task_of("rte"), split, 60 if split == "train" else 20).to_pylist()
        lines = [
            "sentence1\tsentence2\tlabel",
            *("\t".join(str(row[key]) for key in ("sentence1", "sentence2", "label")) for row in rows),
        ]
        (folder / f"{split}.tsv").write_text("\n".join(lines) + "\n")
    assert load_hub(task_of("rte"), 5, repository=repository) == load_files(task_of("rte"), tmp_path / "plain", 5)


def test_a_download_that_fails_says_what_to_do(monkeypatch):
    import datasets

    def fail(*args, **options):
        assert options["download_config"].local_files_only
        assert re.fullmatch("[0-9a-f]{40}", options["revision"])
        raise ConnectionError("connection reset")

    monkeypatch.setattr(datasets, "load_dataset", fail)
    match = (
        r"rte cannot be loaded \(ConnectionError: connection reset\) - nyu-mll/glue - check the network and run again"
    )
    with pytest.raises(SourceError, match=match):
        load_hub(task_of("rte"), offline=True)


def test_a_repository_of_another_layout_is_refused(tmp_path):
    repository = write(tmp_path / "glue", "rte")
    (tmp_path / "glue" / "README.md").write_text(
        "---\nconfigs:\n- config_name: rte\n  data_files:\n  - split: train\n    path: rte/train-*.parquet\n---\n"
    )
    with pytest.raises(SourceError, match="no split 'validation', found train"):
        load_hub(task_of("rte"), repository=repository)
    wrong = pa.Table.from_pylist([{"text": "a", "label": 0}])
    parquet.write_table(wrong, tmp_path / "glue" / "rte" / "train-00000-of-00001.parquet")
    with pytest.raises((UsageError, SourceError)):
        load_hub(task_of("rte"), repository=repository)


def test_without_the_library_it_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(MissingExtraError, match=r"datasets is not installed - pip install 'offramp\[data\]'"):
        load_hub(task_of("rte"))
