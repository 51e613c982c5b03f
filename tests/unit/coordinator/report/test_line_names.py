import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from coordinator.report import drawing
from coordinator.report.charts import Key, Line, Scale
from coordinator.report.line_names import spread
from tests.support.html_page import Page

wishes = st.lists(st.floats(-1, 2), max_size=40)


@given(wanted=wishes, gap=st.floats(0, 0.5))
def test_names_are_apart_in_order_and_inside(wanted, gap):
    places = spread(wanted, gap=gap)
    ordered = [places[i] for i in np.argsort(wanted, kind="stable")]
    assert all(-1e-9 <= place <= 1 + 1e-9 for place in places)
    apart = min(gap, 1 / max(len(wanted) - 1, 1))
    assert (np.diff(ordered) >= apart - 1e-9).all()


def test_names_with_room_stand_where_they_are_wanted():
    assert spread([0.9, 0.1, 0.5], gap=0.1) == [0.9, 0.1, 0.5]
    assert spread([], gap=0.1) == []


def test_names_at_the_top_push_those_below_them_down():
    assert spread([1.0, 1.0, 0.95], gap=0.1) == pytest.approx([0.9, 1.0, 0.8])


def chart(*lines, **scale):
    with drawing.style():
        return drawing.line_chart("A", lines, scale=Scale(x="steps", y="loss", **scale), named=True)


def test_a_chart_with_names_at_its_lines_needs_no_legend():
    lines = [Line(xs=[1, 2, 3], ys=[3, 2, y], key=Key(name, "#111111")) for name, y in
             [("<ada>", 1.0), ("bob", 1.0), ("cyd", float("nan"))]]  # fmt: skip
    drawn = chart(*lines)
    assert drawn.keys == ()
    words = Page(drawn.svg).text
    assert all(name in words for name in ("<ada>", "bob", "cyd"))


def test_bands_and_logarithmic_axes_are_drawn_and_what_is_above_is_cut_off():
    band = ([90, 8, 7.5], [110, 9, 8.0])
    line = Line(xs=[0, 10, 1000], ys=[100, 8.5, 7.8], key=Key("ada", "#111111"), band=band)
    whole = chart(line).svg
    assert "fill-opacity: 0.16" in whole
    assert "fill-opacity: 0.16" not in chart(Line(xs=[0, 1], ys=[1, 2], key=line.key)).svg
    assert ">100<" in whole
    cut = chart(line, highest=10.0, whole_x=False).svg
    assert ">100<" not in cut
    assert ">8.0<" in cut
    numbers = Page(chart(line, log_x=True, whole_x=False, log=True).svg).text.split()
    assert {"10", "100", "1,000"} <= set(numbers)


def test_a_chart_of_which_all_is_above_is_still_a_chart():
    lines = [Line(xs=[1, 2], ys=[50, 40], key=Key("ada", "#111111"))]
    assert chart(*lines, highest=10.0) is not None
