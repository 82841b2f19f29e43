"""Captions and references that the tests of scoring files share."""

FAST = ("--metrics", "BLEU", "ROUGE-L", "CIDEr")
CAPTIONS = {
    11: ["A dog runs through the grass.", "the dog is running", "a brown dog runs", "dog in a field", "a dog outside"],
    12: ["Two men on a beach", "men at the sea", "two people on sand", "men walk on a beach", "a beach with two men"],
    13: ["A cat sits on a red chair", "the cat sits", "a cat on furniture", "a cat rests", "cat on a chair"],
}
GOOD = {11: "a dog runs in the grass", 12: "two men walk on a beach", 13: "a cat sits on a chair"}
POOR = {11: "a dog", 12: "a man in the snow", 13: "two dogs run"}


def results(captions):
    return [{"image_id": n, "caption": text} for n, text in captions.items()]


def coco(captions=CAPTIONS):
    rows = [
        {"image_id": n, "id": 10 * n + k, "caption": c} for n, group in captions.items() for k, c in enumerate(group)
    ]
    return {"images": [{"id": n, "file_name": f"{n:012d}.jpg"} for n in captions], "annotations": rows}


def karpathy(splits=("test", "test", "train")):
    images = [
        {"filename": f"{n}.jpg", "imgid": n, "split": split, "sentences": [{"raw": text} for text in group]}
        for (n, group), split in zip(CAPTIONS.items(), splits, strict=True)
    ]
    return {"images": images, "dataset": "flickr8k"}
