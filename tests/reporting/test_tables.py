"""How tables are written: hostile texts stay texts, numbers stay exact for programs, and LaTeX fits its pages."""

import csv
import io
import re
import shutil
import subprocess

import pytest

from offramp.reporting.forms import WRITE_PAGE
from offramp.reporting.latex import latex, to_latex
from offramp.reporting.tables import (
    NONE,
    Cell,
    Column,
    Page,
    Row,
    Section,
    Table,
    comma_separated,
    markdown,
    slug,
    table_of,
)  # fmt: skip

HOSTILE = "a|b <script>alert(1)</script> `c` *d* [e](f) \\g $h$ % i & j_k # {l} ~ ^\n=1+1"


def a_table(text="x"):
    columns = (Column("name", is_text=True), Column("time", "s"))
    cells = (Cell(text), Cell("12.3 ms", 0.0123, 0.0119, 0.0128, "[11.9, 12.8 ms]", is_best=True))
    return Table("times", "Times", columns, (Row(cells), Row((Cell("y"), Cell(NONE)))), ("A note.",))


def test_markdown_has_titles_notes_and_bold_for_the_best():
    text = markdown(a_table())
    assert text.splitlines()[:4] == ["**Times**", "", "| name | time |", "| --- | ---: |"]
    assert "| x | **12.3 ms** \\[11.9, 12.8 ms\\] |" in text and text.endswith("\n\nA note.")


def test_latex_is_a_table_of_booktabs():
    text = latex(a_table())
    assert r"\textbf{12.3 ms} {[}11.9, 12.8 ms{]} \\" in text and r"\begin{tabular}{@{}lr@{}}" in text
    assert [text.count(rule) for rule in (r"\toprule", r"\midrule", r"\bottomrule", r"\label{tab:times}")] == [1] * 4


def test_latex_has_only_commands_and_letters_of_every_installation():
    found = latex(a_table("\"q\" 漢 é ü → – --budget don''"))
    assert found.isascii() and r"\symbol{34}q\symbol{34} U+6F22 \'{e} \"{u} $\to$ \textendash{} -{}-budget" in found


def wide_table():
    """A table that is too wide in its figures, and too long: 14 columns, 100 rows."""
    columns = [Column(name, is_text=True) for name in ("model", "exit")]
    columns += [Column(f"figure {number}") for number in range(11)] + [Column("failure", is_text=True)]
    cells = [Cell("12.3 ms", 0.0123, 0.0119, 0.0128, "[11.9, 12.8]")] * 11
    rows = [("runs/distil", f"random:confidence:0.{number}", *cells, "no budget " * 9) for number in range(100)]
    return table_of("wide", "Wide", columns, rows, ["Said at the end."])


def long_table():
    """A table whose texts are too long: paths and sentences, as those of failures and machines are."""
    columns = [Column(name, is_text=True) for name in ("", "reason", "where")]
    rows = [(f"row {number}", "the budget is too small " * 8, "/a_folder/of-models" * 9) for number in range(30)]
    return table_of("long", "Long", columns, rows)


def test_latex_splits_what_is_too_wide_or_too_long_for_a_page():
    parts = latex(wide_table()).split("\n\n")
    bodies = [part.splitlines() for part in parts]
    assert len(parts) > 6 and all(rf"\caption{{Wide (part {k} of {len(parts)})}}" in p for k, p in enumerate(parts, 1))
    assert len(set(re.findall(r"\\label\{(.*?)\}", "".join(parts)))) == len(parts), "labels differ"
    for lines in bodies:
        head, *rows = [line for line in lines if line.endswith(r"\\")]
        assert head.startswith("model & exit & ") and 0 < len(rows) <= 42, "each part says what its rows are of"
        assert r"\resizebox{\linewidth}{!}{%" not in lines
    shown = sum(part.count("12.3 ms") for part in parts)
    assert (shown, sum(part.count("no bud") for part in parts)) == (1100, 900), "each cell once"
    assert ["Said at the end." in part for part in parts] == [False] * (len(parts) - 1) + [True]
    broken = latex(long_table())
    assert (
        r"\begin{tabularx}{\linewidth}{@{}l>{\raggedright\arraybackslash}X" in broken and r"/\allowbreak{}a" in broken
    )
    keys = [Column(f"option {number}", is_text=True) for number in range(9)]
    scaled = latex(table_of("keys", "Keys", [*keys, Column("figure")], [["tune:latency=5ms"] * 9 + ["1"]]))
    assert scaled.count(r"\resizebox{\linewidth}{!}{%") == 1 and "tabularx" not in scaled


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("pdflatex") is None, reason="apt install texlive-latex-recommended")
def test_latex_compiles_and_no_line_is_wider_than_the_page(tmp_path):
    keys = [Column(f"option {number}", is_text=True) for number in range(9)]
    tables = wide_table(), long_table(), a_table(HOSTILE), table_of("keys", "Keys", keys, [["tune:latency=5ms"] * 9])
    text = to_latex(Page("t", (), (Section("t", (), tables),))).replace(r"\begin{table}", r"\clearpage\begin{table}[p]")
    head = "\\documentclass{article}\n" + text.splitlines()[0].removeprefix("% ") + "\n\\begin{document}\n"
    (tmp_path / "t.tex").write_text(head + text + "\n\\end{document}\n")
    words = ["pdflatex", "-interaction=nonstopmode", "-halt-on-error", "t.tex"]
    done = subprocess.run(words, check=False, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:]
    log = (tmp_path / "t.log").read_text(errors="replace")
    assert "Overfull" not in log and "too large for page" not in log, log


def test_csv_holds_numbers_units_and_intervals():
    rows = list(csv.reader(io.StringIO(comma_separated(a_table()))))
    assert rows == [
        ["name", "time (s)", "time low", "time high"],
        ["x", "0.0123", "0.0119", "0.0128"],
        ["y"] + [""] * 3,
    ]


def test_csv_holds_the_smallest_effects_that_can_be_detected():
    cells = (Cell("1.02×", 1.02, 0.99, 1.05, detectable=0.03), Cell("1.10×", 1.1))
    text = comma_separated(table_of("t", "t", [Column("× latency")], [[each] for each in cells]))
    assert text == "× latency,× latency low,× latency high,× latency detectable\n1.02,0.99,1.05,0.03\n1.1,,,\n"


@pytest.mark.parametrize("form", WRITE_PAGE)
def test_hostile_texts_stay_texts(form):
    page = Page(HOSTILE, (), (Section(HOSTILE, (HOSTILE,), (a_table(HOSTILE),)),))
    text = WRITE_PAGE[form](page)
    assert "<script>" not in text or form == "csv"
    if form == "md":
        assert all(line.count("|") - line.count("\\|") == 3 for line in text.splitlines() if line.startswith("|"))
    if form == "csv":
        rows = list(csv.reader(io.StringIO(text.partition("\n")[2])))
        assert all(len(row) == 4 for row in rows) and rows[1][0] == HOSTILE


def test_formulas_of_spreadsheets_become_texts_and_numbers_do_not():
    table = table_of("t", "t", [Column("a"), Column("b")], [["=1+1", "-3.5"], ["@x", "+1"]])
    assert comma_separated(table) == "a,b\n'=1+1,-3.5\n'@x,+1\n"


def test_names_of_files_are_plain():
    assert [slug(text) for text in ("SST-2, dev", "../../etc", "<b>", "")] == ["sst-2-dev", "etc", "b", "table"]
