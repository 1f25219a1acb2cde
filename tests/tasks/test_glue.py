import zipfile
from pathlib import Path

import pytest

from offramp.errors import UsageError
from offramp.tasks.examples import Example
from offramp.tasks.glue import TASKS, load_files, task_of

DATA = Path(__file__).parents[2].parent / "shared" / "data" / "glue"
"""Beside the checkout where it lies there; figures of its rows are in its README."""
NUM_ROWS = {
    "cola": 9594,
    "sst2": 68221,
    "mrpc": 4076,
    "rte": 2767,
    "stsb": 7249,
    "qnli": 5463,
    "qqp": 23497,
    "mnli": 10815,
}
PARTIAL = {"qnli", "qqp", "mnli"}
ORIGINAL = {
    "cola": ("", "gj04\t{label}\t\tA sentence {i}.", "01"),
    "sst2": ("sentence\tlabel", "a film {i}\t{label}", "01"),
    "mrpc": ("Quality\t#1 ID\t#2 ID\t#1 String\t#2 String", '{label}\t1\t2\tone "{i}\ttwo {i}', "01"),
    "qqp": ("id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate", "{i}\t1\t2\twhy {i}?\thow {i}?\t{label}", "01"),
    "stsb": ("index\tgenre\tsentence1\tsentence2\tscore", "{i}\tx\tone {i}\ttwo {i}\t{label}", ("0.0", "4.75")),
    "mnli": ("index\tsentence1\tsentence2\tgold_label", "{i}\tone {i}\ttwo {i}\t{label}", ("neutral", "contradiction")),
    "qnli": ("index\tquestion\tsentence\tlabel", "{i}\twhy {i}?\tso {i}\t{label}", ("entailment", "not_entailment")),
    "rte": ("index\tsentence1\tsentence2\tlabel", "{i}\tone {i}\ttwo {i}\t{label}", ("entailment", "not_entailment")),
    "wnli": ("index\tsentence1\tsentence2\tlabel", "{i}\tone {i}\ttwo {i}\t{label}", "01"),
}


def write_original(folder, name, num_rows=60, extra=""):
    task = TASKS[name]
    header, line, labels = ORIGINAL[name]
    folder.mkdir(parents=True)
    for part in ("train", *task.dev_splits):
        lines = [line.format(i=f"{part} {i}", label=labels[i % len(labels)]) for i in range(num_rows)]
        (folder / f"{part}.tsv").write_text("\n".join([*([header] if header else []), *lines, extra]) + "\n")


@pytest.mark.parametrize("name", TASKS)
def test_original_folders_and_zips_load(tmp_path, name):
    task = task_of(name)
    write_original(tmp_path / "all" / task.folder, name)
    found = load_files(task, tmp_path / "all")
    assert found.partial == ()
    assert list(found.examples) == ["train", "tune", "certify", *task.dev_splits]
    assert sum(len(found.examples[split]) for split in ("train", "tune", "certify")) == 60
    for split in task.dev_splits:
        assert len(found.examples[split]) == 60
    labels = {example.label for examples in found.examples.values() for example in examples}
    assert labels == ({0.0, 4.75} if name == "stsb" else {1, 2} if name == "mnli" else {0, 1})
    assert {type(example.text) for example in found.examples["train"]} == {str if len(task.texts[0]) == 1 else tuple}
    with zipfile.ZipFile(tmp_path / f"{task.folder}.zip", "w") as archive:
        for path in sorted((tmp_path / "all" / task.folder).iterdir()):
            archive.write(path, f"{task.folder}/{path.name}")
    assert load_files(task, tmp_path) == found
    assert load_files(task, tmp_path / "all" / task.folder) == found


def test_a_single_file_is_cut_and_said_to_be_partial(tmp_path):
    write_original(tmp_path / "QNLI", "qnli", num_rows=200)
    (tmp_path / "QNLI" / "train.tsv").unlink()
    found = load_files(TASKS["qnli"], tmp_path)
    assert found.partial == ("there is no train file",)
    assert sum(map(len, found.examples.values())) == 200
    assert {len(found.examples[name]) > 0 for name in ("train", "tune", "certify", "dev")} == {True}


def test_torn_lines_are_passed_over_only_where_the_official_file_has_them(tmp_path):
    write_original(tmp_path / "QQP", "qqp", extra="7\ttorn")
    said = []
    assert len(load_files(TASKS["qqp"], tmp_path, log=said.append).examples["dev"]) == 60
    assert "rows with too few fields were skipped: 2 (" in "".join(said)
    write_original(tmp_path / "RTE", "rte", extra="7\ttorn")
    with pytest.raises(UsageError, match=r"2 fields, 4 are expected - .*RTE/train.tsv:62"):
        load_files(TASKS["rte"], tmp_path)


def test_bad_input_is_named(tmp_path):
    with pytest.raises(UsageError, match=r"unknown task 'colla' - known are cola, sst2"):
        task_of("colla")
    with pytest.raises(UsageError, match=r"no train or dev table of cola - .* - give the folder that holds CoLA/"):
        load_files(TASKS["cola"], tmp_path)
    folder = tmp_path / "sst2"
    folder.mkdir()
    (folder / "train.tsv").write_text("sentence\tlabel\na\t2\n")
    with pytest.raises(UsageError, match=r"label '2' is none of negative, positive - .*train.tsv:2"):
        load_files(TASKS["sst2"], tmp_path)
    (folder / "train.tsv").write_text("text\tlabel\na\t1\n")
    with pytest.raises(UsageError, match="no column 'sentence', found 'text', 'label'"):
        load_files(TASKS["sst2"], tmp_path)
    (folder / "train.tsv").write_text("sentence\tlabel\n")
    with pytest.raises(UsageError, match="split train of sst2 is empty"):
        load_files(TASKS["sst2"], tmp_path)
    (tmp_path / "stsb").mkdir()
    (tmp_path / "stsb" / "train.tsv").write_text("sentence1\tsentence2\tscore\na\tb\tnan\n")
    with pytest.raises(UsageError, match="'nan' is not a finite number"):
        load_files(TASKS["stsb"], tmp_path)
    (tmp_path / "WNLI.zip").write_bytes(b"PK\3\4 torn")
    with pytest.raises(UsageError, match="not a whole zip"):
        load_files(TASKS["wnli"], tmp_path)


@pytest.mark.skipif(not DATA.is_dir(), reason="the data set does not lie beside the checkout")
@pytest.mark.parametrize("name", NUM_ROWS)
def test_the_data_set_beside_the_checkout_loads(name):
    found = load_files(TASKS[name], DATA)
    assert sum(map(len, found.examples.values())) == NUM_ROWS[name]
    assert bool(found.partial) == (name in PARTIAL)
    assert min(map(len, found.examples.values())) > 100
    assert all(
        isinstance(example, Example)
        for example in found.examples["dev_matched" if "dev_matched" in found.examples else "dev"]
    )


def test_a_damaged_zip_is_told(tmp_path):
    write_original(tmp_path / "RTE", "rte")
    with zipfile.ZipFile(tmp_path / "RTE.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        for path in (tmp_path / "RTE").glob("*.tsv"):
            archive.write(path, f"RTE/{path.name}")
    data = bytearray((tmp_path / "RTE.zip").read_bytes())
    for position in range(60, 90):
        data[position] ^= 0xFF
    (tmp_path / "alone").mkdir()
    (tmp_path / "alone" / "RTE.zip").write_bytes(data)
    with pytest.raises(UsageError, match=r"table cannot be read \(.*\) - .*RTE.zip/RTE/\w+.tsv - get the data again"):
        load_files(TASKS["rte"], tmp_path / "alone")
