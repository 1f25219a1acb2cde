"""Records from anybody: whatever they hold, a report and a comparison are made or refused, soon and in little room."""

import copy
import warnings

import pytest

from offramp.errors import OfframpError
from offramp.experiments.comparison import FIGURES, compare
from offramp.experiments.report import page_of
from offramp.experiments.results import completed
from offramp.reporting.forms import WRITE_PAGE
from offramp.reporting.html_page import to_html
from tests.experiments.studies import study


@pytest.fixture(scope="module")
def records():
    """Two subjects of one round each, with traces."""
    return study(
        1, rows=12, traced=True, model=["runs/distilbert"], task=["sst2"], budget=["96MiB"], exit=["none", "patience:1"]
    )


def samples(**changes):
    return lambda record: record["samples"].update(changes)


def options(part, **changes):
    return lambda record: (record["experiment"] if part is None else record["experiment"][part]).update(changes)


def figures(value):
    return lambda record: record.update(figures=dict.fromkeys(record["figures"], value))


NESTED = []
for _ in range(900):
    NESTED = [NESTED]
LAST, SPAN = 12, ["layer-00", 0, "compute", 1.0, 2.0, 0, "loop", 0]
SPOILT = {
    "an exit of 2^40": samples(exits=[1 << 40] * LAST),
    "no latencies": samples(latencies=[]),
    "latencies that are null": samples(latencies=None),
    "equal latencies": samples(latencies=[0.25] * LAST),
    "latencies that differ in the last bit": samples(latencies=[0.25, 0.25000000000000006] * 6),
    "latencies of 0": samples(latencies=[0] * LAST),
    "a stage of 2^40": samples(spans=[["a", 1 << 40, *SPAN[2:]]]),
    "spans backwards": samples(spans=[[*SPAN[:3], 2.0, 1.0, *SPAN[5:]]]),
    "spans far apart": samples(spans=[[*SPAN[:3], -1e18, 1e18, *SPAN[5:]]]),
    "spans without memory": samples(memory=None),
    "one sample of memory": samples(memory=[[1.0, 1, None, None]]),
    "memory of 2^53": samples(memory=[[0.0, 1 << 53, 0, 0], [1e18, 0, None, 0]]),
    "truth that is null": samples(truth=None),
    "truth below the labels": samples(truth=[-7] * LAST),
    "truth of texts": samples(truth=["a"] * LAST, metrics=["f1"]),
    "truth of three classes": samples(truth=[0, 1, 2] * 4, metrics=["f1", "matthews"]),
    "truth of large numbers": samples(truth=[1e18, -1e18] * 6, metrics=["pearson", "spearman"]),
    "answers of several types": samples(answers=["a", 1, 2.5] * 4),
    "metrics of nobody": samples(metrics=["x"]),
    "labels that are lists": samples(labels=[["a"]]),
    "a model of digits": options(None, model="9" * 5000),
    "a model of no letters": options(None, model="/\0\ud800"),
    "no seed": lambda record: record["experiment"].pop("seed"),
    "seed of 2^53": options(None, seed=1 << 53),
    "no engine": options(None, engine=None),
    "an engine without options": options(None, engine={}),
    "a budget of 400 digits": options("engine", budget="9" * 400 + "MiB"),
    "a budget of 400 digits and a fraction": options("engine", budget="9" * 400 + ".5MiB"),
    "an exit of many rules": options("engine", exit="|".join(["patience:1"] * 5000)),
    "an exit that is a path": options("engine", exit="/etc/\0/x.py:y"),
    "data that are a list": options("data", data=[1]),
    "rows that are a mapping": options("data", train={"a": 1}, task=None),
    "labels that are a number": options("data", labels=7),
    "many labels": options("data", labels="x" * 300_000),
    "a training of texts": options(None, training={"epochs": "x"}),
    "a training of lists": options(None, training={"exit_weights": [1]}),
    "a deep training": options(None, training={"seed": NESTED}),
    "a deep option": options(None, device=NESTED),
    "a deep experiment": lambda record: record.update(experiment=NESTED),
    "a deep environment": lambda record: record["environment"].update(caches={"L1": NESTED}),
    "an environment of nothing": lambda record: record.update(environment={}),
    "versions that are a list": lambda record: record["run"].update(rival="a", versions=[1]),
    "deep versions": lambda record: record["run"].update(rival="a", versions={"a": NESTED}),
    "deep inputs": lambda record: record.update(inputs={"data": NESTED, "source": NESTED}),
    "a deep id": lambda record: record.update(id=NESTED, seconds="x"),
    **{
        f"figures of {value!r:.9}": figures(value)
        for value in (0, -1, 1e18, -1e18, 1e-18, 1e300, 10**400, "x", None, True)
    },
}  # fmt: skip
"""Name -> change of a record."""


@pytest.mark.parametrize("name", SPOILT)
def test_a_report_and_a_comparison_are_made_or_refused(records, name):
    spoilt = copy.deepcopy(records)
    SPOILT[name](spoilt[0])
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)  # a line on the terminal that is not ours
        for work in (_report, _compare):
            try:
                work(spoilt, records)
            except OfframpError as error:
                assert error.exit_code in (2, 4) and str(error).isprintable()


def _report(spoilt, records):
    page = page_of({"results": spoilt}, "Title")
    assert to_html(page) and all(write(page) for write in WRITE_PAGE.values())


def _compare(spoilt, records):
    first, second = ([completed(each, "results") for each in side] for side in (spoilt, records))
    for figure in FIGURES:
        try:
            rows = compare(first, second, figure).rows
        except OfframpError as error:
            assert error.exit_code in (2, 4)
        else:
            assert all(row.verdict for row in rows)


def test_what_is_changed_is_used(records):
    """The records as they are have all that the changes spoil."""
    page = page_of({"results": records}, "Title")
    titles = " ".join(each.title for each in page.pictures)
    assert all(word in titles for word in ("exits", "memory over time", "stages"))
    assert [row.verdict for row in compare(*[[completed(each, "x") for each in records]] * 2, "latency").rows]
