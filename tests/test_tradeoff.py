from xml.etree import ElementTree

import pytest

from captioner.report.tradeoff import Point, cost_ticks, draw_tradeoff

SVG = "{http://www.w3.org/2000/svg}"


def test_dearer_lies_right_and_better_lies_up():
    points = [Point("A<B", "cheap", 0.1, 0.2, 0.15, 0.25), Point("A<B", "dear", 1.0, 0.4, 0.35, 0.45)]
    points.append(Point("other", "only", 0.5, 0.3, 0.3, 0.3))
    drawn = ElementTree.fromstring(draw_tradeoff(points, "GFLOPs", "CIDEr"))
    dots = [(float(c.get("cx")), float(c.get("cy")), c.find(f"{SVG}title").text) for c in drawn.iter(f"{SVG}circle")]
    assert [title.split(":")[0] for _, _, title in dots] == ["A<B cheap", "A<B dear", "other only"]
    (x1, y1, _), (x2, y2, _), (x3, y3, _) = dots
    assert x1 < x3 < x2
    assert y1 > y3 > y2


def test_one_point_can_be_drawn_and_none_cannot():
    ElementTree.fromstring(draw_tradeoff([Point("A", "a", 1, 0.5, 0.5, 0.5)], "GFLOPs", "CIDEr"))
    with pytest.raises(ValueError, match="needs points"):
        draw_tradeoff([], "GFLOPs", "CIDEr")
    with pytest.raises(ValueError, match="costs above 0"):
        draw_tradeoff([Point("A", "a", 0, 0.5, 0.5, 0.5)], "GFLOPs", "CIDEr")


def test_ticks_are_round():
    assert cost_ticks(0.15, 3) == [0.2, 0.5, 1.0, 2.0]
