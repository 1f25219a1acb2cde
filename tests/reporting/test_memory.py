import subprocess
import sys
import xml.etree.ElementTree as ET
from xml.sax.saxutils import escape

import pytest
from hypothesis import given
from hypothesis import strategies as st

from offramp.errors import MissingExtraError
from offramp.measure import MemorySample, Span
from offramp.reporting.memory import _label, draw_memory
from offramp.units import format_duration

MIB = 1 << 20


def samples(peak_mib=100, seconds=0.1, anon=True):
    rss_mib = [50, peak_mib, peak_mib - 5, peak_mib - 2]
    return [
        MemorySample(7 + seconds * i / 3, size * MIB, (size - 20) * MIB if anon else None, 20 * MIB if anon else None)
        for i, size in enumerate(rss_mib)
    ]


def layers(num_stages=3, name="layer {}", pass_index=0, begin=7.01, seconds=0.02):
    spans = []
    for stage in range(1, num_stages + 1):
        start, end = begin + (stage - 1) * seconds, begin + stage * seconds
        spans.append(Span(name.replace("{}", str(stage)), stage, "read", start, end, 9 * MIB, "reader", pass_index))
        spans.append(
            Span(name.replace("{}", str(stage)), stage, "wait", start, start + seconds / 4, 0, "loop", pass_index)
        )
        spans.append(
            Span(name.replace("{}", str(stage)), stage, "compute", start + seconds / 4, end, 0, "loop", pass_index)
        )
        spans.append(Span("exit", stage, "head", end, end, 0, "loop", pass_index))
    return spans


def texts(path):
    root = ET.parse(path).getroot()
    return ["".join(node.itertext()) for node in root.iter("{http://www.w3.org/2000/svg}text")]


def test_the_picture_says_what_it_shows(tmp_path):
    draw_memory(tmp_path / "memory.svg", samples(), layers(), 128 * MIB, title="BERT in 128 MiB")
    shown = texts(tmp_path / "memory.svg")
    for text in ("BERT in 128 MiB", "peak 100.0 MiB", "budget 128.0 MiB", "memory (MiB)", "time (ms)"):
        assert text in shown
    for text in ("layer 1", "layer 2", "layer 3", "read", "wait"):
        assert text in shown
    for text in ("resident set", "anonymous part", "budget", "exit evaluated", "exit taken", "computing, by stage"):
        assert text in shown, "every mark is in the legend"
    assert {"reading weights", "waiting for weights"} <= set(shown)
    assert not {"idle read", "reading between passes"} & set(shown)


@pytest.mark.parametrize("start_seconds", [0.0, 0.5, 60.0])
def test_the_run_fills_the_picture_however_long_start_up_takes(tmp_path, start_seconds):
    early = [MemorySample(7 - start_seconds * part, (40 + 70 * part) * MIB, None, None) for part in (1, 0.5)]
    found = [*(early if start_seconds else ()), *samples(anon=False)]
    draw_memory(tmp_path / "memory.svg", found, layers(), 128 * MIB, begin_seconds=7.0)
    shown = texts(tmp_path / "memory.svg")
    ticks = [float(text) for text in shown[: shown.index("time (ms)")] if text.isdigit()]
    assert 60 <= max(ticks) <= 100
    assert [text for text in shown if text.startswith("start-up")] == (
        [] if not start_seconds else [f"start-up {format_duration(start_seconds)}"]
    )
    assert f"peak {110 if start_seconds else 100}.0 MiB" in shown, "a peak of start-up counts"


def test_names_give_way_to_numbers_and_numbers_to_nothing(tmp_path):
    draw_memory(tmp_path / "many.svg", samples(), layers(20, seconds=0.004), 128 * MIB)
    shown = texts(tmp_path / "many.svg")
    assert "layer 20" not in shown and "19" in shown
    draw_memory(tmp_path / "dense.svg", samples(), layers(400, seconds=0.0002), 128 * MIB)
    assert not {"layer 399", "399"} & set(texts(tmp_path / "dense.svg"))


def test_one_exit_answers_in_each_pass(tmp_path):
    spans = [*layers(3), *layers(2, pass_index=1, begin=7.08, seconds=0.01)]
    draw_memory(tmp_path / "one.svg", samples(), spans, 128 * MIB)
    picture = (tmp_path / "one.svg").read_text()
    legend = 1
    assert picture.count("fill: #ffffff; stroke: #1f2933") == 3 + legend
    assert picture.count("fill: #1f2933; stroke: #1f2933") == 2 + legend


def test_a_run_without_spans_or_budget_is_a_curve(tmp_path):
    draw_memory(tmp_path / "curve.svg", samples(), [], None)
    shown = texts(tmp_path / "curve.svg")
    assert "peak 100.0 MiB" in shown
    assert not any("budget" in text or "exit" in text or text == "read" for text in shown)


def test_what_is_not_known_is_not_drawn(tmp_path):
    draw_memory(tmp_path / "curve.svg", samples(anon=False), [], None)
    assert "anonymous part" not in texts(tmp_path / "curve.svg")


@pytest.mark.parametrize(("peak_mib", "color"), [(100, "#1d4e89"), (128, "#1d4e89"), (129, "#c62828")])
def test_a_peak_over_the_budget_turns_red(tmp_path, peak_mib, color):
    draw_memory(tmp_path / "peak.svg", samples(peak_mib), [], 128 * MIB)
    root = ET.parse(tmp_path / "peak.svg").getroot()
    styles = {"".join(node.itertext()): node.get("style") for node in root.iter("{http://www.w3.org/2000/svg}text")}
    assert color in styles[f"peak {peak_mib}.0 MiB"]


def test_equal_inputs_give_equal_bytes(tmp_path):
    for suffix in ("svg", "png"):
        first, second = tmp_path / f"1.{suffix}", tmp_path / f"2.{suffix}"
        for path in (first, second):
            draw_memory(path, samples(), layers(), 128 * MIB)
        assert first.read_bytes() == second.read_bytes()
    assert "dc:date" not in (tmp_path / "1.svg").read_text()
    assert (tmp_path / "1.png").read_bytes().startswith(b"\x89PNG\r\n")


HOSTILE = "$\\frac{1}$\n\x1b[31m\x00 <script>&\"' \ufffe\udc80 \u202e层"


def test_hostile_names_are_only_text(tmp_path):
    draw_memory(tmp_path / "hostile.svg", samples(), layers(1, HOSTILE, seconds=0.08), 128 * MIB, title=HOSTILE)
    shown = "$\\frac{1}$\\n\\x1b[31m\\x00 <script>&\"' \\ufffe\\udc80 \\u202e层"
    assert texts(tmp_path / "hostile.svg").count(shown) == 2
    draw_memory(tmp_path / "hostile.png", samples(), layers(1, HOSTILE, seconds=0.08), 128 * MIB, title=HOSTILE)


@given(st.text(st.characters(), max_size=200))
def test_a_label_is_one_short_line_of_xml(text):
    label = _label(text)
    assert len(label) <= 80
    assert len(label.splitlines()) <= 1
    assert (ET.fromstring(f"<text>{escape(label)}</text>").text or "") == label


def test_a_label_in_any_script_is_kept():
    assert _label("größer 层 أ $x$") == "größer 层 أ $x$"


def test_the_callers_matplotlib_is_left_as_it_was(tmp_path):
    import matplotlib as mpl

    with mpl.rc_context({"svg.fonttype": "path", "font.size": 30}):
        before = dict(mpl.rcParams)
        draw_memory(tmp_path / "memory.svg", samples(), layers(), 128 * MIB)
        assert dict(mpl.rcParams) == before
    assert "peak 100.0 MiB" in texts(tmp_path / "memory.svg")


@pytest.mark.parametrize("name", ["memory.pdf", "memory", "memory.SVG.txt"])
def test_another_format_is_refused(tmp_path, name):
    with pytest.raises(ValueError, match=r"must end in \.svg or \.png"):
        draw_memory(tmp_path / name, samples(), [], None)


def test_no_samples_are_refused(tmp_path):
    with pytest.raises(ValueError, match="samples must not be empty"):
        draw_memory(tmp_path / "memory.svg", [], layers(), None)


def test_without_matplotlib_the_extra_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(MissingExtraError, match=r"matplotlib is not installed - pip install 'offramp\[report\]'"):
        draw_memory(tmp_path / "memory.svg", samples(), [], None)
    assert not list(tmp_path.iterdir())


def test_the_module_alone_imports_no_drawing_library():
    code = "import sys, offramp.reporting.memory; print({'matplotlib', 'numpy'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], check=True, capture_output=True).stdout == b"set()\n"
