from __future__ import annotations

import xml.etree.ElementTree as ET

from hypothesis import given
from hypothesis import strategies as st

from offramp.reporting.stages import StageBox, draw_stages

SVG = "{http://www.w3.org/2000/svg}"
words = st.text(st.characters(codec="utf-8", exclude_categories=("Cc", "Cs")), max_size=120)


def texts(picture):
    return [element.text or "" for element in ET.fromstring(picture).iter(SVG + "text")]


def test_a_picture_names_stages_flows_shared_weights_and_exits():
    boxes = [
        StageBox("the inputs", "3 tensors, 1.0 MiB", (), ("weights-000",)),
        StageBox("layers.1", "9 tensors, 2.0 MiB", ("float32 2x16x32", "bool 2x1"), (), has_exit=True),
    ]
    picture = draw_stages("Model: 2 stages", boxes)
    assert texts(picture) == [
        "Model: 2 stages", "the inputs", "3 tensors, 1.0 MiB", "shared: weights-000",
        "float32 2x16x32, bool 2x1", "exit", "layers.1", "9 tensors, 2.0 MiB",
    ]  # fmt: skip
    assert len(list(ET.fromstring(picture).iter(SVG + "circle"))) == 1


@given(
    st.lists(st.builds(StageBox, words, words, st.lists(words, max_size=9), st.lists(words, max_size=3)), max_size=5)
)
def test_names_of_strangers_cannot_break_the_picture_nor_leave_it(boxes):
    root = ET.fromstring(draw_stages("<&>", boxes))
    height = int(root.attrib["height"])
    assert all(float(e.get("y", 0)) + float(e.attrib["height"]) <= height for e in root.iter(SVG + "rect"))
    assert sum(1 for e in root.iter(SVG + "rect") if e.attrib.get("rx")) == len(boxes)
