"""The job `stream`: a sweep divides model folders by a run, streams them, and its records make a page."""

from pathlib import Path

import pytest
import torch
import transformers as hf
from safetensors.torch import save_file

from offramp.errors import UsageError
from offramp.experiments import Grid, bitwise, experiment, sweep
from offramp.experiments.prerequisites import Source, needs_of
from offramp.experiments.report import page_of
from offramp.experiments.results import read_results
from offramp.experiments.specification import INPUTS
from offramp.experiments.steps import take_step
from offramp.experiments.sweep import SweepSettings
from offramp.reporting.html_page import to_html
from offramp.reporting.pages import page_from
from offramp.reporting.tables import NONE

TEMPLATE = Path(__file__).parents[2] / "recipes/any_model.md.jinja"
SHAPE = {"vocab_size": 50, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 16}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A folder of one model that is named, and of one whose inputs have another name."""
    folder = tmp_path_factory.mktemp("models")
    torch.manual_seed(0)
    model = hf.GPT2LMHeadModel(hf.GPT2Config(**SHAPE))
    for name, given in (("good", "input_ids"), ("wrong", "words")):
        model.save_pretrained(folder / "decoder" / name)
        save_file({given: torch.arange(12).reshape(2, 6)}, folder / "decoder" / name / INPUTS)
    return folder


def test_records_of_a_sweep_make_the_page_of_any_model(models, in_process, tmp_path):
    grid = Grid(job="stream", model=[f"{models}/decoder/{name}" for name in ("wrong", "good")], rounds=1)
    sweep.sweep(list(grid), tmp_path / "out", SweepSettings(), print, lambda *what: None)
    wrong, good = read_results(tmp_path / "out", print)
    assert "does not take the example inputs" in wrong["reason"]["what"]
    assert good["run"]["smallest"]["equal"] == good["run"]["twice"]["equal"] == [True, True]
    assert good["figures"]["peak_share"] <= 1 and good["figures"]["budget_share"] < 1 and good["run"]["fault"] is None
    report = page_of({"out": [wrong, good]}, "Title")
    (streams,) = [each for each in report.tables if each.name.startswith("streams")]
    heads = [column.title for column in streams.columns]
    failed, row = sorted(
        (dict(zip(heads, each.cells, strict=True)) for each in streams.rows), key=lambda x: x["rounds"].text
    )
    assert (row["model"].text, row["identical"].text, row["failure"].text) == ("good", "yes", NONE)
    assert row["peak of weights"].value <= 100 and row["smallest budget"].value < 100
    assert row["× module latency"].value > 0 and row["× module latency"].text.endswith("×")
    assert failed["identical"].text == NONE and "does not take the example inputs" in failed["failure"].text
    assert "× module latency" in to_html(report) and not any(each.name.startswith("results") for each in report.tables)
    page = page_from(TEMPLATE, [wrong, good])
    assert "| 1 of 2: 50.0 % | **missed** |" in page and "| decoder | 2 | 1 | 1.00x |" in page
    assert "- wrong: a GPT2LMHeadModel does not take the example inputs" in page and "accelerate" not in page


def test_a_page_is_made_where_every_model_failed(models, in_process, tmp_path):
    grid = Grid(job="stream", model=f"{models}/decoder/wrong", rounds=1)
    sweep.sweep(list(grid), tmp_path / "out", SweepSettings(), print, lambda *what: None)
    assert "| decoder | 1 | 0 | – | – | – |" in page_from(TEMPLATE, read_results(tmp_path / "out", print))


def test_an_answer_that_differs_and_a_stream_that_fails_are_results(models, monkeypatch):
    folder = str(models / "decoder/good")
    step = {"kind": "stream", "model": folder, "experiment": experiment(model=folder, job="stream").to_json()}
    monkeypatch.setattr(bitwise, "are_equal", lambda found, wanted: False)
    found = take_step(step, print)
    assert found["run"]["fault"] == "answers differ by 0.0 and 0.0"
    record = {"experiment": step["experiment"], **found}
    (table,) = [each for each in page_of({"out": [record]}, "Title").tables if each.name.startswith("streams")]
    assert "no: answers differ by 0.0 and 0.0" in [cell.text for cell in table.rows[0].cells]

    def broken(*what, **options):
        raise ValueError("no stream")

    monkeypatch.setattr(bitwise, "stream", broken)
    found = take_step(step, print)
    assert found["run"]["fault"] == "ValueError: no stream" and "peak_share" not in found["figures"]


@pytest.mark.parametrize(
    "options", [{"batch": 8}, {"exit": "stage:1"}, {"dtype": "int8"}, {"loss": "last", "train": "x"}]
)
def test_options_without_effect_are_refused(options, tmp_path):
    each = experiment(model="m", job="stream", threads=1, rounds=2, timeout="1s", **options)
    with pytest.raises(UsageError, match=f"the job stream has no option .*{next(iter(options))}"):
        needs_of(each, Source("m", "digest", False), None, tmp_path)


def test_other_inputs_make_another_experiment(models):
    each = experiment(model=f"{models}/decoder/good", job="stream")
    before = sweep.files_of(each)
    path = models / "decoder/good" / INPUTS
    save_file({"input_ids": torch.arange(10).reshape(2, 5)}, path)
    assert list(before) == [str(path)] and sweep.files_of(each) != before


def test_a_store_is_refused(tmp_path):
    with pytest.raises(UsageError, match="this is a store"):
        needs_of(experiment(model="m", job="stream"), Source("m", "digest", True), None, tmp_path)
