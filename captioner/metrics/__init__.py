"""The official caption scores. BLEU, ROUGE-L and CIDEr-D need no Java; METEOR and SPICE do.

```python
from captioner.metrics import score

scores = score({1: "a dog runs"}, {1: ["a dog is running", "the dog runs fast"]})
print(scores["CIDEr"], scores.image(1), scores.warnings)
```
"""

from captioner.metrics.cider import CiderD, DocumentFrequency
from captioner.metrics.compare import Difference, Interval, confidence, paired_test
from captioner.metrics.explain import NGramMatch, matched_ngrams
from captioner.metrics.files import ReferenceSet, read_references, read_results
from captioner.metrics.matching import match_ids
from captioner.metrics.ptb.tokenizer import tokenize, tokenize_caption
from captioner.metrics.scores import KEYS, METRICS, Scores, score
from captioner.metrics.statistics import CaptionStatistics, caption_statistics
from captioner.metrics.torchmetric import CaptionMetric

__all__ = [
    "KEYS",
    "METRICS",
    "CaptionMetric",
    "CaptionStatistics",
    "CiderD",
    "Difference",
    "DocumentFrequency",
    "Interval",
    "NGramMatch",
    "ReferenceSet",
    "Scores",
    "caption_statistics",
    "confidence",
    "match_ids",
    "matched_ngrams",
    "paired_test",
    "read_references",
    "read_results",
    "score",
    "tokenize",
    "tokenize_caption",
]
