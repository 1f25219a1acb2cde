"""Comparison of two folders, with records as sweeps write them."""

import json

import numpy as np
import pytest

from offramp.cli import main
from offramp.errors import UsageError
from offramp.experiments import comparison, experiment
from offramp.experiments.comparison import FIGURES, compare, flat_options
from offramp.experiments.results import Results

TRUTH = [0, 1] * 30


def record(seconds=0.01, number=1, wrong=0, memory=100.0, **options):
    """A record of one round: latencies around `seconds`, and the last `wrong` answers wrong."""
    each = experiment(**{"model": "m", "task": "sst2", **options})
    answers = [label if index < len(TRUTH) - wrong else 1 - label for index, label in enumerate(TRUTH)]
    latencies = list(seconds * (1 + np.linspace(0, 0.1, len(TRUTH))))
    score = 100 * (1 - wrong / len(TRUTH))
    figures = {"latency": float(np.median(latencies)), "memory": memory, "score": score, "bytes": 0.0, "mean_exit": 2.0}
    samples = {"latencies": latencies, "answers": answers, "truth": TRUTH, "metrics": ["accuracy"]}
    about = {"id": f"{each.key({})}.{number}", "key": each.key({}), "round": number, "experiment": each.to_json()}
    found = {"inputs": {"model": "d", "data": "e"}, "status": "done", "figures": figures, "samples": samples}
    return {**about, **found}


def rounds(seconds, num_rounds=7, noise=0.01, **options):
    generator = np.random.default_rng(len(str(options)))
    return [
        record(seconds * float(generator.normal(1, noise)), number, **options) for number in range(1, num_rounds + 1)
    ]


def test_a_backend_that_is_twice_as_slow_is_called_slower():
    found = compare(rounds(0.01, backend="ort"), rounds(0.02, backend="torch"), "latency")
    assert found.changed == {"backend": ("ort", "torch")}
    (row,) = found.rows
    assert row.verdict == "slower" and row.compared.value == pytest.approx(2, rel=0.05)
    assert row.compared.low < 2.1 and row.compared.low > 1.8 and row.p < 0.05 and row.rounds == 7
    assert 0 < row.compared.detectable < 0.2
    (back,) = compare(rounds(0.02, backend="torch"), rounds(0.01, backend="ort"), "latency").rows
    assert back.verdict == "faster"


def test_equal_sides_and_few_rounds_are_inconclusive():
    (row,) = compare(rounds(0.01), rounds(0.0101, noise=0.05), "latency").rows
    assert row.verdict == "inconclusive" and row.compared.low < 1 < row.compared.high
    (row,) = compare(rounds(0.01, 3), rounds(0.05, 3), "latency", at_most=1.0).rows
    assert (row.verdict, row.target, row.compared.low) == ("inconclusive", "inconclusive", None)


def test_targets_are_met_or_missed():
    sides = rounds(0.01, backend="ort"), rounds(0.02, backend="torch")
    targets = [compare(*sides, "latency", at_most=limit).rows[0].target for limit in (1.5, 2.0, 3.0)]
    assert targets == ["missed", "inconclusive", "met"]


@pytest.mark.parametrize(("ratio", "at_most"), [(1.08, 1.0), (1.08, 1.13)])
def test_a_target_in_a_table_of_many_rows_needs_more_evidence(ratio, at_most):
    """A row that is decided alone is not decided among 40 at the target."""
    pair = rounds(0.01, 6, 0.02, batch=1), rounds(0.01 * ratio, 6, 0.02, batch=1, exit="none")
    (alone,) = compare(*pair, "latency", at_most).rows
    others = [rounds(0.01, 6, 0.02, batch=batch) for batch in range(2, 42)]
    near = [rounds(0.01 * at_most, 6, 0.02, batch=batch, exit="none") for batch in range(2, 42)]
    sides = ([each for group in groups for each in group] for groups in ((pair[0], *others), (pair[1], *near)))
    among = compare(*sides, "latency", at_most).rows
    assert (alone.target, alone.target_p < 0.05) == ("missed" if ratio > at_most else "met", True)
    assert among[0].compared == alone.compared and among[0].target_p > 0.05
    assert {row.target for row in among} == {"inconclusive"}


def test_experiments_are_paired_by_their_options():
    first = [*rounds(0.01, exit="none"), *rounds(0.005, exit="patience:1"), *rounds(0.01, exit="oracle")]
    second = [*rounds(0.005, exit="patience:1"), *rounds(0.02, exit="none"), *rounds(0.01, exit="patience:3")]
    found = compare(first, second, "latency")
    assert [row.name for row in found.rows] == ["exit=none", "exit=patience:1"]
    assert [row.verdict for row in found.rows] == ["slower", "inconclusive"]
    assert found.left_out == ("only in folder 1: exit=oracle", "only in folder 2: exit=patience:3")


def test_only_rounds_that_both_have_are_compared_and_records_without_a_figure_left_out():
    first, second = rounds(0.01, exit="none"), rounds(0.02, exit="none")
    failed = {**second[0], "status": "failed", "figures": {}, "samples": {}}
    nothing = {**second[1], "figures": {**second[1]["figures"], "latency": None}}
    (row,) = compare(first, [failed, nothing, *second[2:]], "latency").rows
    assert row.rounds == 5
    found = compare([*first, *rounds(1, exit="oracle")], [*second, *[{**failed, **experiment_of("oracle")}]], "latency")
    assert len(found.rows) == 1 and found.left_out == ("no round of both has the figure latency: exit=oracle",)
    with pytest.raises(UsageError, match="no round of both folders has the figure latency - offramp report"):
        compare(first, [failed], "latency")
    bare = [{**each, "figures": {"latency": 1.0}} for each in second]
    with pytest.raises(UsageError, match=r"no round of both folders has the figure bytes - give --figure latency$"):
        compare(first, bare, "bytes")


def experiment_of(exit):
    return {"experiment": record(exit=exit)["experiment"]}


def test_the_score_is_compared_row_by_row():
    same, worse = rounds(0.01), rounds(0.01, wrong=12, backend="torch")
    (row,) = compare(same, worse, "score").rows
    assert row.compared.value == pytest.approx(-20) and row.verdict == "worse"
    assert row.compared.low < -20 < row.compared.high < 0
    (row,) = compare(worse, same, "score").rows
    assert row.verdict == "better"
    (row,) = compare(same, rounds(0.01, wrong=1, backend="torch"), "score").rows
    assert row.verdict == "inconclusive", "one row of 60 may be chance"
    (row,) = compare(same, rounds(0.01, backend="torch"), "score").rows
    assert (row.compared.value, row.verdict) == (0.0, "inconclusive")


def test_scores_of_other_rows_have_no_verdict():
    """Rounds have equal answers: a difference of one row in 60, of rows in another order, was certain."""
    first, other = rounds(0.01), rounds(0.01, wrong=1, backend="torch")
    for each in other:
        each["samples"] = {**each["samples"], "truth": TRUTH[::-1]}
    (row,) = compare(first, other, "score").rows
    assert row.compared.value == pytest.approx(-100 / 60)
    assert (row.verdict, row.compared.low, row.p) == ("inconclusive", None, 1.0)


def test_a_table_of_many_rows_needs_more_evidence():
    """The same difference is called one alone, and not among 40 without any."""
    pair = rounds(0.01, 6, 0.02, batch=1), rounds(0.0108, 6, 0.02, batch=1, exit="none")
    (alone,) = compare(*pair, "latency").rows
    others = [each for batch in range(2, 42) for each in rounds(0.01, 6, 0.02, batch=batch)]
    both = [*pair[0], *others], [*pair[1], *others]
    among = compare(*both, "latency").rows[0]
    assert alone.verdict == "slower" and among.verdict == "inconclusive" and among.p > alone.p


def test_figures_of_zero_have_no_ratio():
    (row,) = compare(rounds(0.01), rounds(0.01), "bytes").rows
    assert (row.compared.value, row.verdict) == (1.0, "inconclusive")


def test_what_cannot_be_compared_is_refused():
    with pytest.raises(UsageError, match=f"give --figure {', '.join(FIGURES)}"):
        compare(rounds(1), rounds(1), "speed")
    with pytest.raises(UsageError, match="no experiment is in both"):
        compare([*rounds(1, exit="a:1"), *rounds(1)], [*rounds(1, exit="b:1"), *rounds(1, exit="c:1")], "latency")


def test_the_command_prints_a_table_or_lines(tmp_path, capsys):
    for name, seconds, backend in (("a", 0.01, "ort"), ("b", 0.02, "torch")):
        with Results(tmp_path / name, print) as found:
            for each in rounds(seconds, backend=backend):
                found.add(each)
    words = ["compare", str(tmp_path / "a"), str(tmp_path / "b"), "--figure", "latency", "--at-most", "1.5"]
    assert main(words) == 0
    printed = capsys.readouterr().out
    assert "backend: ort" in printed and "slower" in printed and "missed" in printed and "detectable" in printed
    assert main([*words, "--json"]) == 0
    (line,) = map(json.loads, capsys.readouterr().out.splitlines())
    assert line["verdict"] == "slower" and line["compared"]["value"] == pytest.approx(2, rel=0.05)
    assert main(["compare", str(tmp_path / "a"), str(tmp_path / "b"), "--figure", "score"]) == 0
    assert "difference [95 %]" in capsys.readouterr().out
    assert main(["compare", str(tmp_path / "a"), str(tmp_path / "none")]) == 2


def test_names_in_records_are_harmless_on_the_terminal(tmp_path, capsys):
    for name, model in (("a", "m"), ("b", "\x1b[2Jm\nforged")):
        with Results(tmp_path / name, print) as found:
            for each in rounds(0.01):
                found.add({**each, "experiment": {**each["experiment"], "model": model}})
    capsys.readouterr()
    assert main(["compare", str(tmp_path / "a"), str(tmp_path / "b"), "--figure", "latency"]) == 0
    printed = capsys.readouterr().out
    assert "\x1b" not in printed and not any(line.startswith("forged") for line in printed.splitlines())


def test_the_target_of_a_score_is_the_loss():
    same = [record(wrong=6, number=number, exit="none") for number in range(1, 6)]
    worse = [record(wrong=24, number=number, exit="patience:1") for number in range(1, 6)]
    targets = [compare(*sides, "score", at_most=2.0).rows[0].target for sides in ((same, worse), (worse, same))]
    assert targets == ["missed", "met"]


def test_records_of_inputs_that_have_changed_since_are_left_out():
    old, new = rounds(0.01, 8, exit="none"), rounds(0.03, 8, exit="none")
    changed = [{**each, "key": "k2", "id": f"k2.{each['round']}"} for each in new[:6]]
    (row,) = compare(new, [*old, *changed], "latency").rows
    assert row.rounds == 6 and row.compared.value == pytest.approx(1)


def test_other_data_and_another_machine_are_said():
    first = [{**each, "environment": {"cpu_model": "a", "num_cores": 2}} for each in rounds(0.01)]
    assert compare(first, first, "latency").notices == ()
    other = [{**each, "environment": {"cpu_model": "b", "num_cores": 2}} for each in first]
    other = [{**each, "inputs": {**each["inputs"], "data": "edited"}} for each in other]
    data, machine = compare(first, other, "latency").notices
    assert data == "1 of 1 experiments were measured on other data in the second folder"
    assert machine.startswith("1 of 1 experiments were measured on another kind of machine in the second folder")
    assert compare(first, rounds(0.01), "latency").notices == (), "it is not known"


def test_an_infinite_ratio_has_no_value_in_json(tmp_path, capsys):
    for name, num_bytes in (("a", 0.0), ("b", 5.0)):
        with Results(tmp_path / name, print) as results:
            for each in rounds(0.01):
                results.add({**each, "figures": {**each["figures"], "bytes": num_bytes}})
    capsys.readouterr()
    assert main(["compare", str(tmp_path / "a"), str(tmp_path / "b"), "--figure", "bytes", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["compared"]["value"] is None


def test_a_budget_is_named_as_it_is_written():
    options = flat_options({"experiment": experiment(model="m", budget="72MiB").to_json()})
    assert comparison._named(options, {"budget"}) == "budget=72MiB"
