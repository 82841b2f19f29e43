"""Reading the Markdown pages: their fenced blocks, the commands in them, and a folder where these can run."""

import json
import re
import shlex
import shutil
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

ROOT = Path(__file__).parents[1]
PAGES = ["README.md", "CONTRIBUTING.md", "SECURITY.md", "captioner/weights/README.md", "examples/README.md"]
PAGES += sorted(str(path.relative_to(ROOT)) for path in (ROOT / "docs").glob("*.md"))

FENCE = re.compile(r"^(?:<!-- (?P<marker>[^\n]*?) -->\n)?```(?P<language>\w*)\n(?P<text>.*?)^```$", re.M | re.S)

COLOURS = {"red": (220, 30, 30), "green": (30, 200, 40), "blue": (30, 40, 220), "white": (250, 250, 250)}


@dataclass
class Block:
    """A fenced block: the page and line it stands in, its language, the comment before it, its text."""

    page: str
    line: int
    language: str
    marker: str
    text: str

    @property
    def runs(self) -> bool:
        return self.language in ("sh", "python") and not self.marker.startswith("not run: ")


def read_page(page: str) -> str:
    return (ROOT / page).read_text()


def read_blocks(page: str) -> list[Block]:
    text = read_page(page)
    return [
        Block(page, text[: found.start()].count("\n") + 1, found["language"], found["marker"] or "", found["text"])
        for found in FENCE.finditer(text)
    ]


def split_commands(text: str) -> list[list[str]]:
    """Split a block of shell text into lines of words; `|`, `&&` and `>` are words of their own."""
    lines = []
    for line in text.replace("\\\n", " ").splitlines():
        lexer = shlex.shlex(line, posix=True, punctuation_chars="|&><")
        lexer.whitespace_split, lexer.commenters = True, "#"
        if words := list(lexer):
            lines.append(words)
    return lines


def split_pipeline(words: list[str]) -> list[list[str]]:
    """Split a line into its programs, without redirections."""
    programs: list[list[str]] = [[]]
    skip = False
    for word in words:
        if skip or word == ">":
            skip = word == ">"
        elif word in ("|", "&&"):
            programs.append([])
        else:
            programs[-1].append(word)
    return programs


def make_world(folder: Path, page: str) -> None:
    """Make small stand-ins for the data that the pages name."""
    shutil.copytree(ROOT / "examples", folder / "examples")
    shutil.copy(ROOT / "examples/cat.jpg", folder / "cat.jpg")
    make_coco(folder / "flickr8k", {"train": 12, "val": 4, "test": 4})
    make_coco(folder / "coco2017", {"val2017": 4})
    (folder / "coco2017/images").rename(folder / "val2017")
    (folder / "coco2017/annotations/captions_val2017.json").rename(folder / "captions_val2017.json")
    make_results(folder)
    make_table(folder / "mine")
    (folder / "holiday").mkdir()
    (folder / "scans").mkdir()
    for name, colour in (("holiday/a.png", "red"), ("holiday/b.jpg", "green"), ("scans/c.tif", "blue")):
        Image.new("RGB", (40, 30), COLOURS[colour]).save(folder / name)
    Image.new("RGB", (40, 30), COLOURS["white"]).save(folder / "portrait.jpg")
    if page == "docs/captioning.md":  # all other pages train the captioners that they name
        shutil.copytree(ROOT / "captioner/weights", folder / "runs/mine/best")


def captions_of(number: int) -> list[str]:
    """Return five captions of the image of that number."""
    name = list(COLOURS)[number % 4]
    return [f"a plain {name} square", f"this is all {name}", f"{name} everywhere", f"a {name} wall", f"only {name}"]


def save_image(path: Path, number: int) -> None:
    """Save a plain image; no two numbers give the same."""
    colour = list(COLOURS.values())[number % 4]
    Image.new("RGB", (32, 32), tuple(min(255, value + number) for value in colour)).save(path)


def make_coco(root: Path, splits: dict[str, int]) -> None:
    """Make captioned images in COCO's layout, ids counted through all splits."""
    (root / "images").mkdir(parents=True)
    (root / "annotations").mkdir()
    number = 0
    for split, count in splits.items():
        content: dict[str, list] = {"images": [], "annotations": []}
        for _ in range(count):
            save_image(root / f"images/{number}.png", number)
            content["images"].append({"id": number, "file_name": f"{number}.png"})
            content["annotations"] += [{"image_id": number, "caption": text} for text in captions_of(number)]
            number += 1
        (root / f"annotations/captions_{split}.json").write_text(json.dumps(content))


def make_results(folder: Path) -> None:
    """Make captions of two systems, and Karpathy's annotations of the same images."""
    shutil.copy(folder / "captions_val2017.json", folder / "captions_train.json")
    images = []
    for number in range(4):
        sentences = [{"raw": text, "tokens": text.split()} for text in captions_of(number)]
        images.append({"cocoid": number, "filename": f"{number}.png", "split": "test", "sentences": sentences})
    (folder / "dataset_coco.json").write_text(json.dumps({"dataset": "coco", "images": images}))
    for name, text in (("results", "a plain square"), ("ours", "a wall of paint"), ("theirs", "a plain red square")):
        rows = [{"image_id": number, "caption": text} for number in range(4)]
        (folder / f"{name}.json").write_text(json.dumps(rows))


def make_table(root: Path) -> None:
    """Make a CSV beside its images, as the README describes one."""
    root.mkdir()
    lines = ["image,caption,split"]
    for number in range(12):
        save_image(root / f"{number}.png", number)
        split = "train" if number < 8 else "val"
        lines += [f"{number}.png,{text},{split}" for text in captions_of(number)]
    (root / "captions.csv").write_text("\n".join(lines) + "\n")
