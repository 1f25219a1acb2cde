"""Pages that templates make from records: the published ones hold what was published, and wrong templates say where."""

import hashlib
import json
import re
from pathlib import Path

import pytest

from offramp.cli import main
from offramp.errors import OfframpError, UsageError
from offramp.experiments import Grid, experiment
from offramp.experiments.grid import read_recipe
from offramp.experiments.results import line_of, read_results
from offramp.reporting.pages import (
    enough,
    fact,
    failures,
    flat,
    gain,
    interval,
    joint,
    machines,
    mean_of,
    of,
    page_from,
    point,
    ratios,
    rivals,
    spread,
    verdict,
    verdict_of,
    where,
)
from tests.experiments.studies import ENVIRONMENT, record

ROOT = Path(__file__).parents[2]
PUBLISHED = {
    "glue": ("glue", "ec0ba2aae3718e35"),
    "latency": ("latency", "3ea29abbedfd3b10"),
    "any-model": ("any_model", "fd689e339b410242"),
    "main-job": ("main_job", "2e4d1e233a8cf678"),
}
"""Page -> its template, and a digest of the rows of all its tables, without verdicts, as they were at commit 381530a,
when scripts made it from the records of the measurements."""
TARGETS = "| what | target | measured | verdict |"


def figures_of(page):
    """The lines of tables; those of the table of targets without their last cell, the verdict."""
    found, cut = [], False
    for line in page.splitlines():
        cut = line == TARGETS or (cut and line.startswith("|"))
        found += [line.rpartition(" | ")[0] if cut else line] if line.startswith("|") else []
    return found


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_page_is_made_from_its_records_and_holds_the_figures_that_were_published(name):
    template, digest = PUBLISHED[name]
    records = read_results(ROOT / "docs/results/records" / name, print)
    made = page_from(ROOT / "recipes" / f"{template}.md.jinja", records)
    assert hashlib.sha256("\n".join(figures_of(made)).encode()).hexdigest()[:16] == digest
    assert made == (ROOT / "docs/results" / f"{name}.md").read_text()


@pytest.mark.parametrize("name", PUBLISHED)
def test_no_published_verdict_is_decided_where_the_range_of_its_rounds_holds_the_target(name):
    targets = targets_of((ROOT / "docs/results" / f"{name}.md").read_text())
    assert len(targets) > 10
    for _, aim, measured, found in targets:
        assert re.fullmatch(r"(met|\*\*missed\*\*)( \(point\))?|inconclusive( \(\d rounds\))?|–", found)
        limit, ends = re.match(r"[<>]=? ([\d.]+)", aim), re.search(r"([\d.]+)\.\.([\d.]+)\)", measured)
        if limit and ends and float(ends[1]) < float(limit[1]) < float(ends[2]):
            assert found.startswith("inconclusive"), measured


def targets_of(page):
    """The rows of the table of targets, in cells."""
    table = page.partition(f"{TARGETS}\n")[2].partition("\n\n")[0]
    return [line.strip("| ").split(" | ") for line in table.splitlines()[1:]]


def test_the_page_of_the_study_is_made_from_its_records_and_those_of_two_others():
    folders = [ROOT / "docs/results/records" / name for name in ("study", "glue", "latency")]
    records = [record for folder in folders for record in read_results(folder, print)]
    made = page_from(ROOT / "recipes/ancestor.md.jinja", records)
    assert made == (ROOT / "docs/results/study.md").read_text()


def test_published_records_name_no_folder_of_a_machine():
    for file in (ROOT / "docs/results").rglob("*.jsonl"):
        assert re.findall(rb'"/(?:home|root|tmp|work|Users)/[^"]*', file.read_bytes()) == [], file


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_records_are_those_of_experiments(name):
    from offramp.experiments.specification import Experiment

    for each in read_results(ROOT / "docs/results/records" / name, print)[::7]:
        found = Experiment.from_json(each["experiment"]).flat()
        assert (found["model"], found["exit"]) == (
            each["experiment"]["model"],
            each["experiment"]["engine"]["exit"],
        )
        assert each["study"]["part"]


@pytest.mark.parametrize("task", ["cola", "sst2", "mrpc", "rte", "stsb", "qnli", "qqp", "mnli"])
def test_published_gains_follow_from_the_published_answers(task):
    import numpy as np

    from offramp.tasks.metrics import paired_interval

    rows = [flat(each) for each in read_results(ROOT / "docs/results/records/glue", print)]
    for wanted in where(rows, part="against plain", task=task):
        key = {"part": "training", "model": wanted["model"], "task": wanted["task"], "seed": wanted["seeds"]}
        ours = where(rows, **key, loss="pabee", heads="mean-linear", joint_only=False)
        sides = [sorted(side, key=lambda row: row["seed"]) for side in (ours, where(rows, **key, loss="last"))]
        answers = [np.array([row["answers"] for row in side]) for side in sides]
        found = paired_interval(ours[0]["metrics"], np.array(ours[0]["truth"]), *answers)
        assert found == pytest.approx([wanted[name] for name in ("gain", "gain_low", "gain_high")], abs=1e-9)


@pytest.mark.parametrize("name", ["ancestor", "glue", "latency", "main_job"])
def test_the_template_of_a_recipe_makes_a_page_of_the_records_of_a_fresh_sweep(name, monkeypatch):
    """Tables have rows, and as many cells as their head; models are named. Of long recipes, the first task."""
    monkeypatch.setenv("QUICK", "1")
    found = read_recipe(ROOT / "recipes" / f"{name}.py")
    found = found if len(found) < 100 else [each for each in found if each.data == found[0].data]
    records = [record(each, number) for each in found for number in range(1, min(each.rounds, 2) + 1)]
    records[-1] = record(found[-1], records[-1]["round"], failed="no memory")
    page = page_from(ROOT / "recipes" / f"{name}.md.jinja", records)
    assert f"- failed: 1 of {len(records)} jobs: no memory" in page and ENVIRONMENT["cpu_model"] in page
    tables = [block.splitlines() for block in page.split("\n\n") if block.startswith("|")]
    assert tables and all(len(table) > 2 and len({line.count("|") for line in table}) == 1 for table in tables)
    models = ["MiniLM-L6", "DistilBERT"] if name == "ancestor" else [Path(each.model).name for each in found]
    assert all(model in page for model in models)


def test_a_gain_is_paired_by_seed_and_text():
    rows = [flat(record(each, 1)) for each in Grid(model="m", task="sst2", exit=["none", "patience:1"], seed=[1, 2])]
    mine, full = where(rows, exit="patience:1"), where(rows, exit="none")
    found = gain(mine, full)
    assert found["gain"] == pytest.approx(sum(of(mine, "score")) / 2 - sum(of(full, "score")) / 2)
    assert found["gain_low"] < found["gain"] < found["gain_high"] and gain(mine, reversed(full)) == found
    assert interval(found, "gain").startswith(f"{found['gain']:+.1f} [")
    for bases in ([], where(full, seed=3), [{**row, "truth": row["truth"][1:]} for row in full]):
        assert interval(gain(mine, bases), "gain") == "–"


def test_figures_of_traced_jobs_are_those_of_others():
    traced = flat(record(experiment(model="m", task="sst2", trace=True), 1))
    assert isinstance(traced["memory"], int) and traced["spans"]


def test_machines_and_failures_are_listed_once():
    each = experiment(model="m", task="sst2")
    rows = [flat(record(each, 1)), flat(record(each, 2)), flat(record(each, 3, "no memory"))]
    (line,) = machines(rows)
    assert line.startswith("AMD EPYC, 2 cores, Linux x86_64: offramp 0.1.0, python 3.11.7, numpy")
    assert failures(rows) == [("no memory", 1)]


def test_verdicts_are_those_of_intervals():
    rounds = [1.0, 1.02, 0.98, 1.01, 0.99]
    words = ["met", "inconclusive", "missed"]
    assert [verdict(rounds, at_most=limit) for limit in (1.1, 1.0, 0.9)] == words
    assert [verdict(rounds, at_least=limit) for limit in (0.9, 1.0, 1.1)] == words
    few = [verdict(rounds[:number], at_most=2) for number in (4, 1)]
    assert few == ["inconclusive (4 rounds)", "inconclusive (1 round)"]
    row = {"gain": -0.1, "gain_low": -0.6, "gain_high": 0.3, "speed": 2.0, "speed_low": None}
    assert [verdict_of(row, "gain", at_least=limit) for limit in (-0.7, -0.5, 0.5)] == words
    assert verdict_of(row, "speed", at_most=3) == "inconclusive" == verdict_of(row, "speed", at_least=1)
    with pytest.raises(ValueError, match="at_most or at_least"):
        verdict(rounds)
    assert [fact(True), fact(False), point(True), point(False)] == ["met", "missed", "met (point)", "missed (point)"]


def test_verdicts_of_several_conditions():
    few = "inconclusive (3 rounds)"
    assert [joint(each) for each in (["met", "met"], ["met", few], [few, "missed"])] == ["met", few, "missed"]
    assert [enough(["met", "met", few, "missed"], least) for least in (2, 3, 4)] == ["met", few, "missed"]


def test_the_interval_of_a_mean_of_different_data_is_narrower_than_theirs():
    rows = [{"gain": value, "gain_low": value - 3, "gain_high": value + width} for value, width in ((1.0, 3), (2.0, 4))]
    assert mean_of(rows, "gain") == pytest.approx({"gain": 1.5, "gain_low": 1.5 - 3 / 2**0.5, "gain_high": 4.0})


def test_rivals_are_listed_with_their_versions():
    rows = [{"rival": name, "versions": {"b": "2", "a": "1"}} for name in ("y", "x", "y")]
    assert rivals([*rows, {"rival": None}, {"rival": "z"}]) == ["x: a 1, b 2", "y: a 1, b 2"]


def a_record(round=0, **figures):
    experiment = {"model": "m", "engine": {"budget": "96MiB"}, "data": None}
    return {"round": round, "experiment": experiment, "figures": figures, "samples": {}, "study": {"part": "p"}}


def made(text, tmp_path, records=()):
    template = tmp_path / "page.md.jinja"
    template.write_text(text)
    return page_from(template, records)


def test_options_figures_and_studies_are_on_one_level():
    row = flat({**a_record(latency=0.5), "run": {"model": "other", "threads": 2}})
    assert (row["budget"], row["latency"], row["part"], row["model"], row["threads"]) == ("96MiB", 0.5, "p", "m", 2)


def test_ratios_are_those_of_the_same_round():
    rows = [flat(a_record(number, latency=value)) for number, value in ((0, 2.0), (1, 9.0), (2, None))]
    bases = [flat(a_record(number, latency=value)) for number, value in ((1, 3.0), (0, 1.0), (0, 4.0))]
    assert ratios(rows, bases, "latency") == [2.0, 3.0]
    assert ratios(rows, bases, "latency", largest=True) == [0.5, 3.0]
    assert spread([2.0, 3.0, 10.0]) == "3.00x (2.00..10.00)" and spread([]) == "–"


def test_where_takes_one_value_or_several():
    rows = [flat(a_record(number)) for number in range(3)]
    assert [row["round"] for row in where(rows, part="p", round=[0, 2])] == [0, 2]
    assert where(rows, nothing=1) == []


def test_hostile_texts_end_no_cell_and_begin_no_html(tmp_path):
    record = {**a_record(), "study": {"part": "a|b\n<script>alert(1)</script>", "names": ["x|y", {"z|": "<b>"}]}}
    page = made("| {{ rows[0].part }} | {{ rows[0].names }} |", tmp_path, [record])
    assert "<script" not in page and "<b>" not in page and len(page.splitlines()) == 1
    assert page.replace("\\|", "").count("|") == 3


@pytest.mark.parametrize(
    ("value", "printed"),
    [
        (7, "7"),
        ("a|b", "a\\|b"),
        ("a\\|b", "a\\\\\\|b"),
        ("a\\", "a\\\\"),
        ([0, "<script>", "|"], "[0, '&lt;script>', '\\|']"),
        ("a < b", "a < b"),
    ],
)
def test_values_are_raw_in_a_template_and_escaped_where_they_are_printed(value, printed, tmp_path):
    record = {**a_record(), "study": {"part": value, "wanted": value}}
    cell = "{% macro cell(row) %}| {{ row.part }} |{% endmacro %}"
    found = "rows | where(part=[rows[0].wanted])"
    assert made(cell + f"{{{{ cell(({found})[0]) }}}}", tmp_path, [record]) == f"| {printed} |\n"
    assert made(f"{{{{ {found} | of('part') | cells }}}} | b", tmp_path, [record]) == f"{printed} | b\n"


def test_a_template_finds_exits_with_a_bar(tmp_path):
    record = {**a_record(), "experiment": {"engine": {"exit": "patience:1|confidence:0.9"}}}
    text = '{{ rows | where(exit="patience:1|confidence:0.9") | length }}'
    assert made(text, tmp_path, [record]) == "1\n"


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("a\n{% for %}", 2),
        ("a\nb\n{{ rows[0].absent | ms }}", 3),
        ("a\n{{ rows[0].absent }}", 2),
        ("{{ 1 / 0 }}", 1),
        ("\n{{ rows.__class__.__mro__ }}", 2),
        ("{{ [] | median }}", 1),
        ("a\n{% include 'x' %}", 2),
        ("{{ rows | where(1) }}", 1),
        ('a\n{{ ["a"] | of("x") }}', 2),
        ("{% macro a() %}\n{{ a() }}{% endmacro %}{{ a() }}", 2),
        ("{{ 'a' * 10**18 }}", 1),
    ],
)
def test_a_wrong_template_is_refused_with_its_line(text, line, tmp_path):
    with pytest.raises(UsageError, match=f"line {line} "):
        made(text, tmp_path, [a_record()])


def test_a_template_that_is_no_text_or_not_there_is_refused(tmp_path):
    (tmp_path / "bytes").write_bytes(b"\xff\xfe\x00")
    for name in ("bytes", "absent"):
        with pytest.raises(OfframpError, match=name):
            page_from(tmp_path / name, [])


def test_the_command_writes_the_page_of_several_folders(tmp_path, capsys):
    for number in range(2):
        folder = tmp_path / str(number)
        folder.mkdir()
        (folder / "results.json").write_text(json.dumps({"format": 1}))
        (folder / "records.jsonl").write_bytes(line_of(a_record(number, latency=0.25)))
    template = tmp_path / "t.jinja"
    template.write_text("{% for row in rows %}\n| {{ row.round }} | {{ row.latency | ms }} |\n{% endfor %}\n")
    folders = [str(tmp_path / str(number)) for number in range(2)]
    assert main(["report", *folders, "--template", str(template), "--out", str(tmp_path / "page.md")]) == 0
    assert (tmp_path / "page.md").read_text() == "| 0 | 250.0 ms |\n| 1 | 250.0 ms |\n"
    assert main(["report", *folders, "--template", str(tmp_path / "absent")]) != 0
    assert "absent" in capsys.readouterr().err
    for given in (
        ["--assets", str(tmp_path / "made")],
        ["--format", "md"],
        ["--title", "T"],
        ["--baseline", "model=m"],
    ):
        assert main(["report", *folders, "--template", str(template), *given]) == 2
        assert given[0] in capsys.readouterr().err and not (tmp_path / "made").exists()
