"""How tables are written: hostile texts stay texts, and numbers stay exact for programs."""

import csv
import io

import pytest

from offramp.reporting.tables import (
    NONE,
    WRITE_PAGE,
    Cell,
    Column,
    Page,
    Row,
    Section,
    Table,
    comma_separated,
    latex,
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
    assert r"\textbf{12.3 ms} {[}11.9, 12.8 ms{]} \\" in text and r"\begin{tabular}{lr}" in text
    assert [text.count(rule) for rule in (r"\toprule", r"\midrule", r"\bottomrule", r"\label{tab:times}")] == [1] * 4


def test_latex_has_only_commands_and_letters_of_every_installation():
    found = latex(a_table("\"q\" 漢 é ü → – --budget don''"))
    assert found.isascii() and r"\symbol{34}q\symbol{34} U+6F22 \'{e} \"{u} $\to$ \textendash{} -{}-budget" in found


def test_csv_holds_numbers_units_and_intervals():
    rows = list(csv.reader(io.StringIO(comma_separated(a_table()))))
    assert rows == [
        ["name", "time (s)", "time low", "time high"],
        ["x", "0.0123", "0.0119", "0.0128"],
        ["y"] + [""] * 3,
    ]


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
