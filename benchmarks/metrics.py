"""Caption scores: this package against pycocoevalcap with its Java tokenizer, in one run.

    python benchmarks/metrics.py --data ../shared/data

Every image of COCO val2017 (5,000) is scored by its first reference against its others (20,014). The reward is timed as
SCST uses it: batches of 50 Flickr8k training images with 5 samples each, statistics of the training split.
"""

import argparse
import json
import random
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from pycocoevalcap.bleu.bleu import Bleu
from pycocoevalcap.cider.cider import Cider
from pycocoevalcap.cider.cider_scorer import CiderScorer, cook_refs
from pycocoevalcap.meteor.meteor import Meteor
from pycocoevalcap.rouge.rouge import Rouge
from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

from captioner.metrics import CiderD, DocumentFrequency, java, overlap, score, tokenize
from captioner.metrics.ngrams import NGrams, ReferenceIndex, flatten
from captioner.metrics.ptb import tokenizer as ptb

Captions = dict[int, list[str]]


class RewardScorer(CiderScorer):
    """pycocoevalcap's scorer with the training split's statistics in place of the batch's."""

    images = 0
    ref_len = property(lambda self: np.log(float(self.images)), lambda self, value: None)


def read(path: Path) -> Captions:
    """Read a COCO captions file: captions by image id."""
    captions: Captions = {}
    for row in json.loads(path.read_text())["annotations"]:
        captions.setdefault(row["image_id"], []).append(row["caption"])
    return captions


def timed(call: Callable, repeats: int = 1) -> tuple[float, object]:
    """Return the median of the seconds a call takes, and its result."""
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        result = call()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds), result


def java_tokens(captions: Captions) -> Captions:
    """Tokenize by pycocoevalcap."""
    return PTBTokenizer().tokenize({n: [{"caption": text} for text in group] for n, group in captions.items()})


def fresh_tokens(captions: list[str]) -> list[str]:
    """Tokenize with nothing remembered, as a new process would."""
    ptb._WORDS.clear()
    return tokenize(captions)


def row(name: str, theirs: float, ours: float, note: str = "") -> None:
    """Print one line of the table."""
    print(f"| {name:<38} | {theirs:9.3f} | {ours:9.3f} | {theirs / ours:6.1f}x | {note} |", flush=True)


def scores(path: Path) -> None:
    """Print times and differences of the whole evaluation and of its parts."""
    captions = read(path)
    predictions = {n: group[0] for n, group in captions.items()}
    references = {n: group[1:] for n, group in captions.items()}
    flat = [text for group in captions.values() for text in group]
    print(f"{len(captions):,} images, {len(flat):,} captions\n")
    print("| what | pycocoevalcap, s | captioner, s | ratio | equal? |\n|---|---|---|---|---|")

    java_seconds, expected = timed(lambda: java_tokens(captions))
    fresh_seconds, tokens = timed(lambda: fresh_tokens(flat), 3)
    wrong = sum(a != b for a, b in zip(tokens, [text for group in expected.values() for text in group], strict=True))
    row("tokenizer, 25,014 captions, cold", java_seconds, fresh_seconds, f"{wrong} captions differ")

    split = timed(lambda: (java_tokens({n: [text] for n, text in predictions.items()}), java_tokens(references)))
    theirs, (predicted, referred) = split
    parts, found = {"tokenizer (twice: predictions, references)": theirs}, {}
    for name, scorer in (("BLEU", Bleu(4)), ("ROUGE-L", Rouge()), ("CIDEr", Cider())):
        options = {"verbose": 0} if name == "BLEU" else {}
        parts[name], (value, _) = timed(lambda s=scorer, o=options: s.compute_score(referred, predicted, **o))
        found |= {f"BLEU-{n + 1}": value[n] for n in range(4)} if name == "BLEU" else {name: value}
    ptb._WORDS.clear()
    seconds, ours = timed(lambda: score(predictions, references, metrics=("BLEU", "ROUGE-L", "CIDEr")))
    difference = max(abs(ours[name] - value) for name, value in found.items())
    whole = sum(parts.values())
    row("BLEU + ROUGE-L + CIDEr with tokenizer", whole, seconds, f"largest difference {difference:.0e}")

    grams = NGrams()
    image_of, lines = flatten(dict(enumerate(ours.references)))
    count, counts = timed(lambda: grams.count(lines, learn=True))
    images = np.arange(len(captions))
    build, index = timed(lambda: ReferenceIndex(counts, image_of, len(images), grams.size))
    some, hypotheses = timed(lambda: grams.count(ours.predictions))
    bleu, _ = timed(lambda: overlap.bleu(overlap.bleu_statistics(index, images, hypotheses)))
    cider, _ = timed(lambda: CiderD.from_index(index, counts).score_counts(images, hypotheses))
    pairs = list(zip(ours.predictions, ours.references, strict=True))
    rouge, _ = timed(lambda: [overlap.rouge_l(caption, others) for caption, others in pairs])
    row("  tokenizer (cold)", parts.pop("tokenizer (twice: predictions, references)"), fresh_seconds)
    row("  BLEU and CIDEr, which share n-grams", parts["BLEU"] + parts["CIDEr"], count + build + some + bleu + cider)
    row("  ROUGE-L", parts["ROUGE-L"], rouge)

    if java.missing_java() is None:
        theirs, (value, _) = timed(lambda: Meteor().compute_score(referred, predicted))
        seconds, statistic = timed(lambda: java.meteor_statistics(ours.predictions, ours.references))
        difference = abs(float(java.meteor(statistic.sum(axis=0))) - value)
        row("METEOR (the same jar)", theirs, seconds, f"difference {difference:.0e}")
    print("\n" + ", ".join(f"{name} {value:.16f}" for name, value in ours.corpus.items()))


def reward(path: Path, batches: int = 20, images: int = 50, samples: int = 5) -> None:
    """Print captions per second of the CIDEr-D reward."""
    captions = read(path)
    tokens = iter(tokenize([text for group in captions.values() for text in group]))
    train = {n: [next(tokens) for _ in group] for n, group in captions.items()}
    chance = random.Random(0)
    everything = [text for group in train.values() for text in group]

    def sample(image_id: int) -> str:
        """Make up what a model might sample: a reference with some words of other captions."""
        words = chance.choice(train[image_id]).split()
        for _ in range(chance.randint(0, 6)):
            words[chance.randrange(len(words))] = chance.choice(chance.choice(everything).split())
        return " ".join(words)

    work = []
    for _ in range(batches):
        ids = [image_id for image_id in chance.sample(list(train), images) for _ in range(samples)]
        work.append((ids, [sample(image_id) for image_id in ids]))

    document_counts: dict[tuple, float] = {}
    for group in train.values():
        for ngram in {ngram for counts in cook_refs(group) for ngram in counts}:
            document_counts[ngram] = document_counts.get(ngram, 0.0) + 1

    def theirs(ids: list[int], texts: list[str]) -> np.ndarray:
        scorer = RewardScorer(n=4, sigma=6.0)
        scorer.images = len(train)
        for image_id, text in zip(ids, texts, strict=True):
            scorer += (text, train[image_id])
        scorer.document_frequency = _Defaulting(document_counts)
        return np.array(scorer.compute_cider())

    prepare, scorer = timed(lambda: CiderD(train, DocumentFrequency(train)))
    slow, fast, difference = [], [], 0.0
    for ids, texts in work:
        seconds, expected = timed(lambda ids=ids, texts=texts: theirs(ids, texts))
        slow.append(seconds)
        seconds, found = timed(lambda ids=ids, texts=texts: scorer.score(ids, texts))
        fast.append(seconds)
        difference = max(difference, float(np.abs(found - expected).max()))
    size, slower, faster = images * samples, statistics.median(slow), statistics.median(fast)
    print(f"\nCIDEr-D reward, {batches} batches of {images} images x {samples} samples, medians a batch:")
    print(f"pycocoevalcap {1e3 * slower:.1f} ms ({size / slower:,.0f} captions/s), ", end="")
    print(f"captioner {1e3 * faster:.1f} ms ({size / faster:,.0f} captions/s): {slower / faster:.0f}x, ", end="")
    print(f"largest difference {difference:.0e}; prepared once in {prepare:.1f} s for {len(train):,} images")


class _Defaulting(dict):
    """Document counts that are 0 where unknown, without growing."""

    def __missing__(self, ngram: tuple) -> float:
        return 0.0


def main() -> None:
    """Run both parts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("../shared/data"), help="folder with coco/ and flickr8k/")
    data = parser.parse_args().data
    scores(data / "coco/captions_val2017.json")
    reward(data / "flickr8k/annotations/captions_train.json")


if __name__ == "__main__":
    main()
