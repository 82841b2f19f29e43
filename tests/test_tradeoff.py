import re
from xml.etree import ElementTree

import pytest

from captioner.report.tradeoff import Point, draw_tradeoff

SVG = "{http://www.w3.org/2000/svg}"


def labels(drawn):
    """Numbers below the horizontal axis."""
    texts = list(ElementTree.fromstring(drawn).iter(f"{SVG}text"))
    middle = [e for e in texts if e.get("text-anchor") == "middle" and e.get("transform") is None]
    return [float(e.text) for e in middle if re.fullmatch(r"[\d.]+", e.text)]


def test_dearer_lies_right_and_better_lies_up():
    points = [Point("A<B", "cheap", 0.1, 0.2, 0.15, 0.25), Point("A<B", "$dear$", 1.0, 0.4, 0.35, 0.45)]
    points.append(Point("other", "only", 0.5, 0.3, 0.3, 0.3))
    text = draw_tradeoff(points, "GFLOPs", "CIDEr")
    drawn = ElementTree.fromstring(text)
    dots = [group for group in drawn.iter(f"{SVG}g") if group.get("class") == "point"]
    titles = [dot.find(f"{SVG}title").text for dot in dots]
    assert [title.split(":")[0] for title in titles] == ["A<B cheap", "A<B $dear$", "other only"]
    places = [re.search(r"translate\((\S+) (\S+)\)", dot.find(f"{SVG}path").get("transform")) for dot in dots]
    (x1, y1), (x2, y2), (x3, y3) = [(float(place[1]), float(place[2])) for place in places]
    assert x1 < x3 < x2
    assert y1 > y3 > y2
    shown = {element.text for element in drawn.iter(f"{SVG}text")}
    assert {"A<B", "other", "cheap", "$dear$", "only", "GFLOPs", "CIDEr"} <= shown
    assert draw_tradeoff(points, "GFLOPs", "CIDEr") == text


def test_one_point_can_be_drawn_and_none_cannot():
    ElementTree.fromstring(draw_tradeoff([Point("A", "a", 1, 0.5, 0.5, 0.5)], "GFLOPs", "CIDEr"))
    with pytest.raises(ValueError, match="needs points"):
        draw_tradeoff([], "GFLOPs", "CIDEr")
    with pytest.raises(ValueError, match="costs above 0"):
        draw_tradeoff([Point("A", "a", 0, 0.5, 0.5, 0.5)], "GFLOPs", "CIDEr")


@pytest.mark.parametrize("costs", [(0.2, 1.3), (3.5,), (4.1, 4.2), (1, 1000), (1e-3, 1e6)])
def test_the_cost_axis_has_a_few_labels(costs):
    found = labels(draw_tradeoff([Point("A", "a", cost, 0.5, 0.4, 0.6) for cost in costs], "GFLOPs", "CIDEr"))
    assert 2 <= len(found) <= 10
    assert found == sorted(found)
    if costs == (0.2, 1.3):
        assert found == [0.2, 0.5, 1.0]
