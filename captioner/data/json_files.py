"""Read captions from a JSON document: of COCO, of Karpathy's splits, or a list of rows."""

from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

from captioner.data.captions import ImageId, plain_id
from captioner.data.records import NO_SPLIT, Record
from captioner.data.splits import SPLITS, NoSplitError, is_split_name, split_names


def is_karpathy(content: Any) -> bool:
    """Return whether a JSON document has the form of Karpathy's splits, and not of COCO."""
    images = content.get("images") if isinstance(content, dict) else None
    return isinstance(images, list) and bool(images) and isinstance(images[0], dict) and "sentences" in images[0]


def is_row_list(content: Any) -> bool:
    """Return whether a JSON document is a list of rows."""
    return isinstance(content, list) and bool(content) and all(isinstance(row, dict) for row in content)


def read_coco(content: Any, path: Path, split: str | None, images_needed: bool = True) -> Iterator[Record]:
    """Yield the records of COCO captions JSON. Captions whose image is not listed come last, in records without image.

    Args:
        content: the JSON document.
        path: its file, for errors.
        split: the requested split. The format does not contain splits, but the file's name may.
        images_needed: whether the images are opened later; then they must be listed, with file names.

    Raises:
        ValueError: the document is not COCO captions JSON, or the file's name contains another split.
    """
    wrong = f"'{path}' is neither COCO nor Karpathy captions"
    if not isinstance(content, dict):
        raise ValueError(f"{wrong}: it is no object with the list 'images'")
    annotations, images = content.get("annotations"), content.get("images")
    if not images_needed and images is None and annotations:
        images = []
    if not isinstance(images, list):
        raise ValueError(f"{wrong}: it has no list 'images'")
    if not isinstance(annotations, list):
        raise ValueError(f"'{path}' has no list 'annotations'; COCO test files hold no captions")
    found = [name for name in SPLITS if name in path.stem]
    named = found[0] if len(found) == 1 else None
    if split is not None and named is not None and is_split_name(split):
        if split not in split_names(named):
            raise NoSplitError(
                f"'{path}' holds the split '{named}' by its name, not '{split}'; name the folder of all splits"
            )
        split = named
    split = split or named or NO_SPLIT
    try:
        captions: dict[str, list] = {}
        ids: dict[str, Any] = {}
        for annotation in annotations:
            key = id_key(image_id := annotation["image_id"])
            if key not in captions:
                captions[key], ids[key] = [], image_id
            captions[key].append(annotation["caption"])
        if images_needed and images and not any("file_name" in image for image in images):
            raise ValueError(f"'{path}': every entry of 'images' lacks 'file_name'")
        for image in images:
            texts = captions.pop(id_key(image["id"]), [])
            yield Record(check_id(image["id"], path), image.get("file_name"), texts, split)
        listed = content.get("images") is None  # without a list of images, no image is missing in it
        for key, texts in captions.items():
            image_id = check_id(ids[key], path) if listed else plain_id(ids[key])
            yield Record(key if image_id is None else image_id, None, texts, split, listed=listed)
    except KeyError as error:
        raise ValueError(f"'{path}' is not COCO captions: an entry lacks {error}") from None
    except (TypeError, AttributeError) as error:
        raise ValueError(f"'{path}' is not COCO captions: an entry is of another form ({error})") from None


def read_karpathy(content: dict, path: Path, restval: bool = False) -> Iterator[Record]:
    """Yield the records of Karpathy's JSON, for COCO and for Flickr.

    Args:
        content: the JSON document.
        path: its file, for errors.
        restval: whether the split `restval` belongs to `train`.

    Raises:
        ValueError: the document is not Karpathy's JSON.
    """
    try:
        for image in content["images"]:
            split = "train" if restval and image["split"] == "restval" else str(image["split"])
            name = PurePosixPath(image.get("filepath") or "", image["filename"]) if "filename" in image else None
            image_id = check_id(image["cocoid"] if "cocoid" in image else image["imgid"], path)
            captions = [sentence["raw"] for sentence in image["sentences"]]
            yield Record(image_id, None if name is None else str(name), captions, split)
    except KeyError as error:
        raise ValueError(f"'{path}' is not Karpathy captions: an entry lacks {error}") from None
    except (TypeError, AttributeError) as error:
        raise ValueError(f"'{path}' is not Karpathy captions: an entry is of another form ({error})") from None


def id_key(value: Any) -> str:
    """Return an id as text for comparisons: 7, 7.0 and "7" are one id."""
    return str(value if value.__class__ in (int, str) else plain_id(value))


def check_id(value: Any, path: Path) -> ImageId:
    """Return an image id as a whole number or text.

    Raises:
        ValueError: the id is neither a whole number nor text.
    """
    if (image_id := plain_id(value)) is None:
        raise ValueError(f"'{path}': an image id is neither a whole number nor text: {value!r}"[:300])
    return image_id
