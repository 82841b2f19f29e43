"""Which classes of a vocabulary are in which image: label files, as people write them.

Two forms are read: `{"classes": [names], "images": {file name: [class numbers]}}`, and COCO's `instances_*.json`
(`categories`, `images`, `annotations`).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from captioner.text_files import parse_json_text, read_text


@dataclass(frozen=True)
class ImageLabels:
    """Labels of images, several for each.

    Attributes:
        classes: names of the K classes.
        images: for each image, by the name of its file without folders, the numbers of its classes, sorted.
    """

    classes: list[str]
    images: dict[str, list[int]]


def read_labels(path: Path) -> ImageLabels:
    """Read a label file.

    Raises:
        ValueError: it is of neither form, or an image has a class that does not exist.
        OSError: the file cannot be read.
    """
    content = parse_json_text(read_text(path), path)
    if isinstance(content, dict) and {"categories", "images", "annotations"} <= content.keys():
        found = read_instances(content, path)
    elif isinstance(content, dict) and {"classes", "images"} <= content.keys():
        found = read_classes(content, path)
    else:
        raise ValueError(f"'{path}' holds no labels: it needs 'classes' and 'images', or is COCO's instances")
    if not found.images:
        raise ValueError(f"'{path}' labels no image")
    return found


def read_classes(content: Mapping[str, Any], path: Path) -> ImageLabels:
    """Read `{"classes": [names], "images": {file name: [class numbers]}}`."""
    classes, images = content["classes"], content["images"]
    if not isinstance(classes, list) or not all(isinstance(name, str) for name in classes):
        raise ValueError(f"'{path}': 'classes' is not a list of names")
    if len(set(classes)) < len(classes):
        twice = next(name for name in classes if classes.count(name) > 1)
        raise ValueError(f"'{path}': the class '{twice}' is listed twice")
    if not isinstance(images, dict):
        raise ValueError(f"'{path}': 'images' does not map file names to class numbers")
    labels: dict[str, list[int]] = {}
    for file, numbers in images.items():
        if not isinstance(numbers, list) or not all(type(number) is int for number in numbers):
            raise ValueError(f"'{path}': the classes of '{file}' are not a list of numbers")
        if wrong := [number for number in numbers if not 0 <= number < len(classes)]:
            raise ValueError(f"'{path}': '{file}' has class {wrong[0]}, but there are {len(classes)}, from 0")
        name = file.replace("\\", "/").rpartition("/")[2]
        if labels.setdefault(name, sorted(set(numbers))) != sorted(set(numbers)):
            raise ValueError(f"'{path}': two images are named '{name}', with different classes")
    return ImageLabels(classes, labels)


def read_instances(content: Mapping[str, Any], path: Path) -> ImageLabels:
    """Read COCO's instances; an image without an annotation has no class."""
    try:
        names = {category["id"]: category["name"] for category in content["categories"]}
        numbers = {number: place for place, number in enumerate(names)}
        files = {image["id"]: image["file_name"].rpartition("/")[2] for image in content["images"]}
        found: dict[str, set[int]] = {file: set() for file in files.values()}
        for annotation in content["annotations"]:
            found[files[annotation["image_id"]]].add(numbers[annotation["category_id"]])
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"'{path}' is not COCO's instances: an entry lacks {error}") from None
    return ImageLabels(list(names.values()), {file: sorted(classes) for file, classes in found.items()})
