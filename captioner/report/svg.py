"""Figures of matplotlib as SVG, which is the same in each run and safe in any page.

matplotlib's own output is a document with inline styles, ids and references. A page with a strict content security
policy blocks inline styles, and two figures in one page must not share ids. `Drawing.svg` therefore turns styles into
attributes (which the style sheet of the page may override, by the classes of `Drawing.mark`), and removes ids,
references and metadata.
"""

import io
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING
from xml.etree import ElementTree

if TYPE_CHECKING:
    from matplotlib.artist import Artist
    from matplotlib.figure import Figure

NAMESPACE = "http://www.w3.org/2000/svg"
REFERENCE = "{http://www.w3.org/1999/xlink}href"

COLOURS = ("#0b6e8a", "#c2571a", "#5a7d2a", "#7a4aa0")
"""Colours of lines and points, by the number of their series; on white, text in each of them is readable."""

INK, SOFT, LINE = "#1d2126", "#5d656e", "#dedcd4"
"""Colours of titles, of labels, and of axes and grid lines, as in the pages."""

MARGIN = 10
"""White space around the figure of an SVG file, in CSS pixels."""

STYLE = {
    "svg.fonttype": "none",  # text stays text: small, searchable, in the reader's font
    "svg.hashsalt": "captioner",
    "text.parse_math": False,  # a dollar sign in a name is a dollar sign
    "font.size": 11,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "axes.edgecolor": LINE,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.labelcolor": SOFT,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
    "axes.titlecolor": INK,
    "axes.titlelocation": "left",
    "axes.titlesize": 12,
    "axes.titleweight": "bold",
    "grid.color": LINE,
    "xtick.color": LINE,
    "ytick.color": LINE,
    "xtick.labelcolor": SOFT,
    "ytick.labelcolor": SOFT,
    "xtick.major.size": 0,
    "xtick.major.pad": 5,
    "ytick.major.size": 0,
    "legend.frameon": False,
    "legend.labelcolor": "linecolor",
}


class Drawing:
    """A matplotlib figure, and the names and tooltips of what is drawn in it."""

    def __init__(self, figure: "Figure"):
        self.figure = figure
        self.marks: dict[str, tuple[str, str]] = {}

    def mark(self, artist: "Artist", classes: str, tooltip: str = "") -> None:
        """Give an artist CSS classes, separated by spaces, and a tooltip."""
        name = f"mark-{len(self.marks)}"
        artist.set_gid(name)
        self.marks[name] = (classes, tooltip)

    def svg(self, label: str, classes: str = "") -> str:
        """Return the figure as one `<svg>` element for an HTML page; the page gives it its size.

        Args:
            label: content of the figure, for screen readers.
            classes: CSS classes of the element.
        """
        root = self._element(label)
        if classes:
            root.set("class", classes)
        return ElementTree.tostring(root, "unicode")

    def document(self, label: str) -> str:
        """Return the figure as the content of an SVG file, with a white background.

        Args:
            label: content of the figure, for screen readers.
        """
        self.figure.set_facecolor("white")
        self.figure.set_layout_engine("constrained", w_pad=MARGIN / 72, h_pad=MARGIN / 72)
        root = self._element(label)
        width, height = root.attrib["viewBox"].split()[2:]
        root.attrib = {"xmlns": NAMESPACE, "width": width, "height": height, **root.attrib}
        return ElementTree.tostring(root, "unicode") + "\n"

    def _element(self, label: str) -> ElementTree.Element:
        file = io.StringIO()
        with warnings.catch_warnings():
            # The fonts here only measure the text, which the reader's fonts draw; they may lack some letters.
            warnings.filterwarnings("ignore", message="Glyph .* missing from font")
            self.figure.savefig(file, format="svg")
        drawn = ElementTree.fromstring(file.getvalue())
        _expand_references(drawn)
        root = ElementTree.Element("svg", {"viewBox": drawn.attrib["viewBox"], "role": "img", "aria-label": label})
        root.attrib |= {"font-family": "system-ui, sans-serif", "stroke-linejoin": "round", "stroke-linecap": "butt"}
        root.extend(self._simplify(drawn))
        return root

    def _simplify(self, parent: ElementTree.Element) -> Iterator[ElementTree.Element]:
        """Yield the content of an element, without ids, styles and groups that have no effect."""
        for child in parent:
            tag = child.tag.rpartition("}")[2]
            if tag in ("metadata", "defs"):
                continue
            found = ElementTree.Element(tag, _attributes(child))
            found.text = child.text if tag == "text" else None
            if tag == "path":
                found.set("d", _rounded(" ".join(child.get("d", "").split())))
                if not found.get("d") or (found.get("fill") == "none" and "stroke" not in found.attrib):
                    continue  # invisible, such as the background of a transparent figure
            classes, tooltip = self.marks.get(child.get("id", ""), ("", ""))
            if classes:
                found.set("class", classes)
            if tooltip:
                ElementTree.SubElement(found, "title").text = tooltip
            found.extend(self._simplify(child))
            if tag == "g" and not found.attrib and not tooltip:
                yield from found
            else:
                yield found


@contextmanager
def drawing(width: float, height: float) -> Iterator[Drawing]:
    """Return a context with a figure in the style of the pages; its SVG must be taken inside the context.

    Args:
        width: width in CSS pixels, at which text has its natural size.
        height: height in CSS pixels.
    """
    from matplotlib import style  # loading it takes half a second, and few commands draw
    from matplotlib.figure import Figure

    with style.context(["default", STYLE]):
        yield Drawing(Figure(figsize=(width / 72, height / 72), layout="constrained"))  # 72 units per inch


def _expand_references(root: ElementTree.Element) -> None:
    """Replace matplotlib's references to shapes by the shapes, so that the figure needs no ids."""
    shapes = {element.get("id"): element for element in root.iter(f"{{{NAMESPACE}}}path") if element.get("id")}
    for element in root.iter(f"{{{NAMESPACE}}}use"):
        shape = shapes[element.attrib.pop(REFERENCE).removeprefix("#")]
        x, y = (float(element.attrib.pop(name)) for name in ("x", "y"))
        element.tag = shape.tag
        element.attrib |= {"d": shape.attrib["d"], "transform": f"translate({x:.2f} {y:.2f})"}
        element.set("style", f"{shape.get('style', '')}; {element.get('style', '')}")


def _attributes(element: ElementTree.Element) -> dict[str, str]:
    """Return the visible attributes of an element: also those of its inline style; numbers are rounded."""
    found = {name: _rounded(element.attrib[name]) for name in ("x", "y", "transform") if element.get(name)}
    if found.get("transform", "").startswith(("rotate(-0 ", "rotate(0 ")):
        del found["transform"]
    for declaration in element.get("style", "").split(";"):
        name, _, value = (part.strip() for part in declaration.partition(":"))
        if name and name != "font-family":  # the reader's own fonts
            found[name] = value
    return found


def _rounded(numbers: str) -> str:
    """Round the numbers of a path or a transform to a hundredth of a pixel."""
    return re.sub(r"-?\d+\.\d{3,}", lambda match: f"{float(match[0]):.2f}", numbers)
