"""Reports of records: what their tables say, which pictures they have, and that equal records give equal reports."""

import csv
import functools
import json
import random
import shlex
import shutil
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from offramp.cli import main
from offramp.errors import RefusedError, UsageError
from offramp.experiments import experiment, patience
from offramp.experiments.comparison import FIGURES, paired
from offramp.experiments.grid import read_recipe
from offramp.experiments.report import _named_apart, page_of
from offramp.experiments.report_pictures import classes
from offramp.experiments.results import RECORDS, Results, line_of, read_results
from offramp.experiments.subjects import Group, Subject, best, compared
from offramp.reporting.forms import WRITE_PAGE
from offramp.reporting.html_page import to_html
from offramp.reporting.pictures import Picture
from offramp.reporting.tables import NONE, Section, comma_separated
from tests.checks.browser import look
from tests.experiments.studies import ENVIRONMENT, EXITS, MIB, record, study

HOSTILE = "<script>alert(1)</script>\"' onload=x {{ 7*7 }} | \\ ]]>"

PUBLISHED = Path(__file__).parents[2] / "docs" / "results" / "records" / "main-job"


@pytest.fixture(scope="module")
def records():
    """A small study: one task, two models, two exits, two budgets and resident."""
    return study(5, rows=60, task=["sst2"], exit=["none", "patience:1"])


def page(records, **options):
    return page_of({"results": records}, "Title", **options)


def table(found, name="results-1"):
    return next(each for each in found.tables if each.name == name)


def cells(found, **options):
    """The cells of the row with these options, by heading."""
    heads = [column.title for column in found.columns]
    rows = [dict(zip(heads, row.cells, strict=True)) for row in found.rows]
    (row,) = [each for each in rows if all(each[name].text == value for name, value in options.items())]
    return row


def test_rows_have_figures_with_intervals_and_paired_ratios(records):
    row = cells(table(page(records)), model="bert", exit="patience:1", budget="96MiB")
    for name in ("score", "latency", "peak memory"):
        assert row[name].low <= row[name].value <= row[name].high and row[name].detail
    assert row["× latency"].low <= row["× latency"].value <= row["× latency"].high
    assert row["points"].text[0] in "+-" and row["rounds"].text == "5" and sum(row["latency"].bins) > 250
    assert not any("`" in note for each in page(records).tables for note in each.notes), "pages show it as it is"


def test_the_table_as_csv_has_the_effects_that_can_be_detected(records):
    lines = csv.DictReader(comma_separated(table(page(records))).splitlines())
    (line,) = [
        each for each in lines if (each["model"], each["exit"], each["budget"]) == ("runs/bert", "none", str(96 * MIB))
    ]
    sides = [[each for each in records if _is_of_bert(each, budget)] for budget in ("resident", 96 * MIB)]
    found = paired(FIGURES["latency"], *sides)
    assert float(line["× latency detectable"]) == found.detectable and 0 < found.detectable < 1
    assert not any("detectable" in name for name in line if "×" not in name and "points" not in name)


def _is_of_bert(record, budget):
    each = record["experiment"]
    return (each["model"], each["engine"]["exit"], each["engine"]["budget"]) == ("runs/bert", "none", budget)


def test_the_versions_of_rivals_are_in_the_environment():
    about = {"model": ["m"], "task": ["sst2"], "rows": 20, "exit": ["none"]}
    assert _environment(study(1, budget=["resident"], **about))["rival versions"] == NONE
    found = study(2, budget=["resident"], **about)
    for name, versions in (("transformers", {"torch": "2.13.0", "accelerate": "1.15.0"}), ("ctranslate2", {"c": "4"})):
        rounds = study(2, budget=[None], rival=[name], **about)
        found += [{**each, "run": {"rival": name, "versions": versions}} for each in rounds]
    shown = "ctranslate2: c 4; transformers: accelerate 1.15.0, torch 2.13.0"
    assert _environment(found)["rival versions"] == shown
    assert shown in to_html(page(found))


def _environment(records):
    return {row.cells[0].text: row.cells[1].text for row in table(page(records), "environment").rows}


def test_the_baseline_is_the_resident_one_without_exits_and_comes_first(records):
    found = table(page(records))
    first = found.rows[0]
    assert first.kind == "baseline" and [cell.text for cell in first.cells[:3]] == ["bert", "resident", "none"]
    assert [cell.text for cell in first.cells].count(NONE) == 3
    assert found.notes[0].startswith(
        "Baseline of each model: bert, resident, exit none; distilbert, resident, exit none. "
    )
    chosen = table(page(records, baseline=["model=runs/distilbert", "budget=96MiB"])).rows[0]
    assert [cell.text for cell in chosen.cells[:2]] == ["distilbert", "96MiB"]
    for wrong in (["model=x"], ["modell=x"]):
        with pytest.raises(UsageError, match="--baseline"):
            page(records, baseline=wrong)


def test_stores_of_one_source_have_one_baseline_that_is_not_rounded():
    """The question int8 against fp32: as two stores, or as two values of dtype."""
    of = {"task": ["sst2"], "exit": ["none"], "budget": ["resident"], "rows": 60}
    stores = study(3, model=["runs/a-int8", "runs/b-fp32"], **of)
    for each in stores:
        precision = each["experiment"]["model"].rpartition("-")[2]
        each["inputs"] = {**each["inputs"], "source": "s" * 64, "precision": precision}
    narrow = study(3, model=["runs/a"], dtype=["fp16", "fp32", "int8"], **of)
    for found, first in ((stores, "b-fp32"), (narrow, "fp32")):
        rows = table(page(found)).rows
        assert [row.cells[0].text for row in rows if row.kind == "baseline"] == [first]
        assert [cells(table(page(found)), **{heading: first})["× memory"].text == NONE for heading in ("model", "dtype")
                if heading in [column.title for column in table(page(found)).columns]] == [True]  # fmt: skip
    for each in stores:
        each["inputs"] = {**each["inputs"], "source": 7}
    assert sum(row.kind == "baseline" for row in table(page(stores)).rows) == 2, "of an unknown source"


def test_each_model_is_compared_with_its_own_baseline(records):
    found = table(page(records))
    heads = [column.title for column in found.columns]
    assert [row.cells[0].text for row in found.rows if row.kind == "baseline"] == ["bert", "distilbert"]
    alone = table(page([each for each in records if each["experiment"]["model"] == "runs/distilbert"]))
    mine = [row for row in found.rows if row.cells[0].text == "distilbert"]
    for name in ("points", "× latency", "× memory"):
        here = [row.cells[heads.index(name)] for row in mine]
        assert here == [row.cells[[column.title for column in alone.columns].index(name)] for row in alone.rows]
    one = table(page(records, baseline=["model=runs/bert", "exit=none", "budget=resident"]))
    assert [row.kind for row in one.rows].count("baseline") == 1, "a chosen model is that of all"
    assert not any(row.cells[heads.index("× latency")].text == NONE for row in one.rows[1:])


def test_the_best_is_bold_only_where_it_is_significantly_best():
    found = study(6, rows=60, model=["runs/bert"], task=["sst2"], exit=["none", "patience:1"], budget=["resident"])
    assert sum(row.cells[3].is_best for row in table(page(found)).rows) == 1, "one exit after a third of the layers"
    few = [each for each in found if each["round"] <= 3]
    assert not any(cell.is_best for row in table(page(few)).rows for cell in row.cells), "three rounds have no interval"


def test_bounds_are_never_bold_and_take_the_bold_of_none():
    about = {"model": ["runs/bert"], "task": ["sst2"], "budget": ["resident"]}
    found = study(6, rows=60, exit=["none", "patience:1", "oracle"], **about)
    rows = {row.name: row.cells[2:] for row in table(page(found)).rows}
    assert not any(cell.is_best for cell in rows["oracle"]) and any(cell.is_best for cell in rows["patience:1"])


def test_seeds_are_one_row_and_their_scores_a_mean():
    found = study(2, rows=40, model=["m"], task=["sst2"], exit=["none"], budget=["resident"], seed=[1, 2, 3])
    (row,) = table(page(found)).rows
    scores = {each["figures"]["score"] for each in found}
    assert row.cells[1].value == pytest.approx(sum(scores) / len(scores)) and len(scores) == 3
    assert row.cells[-1].text == "6" and "seeds 1, 2, 3" in row.facts


def test_a_model_and_the_models_of_its_seeds_are_rows_of_their_own(tmp_path, monkeypatch):
    about = {"model": ["m"], "task": ["sst2"], "rows": 20, "exit": ["none"], "budget": ["resident"]}
    found = study(5, seed=[None, 0, 7], **about)
    alone = table(page([each for each in found if each["experiment"]["seed"] is None])).rows[0]
    rows = {row.name: row for row in table(page(found)).rows}
    assert [row.cells[-1].text for row in rows.values()] == ["5", "10"] and list(rows) == ["seed none", "seed 0,7"]
    assert rows["seed none"].cells[1:] == alone.cells[1:], "records of seed 0 change nothing"
    assert not any("×" in cell.text for cell in rows["seed 0,7"].cells), "no seed is no pair of seed 0"
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "results", found)
    for row, seeds in zip(rows.values(), ({None}, {0, 7}), strict=True):
        assert {each.seed for each in measured_by(row)} == seeds


def records_of_seeds(values, num_rounds=5):
    """Records of two rules with a mean exit for each seed, which all rounds of a seed share."""
    about = {"model": ["m"], "task": ["sst2"], "rows": 20, "budget": ["96MiB"]}
    found = study(num_rounds, exit=list(values), seed=list(range(len(next(iter(values.values()))))), **about)
    for each in found:
        options = each["experiment"]
        depth = values[options["engine"]["exit"]][options["seed"]]
        figures = {"mean_exit": depth, "bytes": depth * MIB, "latency": depth * (1 + each["round"] / 1e3)}
        each.update(figures=figures, samples={"latencies": [figures["latency"]] * 20})
    return found


def test_rounds_of_a_seed_are_no_samples_of_their_own():
    """Three seeds have no interval and no bold, in however many rounds; five have the intervals of five values."""
    values = {"patience:1": [5.0, 5.5, 6.0], "patience:2": [5.1, 5.9, 6.1]}
    for row in table(page(records_of_seeds(values))).rows:
        assert not any(cell.detail or cell.is_best for cell in row.cells) and row.cells[-1].text == "15"
    values = {"patience:1": [5.0, 5.5, 6.0, 5.2, 5.4], "patience:2": [7.1, 7.9, 8.1, 7.0, 7.7]}
    once, often = (table(page(records_of_seeds(values, number))).rows for number in (1, 5))
    for few, many in zip(once, often, strict=True):
        depth = [cell for cell in many.cells if cell.text in ("5.40", "7.70")]
        assert depth and depth[0] in few.cells and depth[0].detail
    assert any(cell.is_best for row in often for cell in row.cells)


def test_the_best_of_many_is_corrected_for_their_number():
    """A lead that is significant over one other is not over five such."""
    ratios = (0.995, 1.005, 1.015, 1.025, 1.025, 1.035, 1.045, 1.055)  # p = 0.03

    def bold(num_others):
        subjects = [Subject(experiment(model="m", exit=f"patience:{n}"), "results") for n in range(1, num_others + 2)]
        for number, subject in enumerate(subjects):
            subject.records = [
                {"key": "k", "round": index, "experiment": {"seed": None}, "samples": {}, "inputs": {"data": ""},
                 "figures": {"latency": 1.0 if number == 0 else ratio}}
                for index, ratio in enumerate(ratios)
            ]  # fmt: skip
        return best(Group(subjects, "t"), FIGURES["latency"]) is not None

    assert [bold(number) for number in (1, 5)] == [True, False]


@pytest.mark.parametrize(("num_seeds", "num_rounds"), [(5, 2), (5, 5)])
def test_seeds_without_a_difference_are_rarely_called_different(num_seeds, num_rounds):
    """In 200 comparisons: 5 % by definition, 7 % for five samples. Rounds taken as samples gave 27 %."""
    generator, missed = np.random.default_rng(1), 0
    specifications = [experiment(model="m", exit=rule) for rule in ("patience:1", "patience:2")]
    for _ in range(200):
        sides = []
        for each in specifications:
            sides.append(Subject(each, "results"))
            depths = generator.normal(5, 0.3, num_seeds)
            sides[-1].records = [
                {"key": str(seed), "round": number, "experiment": {"seed": seed}, "samples": {}, "inputs": {"data": ""},
                 "figures": {"latency": depths[seed] * generator.normal(1, 0.01)}}
                for seed in range(num_seeds) for number in range(num_rounds)
            ]  # fmt: skip
        found = compared(FIGURES["latency"], *sides)
        missed += not found.low <= 1 <= found.high
    assert missed <= 20


def test_failures_are_rows_with_their_reason(records):
    specification = experiment(model="runs/bert", task="sst2", exit="none", budget="32MiB", rows=60)
    failed = [record(specification, number, HOSTILE) for number in (1, 2)]
    found = page([*records, *failed])
    row = cells(table(found), budget="32MiB")
    assert row["failure"].text == HOSTILE and row["latency"].text == NONE and row["rounds"].text == "0"
    failures = table(found, "failures").rows
    assert [cell.text for cell in failures[0].cells[1:]] == [
        "bert, 32MiB, exit none", HOSTILE, NONE, "give a larger budget", "2",
    ]  # fmt: skip
    only = page(failed)
    assert table(only).notes == ("No experiment of this table has figures.",) and not only.pictures
    assert all(write(only) for write in (to_html, *WRITE_PAGE.values()))


def test_a_failure_is_shown_with_its_machine_if_its_record_has_one(records):
    """Records of earlier releases have none."""
    old = record(experiment(model="runs/bert", task="sst2", budget="32MiB", rows=60), 1, "too little memory")
    new = {**old, "environment": {**ENVIRONMENT, "memory_limit_bytes": 128 * MIB}}
    assert "environment" not in [each.name for each in page([old]).tables]
    rows = {row.cells[0].text: row.cells[1].text for row in table(page([new]), "environment").rows}
    assert (rows["processor"], rows["memory limit"], rows["records"]) == ("AMD EPYC", "128.0 MiB", "1")
    assert "128.0 MiB" in to_html(page([new])) and to_html(page([old]))
    alike = table(page([*records, {**old, "environment": ENVIRONMENT}]), "environment")
    assert [column.title for column in alike.columns] == ["", "machine"]
    assert alike.rows[-3].cells[1].text == str(len(records) + 1)


def test_failures_of_earlier_inputs_are_not_those_of_a_row():
    each = experiment(model="m", task="sst2", exit="none", budget="96MiB", rows=20)
    later = [record(each, number) for number in (1, 2)]
    earlier = [{**record(each, number, "too little memory"), "key": "earlier"} for number in (1, 2)]
    found = page([*earlier, *later])
    assert table(found).columns[-1].title == "rounds" and "failures" not in [each.name for each in found.tables]
    (row,) = table(page([*later, *earlier])).rows
    assert row.kind == "failed" and row.cells[-1].text == "too little memory"


@pytest.mark.parametrize("what", ["data", "model"])
def test_rows_of_different_contents_are_not_compared_which_is_said(records, what):
    """A sweep was interrupted after a file had changed."""
    mixed = [
        {**each, "inputs": {**each["inputs"], what: "changed"}}
        if each["experiment"]["engine"]["exit"] != "none"
        else each
        for each in records
    ]
    found = table(page(mixed))
    for model in ("bert", "distilbert"):
        row = cells(found, model=model, exit="patience:1", budget="resident")
        assert row["score"].text != NONE == row["points"].text == row["× latency"].text
        assert cells(found, model=model, exit="none", budget="96MiB")["points"].text != NONE
    names = "data" if what == "data" else "runs/bert, runs/distilbert"
    assert found.notes[-1].startswith(f"The contents of {names} changed between measurements")
    assert len(table(page(records)).notes) == 1


def test_records_of_earlier_contents_and_several_machines_are_noted(records):
    each = experiment(model="m", task="sst2", exit="none", budget="96MiB", rows=20)
    earlier = [{**record(each, number), "key": "earlier"} for number in (1, 2, 3)]
    found = table(page([*earlier, record(each, 1)]))
    assert found.notes[-1].startswith("Left out: 3 records of other contents") and found.rows[0].cells[-1].text == "1"
    moved = [{**each, "environment": {**each["environment"], "cpu_model": "other"}} for each in records[:5]]
    assert table(page([*moved, *records[5:]])).notes[-1].startswith("Measured on 2 kinds of machine (see Environment)")


def test_a_template_gets_the_records_of_the_contents_that_were_measured_last(tmp_path, capsys):
    each = experiment(model="m", task="sst2", rows=20)
    with Results(tmp_path / "out", print) as found:
        for number in (1, 2):
            found.add({**record(each, number), "key": "earlier", "id": f"earlier.{number}"})
        found.add(record(each, 1))
    (tmp_path / "page.jinja").write_text("{{ rows | length }}")
    assert main(["report", str(tmp_path / "out"), "--template", str(tmp_path / "page.jinja")]) == 0
    said = capsys.readouterr()
    assert said.out.strip() == "1" and "2 records of other contents of a model, of data or of a file" in said.err


def test_each_seed_counts_once_in_a_difference_of_scores():
    """Also where rounds of one seed are missing."""
    found = [
        each
        for exit in ("none", "patience:1")
        for seed, rounds in ((1, 5), (2, 1))
        for each in study(rounds, rows=60, model=["m"], task=["sst2"], exit=[exit], budget=["resident"], seed=[seed])
    ]
    row = cells(table(page(found)), exit="patience:1")
    base = cells(table(page(found)), exit="none")
    assert row["points"].value == pytest.approx(row["score"].value - base["score"].value)


def test_figures_that_are_no_number_are_left_out(records):
    odd = [dict(each) for each in records]
    for each in odd[:5]:
        each["figures"] = {**each["figures"], "score": None, "bound": None}
    row = next(row for row in table(page(odd)).rows if row.cells[2].text == "none" and row.cells[1].text == "96MiB")
    assert row.cells[3].text == NONE and row.cells[5].text != NONE
    nothing = [{**each, "figures": {"score": None}, "samples": {}} for each in records]
    assert to_html(page(nothing))


def test_pictures_have_their_data(records):
    found = page(records).pictures
    titles = [picture.title.removeprefix("sst2, dev: ") for picture in found]
    assert titles == [
        "score and latency", "score and peak memory", "score and read per input", "peak memory and budget",
        "latency and budget, bert", "latency and budget, distilbert", "exits", "overthinking and damage by class",
    ]  # fmt: skip
    for picture in found:
        assert picture.svg.startswith("<svg") and len(picture.data.splitlines()) >= 3, picture.title
    assert len(found[0].data.splitlines()) == 1 + 12, "a row of data for each experiment"


def test_the_front_has_what_nothing_else_beats(records):
    data = [line.rsplit(",", 7) for line in page(records).pictures[0].data.splitlines()[1:]]
    points = [(float(row[1]), float(row[4]), row[-1] == "True") for row in data]
    for x, y, is_on_front in points:
        assert is_on_front != any(a <= x and b >= y and (a, b) != (x, y) for a, b, _ in points)


def test_rivals_are_points_of_their_own_and_not_on_the_front():
    about = {"model": ["m"], "task": ["sst2"], "rows": 40}
    own = study(5, exit=["none", "patience:1"], budget=["96MiB", "resident"], **about)
    rival = study(5, exit=["none"], budget=[None], rival=["transformers"], **about)
    found = page([*own, *rival])
    picture = found.pictures[0]
    assert "transformers" in picture.svg and picture.svg.count("<polygon") == 2, "a diamond, and its key"
    (line,) = [line for line in picture.data.splitlines() if "transformers" in line]
    assert line.endswith("False") and table(found).rows[0].name.startswith("offramp")


def test_options_of_a_training_that_change_together_are_one_column():
    about = {"model": ["m"], "task": ["sst2"], "rows": 20, "budget": ["resident"]}
    found = study(1, exit=["none"], loss=["pabee"], epochs=[4], learning_rate=[1e-3], **about)
    found += study(1, exit=["none"], loss=["last"], epochs=[5], learning_rate=[1e-4], **about)
    found += study(1, exit=["patience:1"], **about)
    heads = [column.title for column in table(page(found)).columns]
    assert heads[:3] == ["exit", "loss", "score"]
    assert [row.name for row in table(page(found)).rows][-1] == "patience:1", "without a training it has no loss"


def test_files_of_pictures_have_names_of_their_own():
    found = study(1, rows=4, traced=True, model=["m" * 60, "m" * 61], task=["sst2"], exit=["none"], budget=["96MiB"])
    names = [picture.name for picture in page(found).pictures]
    assert len(names) == len(set(names)) and any(name.endswith("-2") for name in names)
    same = Section("", pictures=tuple(Picture(name, name, "", "") for name in ("x", "x", "x-2", "x")))
    (found,) = _named_apart([same])
    assert [picture.name for picture in found.pictures] == ["x", "x-2", "x-2-2", "x-3"]


def test_classes_are_compared_with_the_last_exit_on_the_same_rows():
    about = {"model": ["runs/bert"], "task": ["sst2"], "budget": ["resident"]}
    records = study(1, rows=300, exit=["none", "patience:1"], **about)
    found = table(page(records), "classes-1")
    by_name = {(row.cells[0].text, row.cells[1].text): row.cells for row in found.rows}
    early, full = (next(each for each in records if each["experiment"]["engine"]["exit"] == rule)["samples"]
                   for rule in ("patience:1", "none"))  # fmt: skip
    rows = list(zip(early["truth"], early["answers"], full["answers"], strict=True))
    assert any(truth not in (answer, last) for truth, answer, last in rows), "both exits are wrong for some"
    for label, name in enumerate(("negative", "positive")):
        mine = [row for row in rows if row[0] == label]
        overthought = sum(truth == answer != last for truth, answer, last in mine)
        damaged = sum(truth != answer and truth == last for truth, answer, last in mine)
        cells = by_name["patience:1", name]
        assert cells[2].text == str(len(mine)) and overthought + damaged
        assert [cell.value for cell in cells[3:]] == pytest.approx(
            [100 * n / len(mine) for n in (overthought, damaged)]
        )


def test_classes_are_not_compared_with_the_last_exit_of_another_model():
    about = {"task": ["sst2"], "rows": 20, "budget": ["resident"]}
    found = study(1, model=["m"], exit=["patience:1"], **about) + study(1, model=["n"], exit=["none"], **about)
    assert "classes-1" not in [each.name for each in page(found).tables]


def test_traced_runs_are_drawn_at_most_twenty_of_them_of_all_models_tasks_and_budgets():
    budgets = [f"{number}MiB" for number in range(90, 96)]
    options = {"model": ["m", "n"], "task": ["mrpc", "sst2"], "exit": ["none"], "budget": budgets}
    found = page(study(1, rows=4, traced=True, **options))
    titles = [picture.title for picture in found.pictures]
    drawn = [title for title in titles if "memory over time" in title]
    assert len(drawn) == sum("stages" in title for title in titles) == 20
    for value in [", m", ", n", "mrpc", "sst2", *budgets]:
        assert sum(value in title for title in drawn) >= (10 if value not in budgets else 3)
    notes = [section.text[0] for section in found.sections[:2]]
    assert all("10 of 12 traced experiments is drawn" in note and "--only exit=none" in note for note in notes)


def test_a_report_of_some_experiments_names_all_options_in_its_commands(records):
    some = page_of({"results": records}, "Report", only=["exit=patience:1", "budget=resident"])
    assert 0 < len(some.tables[0].rows) < len(page(records).tables[0].rows)
    for row in some.tables[0].rows:
        assert "--only exit=patience:1" in row.command and "--only budget=resident" in row.command
    with pytest.raises(UsageError, match="no experiment has these values - exit=none budget=1MiB"):
        page_of({"results": records}, "Report", only=["exit=none", "budget=1MiB"])


def test_the_picture_of_classes_is_of_whole_experiments():
    found = study(1, rows=40, model=["m"], task=["mnli"], exit=["none", *patience(1, 30)], budget=["resident"])
    table = next(each for each in page(found).tables if each.name == "classes-1")
    picture = classes(table)
    drawn = Counter(row.split(",")[0] for row in picture.data.splitlines()[1:])
    every = Counter(row.cells[0].text for row in table.rows)
    assert 1 < len(drawn) < len(every) and all(drawn[name] == every[name] for name in drawn)
    assert picture.caption == f"{drawn.total()} of {every.total()} rows are drawn."
    many = replace(table, rows=tuple(row for row in table.rows if row.cells[0] == table.rows[0].cells[0]) * 20)
    assert len(classes(many).data.splitlines()) == 25


def test_equal_records_give_equal_reports_in_any_order(records):
    shuffled = random.Random(0).sample(records, len(records))
    for each in (to_html, *WRITE_PAGE.values()):
        assert each(page(records)) == each(page(shuffled))


def test_interruptions_leave_no_trace_in_a_report_of_toys():
    """Attempts, seconds and times of day of toys depend on kills."""
    toys = [record(experiment(job="toy", model="toy", seed=seed), number) for seed in (1, 2) for number in (1, 2)]
    for each in toys:
        del each["environment"]
    later = [{**each, "attempts": 2, "seconds": 99.0, "ended": "2027-01-01T00:00:00+00:00"} for each in toys]
    assert to_html(page(toys)) == to_html(page(later[::-1]))


@functools.cache
def hostile_report():
    found = study(5, rows=20, model=[HOSTILE, "m"], task=["sst2"], exit=["none", "patience:1"])
    for each in found:
        each["samples"]["labels"] = [HOSTILE + "\ud800", "</title><img src=x onerror=alert(1)>"]
    return to_html(page_of({HOSTILE: found}, HOSTILE))


def test_names_that_are_hostile_stay_texts():
    html = hostile_report()
    assert "<script>alert" not in html and "<img" not in html and "{{" not in html.replace("{{ 7*7 }}", "")
    assert html.count("<script") == 1 and "http" not in html.replace("http-equiv", "").replace(
        "http://www.w3.org/2000/svg", ""
    )


@pytest.mark.skipif(shutil.which("chromium") is None, reason="no Chromium")
@pytest.mark.parametrize(("width", "scheme"), [(390, "dark"), (1280, "light")])
def test_a_browser_finds_nothing_wrong(tmp_path, width, scheme):
    (tmp_path / "report.html").write_text(hostile_report(), encoding="utf-8", errors="replace")
    found = look(tmp_path / "report.html", width, scheme)
    assert (found["errors"], found["requests"], found["code"], found["wide"]) == ([], [], [], 0)
    assert found["paint"] > 0 and (found["background"] == "rgb(16, 20, 26)") == (scheme == "dark")
    wrong = "<p style='width: 2000px' onclick='f()'>a<img src='http://localhost:1/x.png'><script>throw 1</script>"
    (tmp_path / "wrong.html").write_text(wrong)
    found = look(tmp_path / "wrong.html", width, scheme)
    assert found["errors"] and found["requests"] and found["code"] and found["wide"] > 0


def test_the_command_of_a_row_measures_it_alone(records, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "results", records)
    for row in table(page(records)).rows:
        (found,) = measured_by(row)
        assert str(found.engine.exit) in row.name


def test_the_command_of_an_own_policy_needs_the_recipe_and_those_of_other_rows_do_not(tmp_path, monkeypatch):
    """Records must not name code that is run."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text("")
    exits = ["none", "patience:2", "mine.py:Mine:1,2", "random:mine.py:Mine:1,2"]
    found = study(1, rows=20, model=["m"], task=["sst2"], budget=["96MiB"], exit=exits)
    write(tmp_path / "results", found)
    rows = {row.name.removeprefix("exit "): row for row in table(page(found)).rows}
    assert set(rows) == set(exits)
    for exit, row in rows.items():
        if "mine.py" in exit:
            assert row.command == f"offramp sweep RECIPE.py --out again --only exit={exit}"
        else:
            assert [each.engine.exit for each in measured_by(row)] == [exit]
    for only in ((), ["exit=mine.py:Mine:1,2"]):
        with pytest.raises(RefusedError, match=r"the records name code, exit mine\.py:Mine:1,2"):
            read_recipe(Path("results"), only)


def test_rows_that_differ_in_device_or_data_folder_are_told_apart(tmp_path, monkeypatch):
    about = {"model": ["m"], "task": ["sst2"], "rows": 20, "exit": ["none"], "budget": ["96MiB"]}
    found = study(1, device=["board", "laptop"], data=["glue", "mine"], **about)
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "results", found)
    made = page(found)
    rows = [row for name in ("results-1", "results-2") for row in table(made, name).rows]
    assert [row.name for row in rows] == ["board", "laptop"] * 2
    assert [each.title for each in made.tables[:2]] == [
        f"sst2, dev, 20 rows, {name}: results" for name in ("glue", "mine")
    ]
    assert len({each for row in rows for each in measured_by(row)}) == 4
    assert all(len(measured_by(row)) == 1 for row in rows)


def test_commands_tell_rows_of_other_tables_and_values_with_commas_apart(tmp_path, monkeypatch):
    about = {"rows": 20, "exit": ["none"], "budget": ["96MiB", "resident"]}
    found = study(1, model=["m", "n", "m,n"], task=["sst2"], **about) + study(1, model=["m"], task=[None], **about)
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "results", found)
    rows = [row for name in ("results-1", "results-2") for row in table(page(found), name).rows]
    measured = [measured_by(row) for row in rows]
    assert [len(each) for each in measured] == [1] * 8 and len({each for (each,) in measured}) == 8


def measured_by(row):
    """The experiments that the command of a row measures."""
    words = shlex.split(row.command)
    assert words[:2] == ["offramp", "sweep"]
    only = [words[index + 1] for index, word in enumerate(words) if word == "--only"]
    return read_recipe(Path(words[2]), only)


def test_folders_of_the_same_experiments_are_told_apart(records):
    found = page_of({"before": records, "after": records}, "Two")
    assert "folder" in [column.title for column in table(found).columns]
    assert len(table(found).rows) == 24 and found.facts[0] == ("24", "experiments")


def test_records_that_cannot_be_read_are_refused(records):
    newer = {**records[0], "experiment": {**records[0]["experiment"], "orbit": 3}}
    with pytest.raises(RefusedError, match="specification that cannot be read"):
        page([newer])


@pytest.mark.parametrize("value", ["x", 10**400, [1.0], {}])
def test_figures_that_are_something_else_count_as_missing(records, value):
    found = [{**each, "figures": {**each["figures"], "latency": value}} for each in records[:5]]
    row = cells(table(page([*found, *records[5:]])), model="bert", exit="none", budget="96MiB")
    assert row["latency"].text == NONE and row["score"].text != NONE


@pytest.mark.parametrize(
    "part",
    [{"samples": {"truth": [1, 0], "answers": [1], "metrics": ["accuracy"]}}, {"samples": {"truth": [1, 0]}},
     {"samples": {"latencies": ["x"]}}, {"samples": 3}, {"figures": []}, {"round": "1"}, {"reason": "none"}],
)  # fmt: skip
def test_records_with_other_parts_are_refused_by_their_folder_and_id(records, part):
    with pytest.raises(RefusedError, match=f"record {records[0]['id']} .* - results - "):
        page([{**records[0], **part}, *records[1:]])


def test_records_without_inputs_are_compared_by_their_figures(records):
    bare = [{name: value for name, value in each.items() if name != "inputs"} for each in records]
    assert len(table(page(bare)).rows) == 12


def test_records_of_studies_that_were_converted_can_be_reported():
    """They lack figures, samples, times and environments."""
    found = page(read_results(PUBLISHED, print))
    assert to_html(found) and len(table(found).rows) > 20


def write(folder, records):
    with Results(folder, print):
        pass
    (folder / RECORDS).write_bytes(b"".join(map(line_of, records)))


@pytest.fixture
def results(tmp_path, records):
    write(tmp_path / "results", records)
    return tmp_path / "results"


def test_the_command_writes_each_format(results, tmp_path, capsys):
    assert main(["report", str(results)]) == 0
    assert capsys.readouterr().out.startswith("# Report\n")
    for suffix, first in ((".html", "<!DOCTYPE"), (".md", "# Mine"), (".tex", "% \\usepackage"), (".csv", "# sst2")):
        out = tmp_path / f"report{suffix}"
        assert main(["report", str(results), "--out", str(out), "--title", "Mine"]) == 0
        assert out.read_text().startswith(first)
    assert main(["report", str(results), "--out", str(tmp_path / "report.pdf")]) == 2
    assert main(["report", str(results), "--format", "csv", "--out", str(tmp_path / "table.txt")]) == 0


def test_a_folder_that_is_named_twice_counts_once(results, capsys):
    pages = []
    for names in ([str(results)], [str(results), f"{results}/", f"{results}/../{results.name}"]):
        assert main(["report", *names, "--format", "csv"]) == 0
        pages.append(capsys.readouterr().out)
    assert pages[0] == pages[1]


def test_assets_are_pictures_and_tables_as_files(results, tmp_path, capsys):
    assert main(["report", str(results), "--assets", str(tmp_path / "assets")]) == 0
    assert capsys.readouterr().out == ""
    names = {path.name for path in (tmp_path / "assets").iterdir()}
    assert {"results-1.csv", "results-1.md", "results-1.tex"} <= names
    assert {"sst2-dev-score-and-latency.svg", "sst2-dev-score-and-latency.csv"} <= names
    svg = (tmp_path / "assets" / "sst2-dev-score-and-latency.svg").read_text()
    assert "var(--" not in svg and "<style>" in svg


@pytest.mark.parametrize("state", ["missing", "empty", "no records", "other version", "torn"])
def test_folders_without_records_are_refused_and_torn_lines_left_out(results, tmp_path, capsys, state):
    folder, code = results, 2
    if state == "missing":
        folder = tmp_path / "none"
    if state == "empty":
        (folder := tmp_path / "empty").mkdir()
    if state == "no records":
        (results / RECORDS).write_bytes(b"")
    if state == "other version":
        (results / "results.json").write_text(json.dumps({"format": 99}))
        code = 4
    if state == "torn":
        (results / RECORDS).write_bytes((results / RECORDS).read_bytes()[:-9])
        code = 0
    assert main(["report", str(folder)]) == code
    printed = capsys.readouterr()
    assert "not finished" in printed.err if state == "torn" else printed.out == ""


def test_without_jinja2_the_page_names_the_extra_and_tables_are_written(results, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "jinja2", None)
    monkeypatch.setitem(__import__("sys").modules, "matplotlib", None)
    assert main(["report", str(results), "--out", str(tmp_path / "report.html")]) == 1
    assert "pip install 'offramp[report]'" in capsys.readouterr().err
    assert main(["report", str(results), "--format", "latex"]) == 0


def test_peaks_within_the_budget_are_drawn_below_its_line():
    found = study(1, rows=4, traced=True, model=["m"], task=["sst2"], exit=["none"], budget=["128MiB"])
    assert found[0]["figures"]["memory"] < 128 * MIB
    (picture,) = [each for each in page(found).pictures if "memory over time" in each.title]
    assert "budget 128.0 MiB" in picture.svg and "waiting for weights" in picture.svg
    kinds = {line.partition(",")[0] for line in picture.data.splitlines()[1:]}
    assert kinds == {"sample", "read", "wait", "compute"}


def test_the_memory_of_a_machine_is_not_drawn_as_a_budget():
    found = study(1, rows=4, traced=True, model=["m"], task=["sst2"], exit=["none"], budget=["resident"])
    assert found[0]["run"]["budget_bytes"] == 20 << 30
    (picture,) = [each for each in page(found).pictures if "memory over time" in each.title]
    assert "budget" not in picture.svg


@pytest.mark.slow
def test_a_report_of_a_thousand_records_is_quick_and_small():
    """The limit is 10 seconds, here of the processor, which other processes do not take."""
    axes = {"task": ["sst2", "mrpc", "rte"], "budget": ["64MiB", "96MiB", "128MiB", "192MiB", "resident"]}
    found = study(5, exit=list(EXITS), **axes)[:980]
    found += study(1, traced=True, model=["runs/bert"], task=["sst2"], exit=list(EXITS[:4]), budget=axes["budget"])
    assert len(found) == 1000
    began = time.process_time()
    html = to_html(page(found))
    seconds = time.process_time() - began
    assert seconds <= 10 and len(html.encode()) <= 5 * MIB, (seconds, len(html))
