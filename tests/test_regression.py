import pytest
import torch

from captioner.pretraining.regression import FOLDS, TeacherRegression, describe

IMAGES, FEATURES, WORDS = 200, 6, 3


def make(words, features):
    rows = torch.arange(IMAGES)
    examples = ((rows[part], features[part], words[part]) for part in rows.split(32))
    return TeacherRegression(examples, FEATURES, WORDS)


@pytest.fixture
def data():
    generator = torch.Generator().manual_seed(0)
    features = torch.rand(IMAGES, FEATURES, generator=generator)
    features[:, -1] = 1
    return features, torch.rand(FEATURES, WORDS, generator=generator) / FEATURES


def test_words_that_follow_from_features_are_told_of_unseen_images(data):
    features, truth = data
    teacher = make(features @ truth, features)
    assert teacher.explained > 0.7  # the smallest penalty still shrinks
    rows = torch.tensor([3, IMAGES + 7])  # with captions, without
    told = teacher.predict(rows, features[rows % IMAGES], rows < IMAGES)
    torch.testing.assert_close(told, (features @ truth)[rows % IMAGES], atol=0.05, rtol=0)


def test_nothing_is_told_of_words_that_have_nothing_to_do_with_the_image(data):
    features, _ = data
    words = torch.rand(IMAGES, WORDS, generator=torch.Generator().manual_seed(1))
    teacher = make(words, features)
    assert abs(teacher.explained) < 0.05
    told = teacher.predict(torch.arange(IMAGES), features, torch.ones(IMAGES, dtype=torch.bool))
    torch.testing.assert_close(told, words.mean(0).expand_as(told), atol=0.1, rtol=0)


def test_what_is_told_of_a_image_does_not_depend_on_its_own_words(data):
    features, truth = data
    words = features @ truth
    changed = words.clone()
    changed[7] = 1 - words[7]
    others = torch.tensor([7, 7 + FOLDS, 8])  # itself, one of its fold, one of another
    before, after = (make(w, features).predict(others, features[others], others < IMAGES) for w in (words, changed))
    assert torch.equal(before[:2], after[:2])
    assert not torch.equal(before[2], after[2])


def test_processes_that_share_the_views_fit_what_one_would(data):
    features, truth = data
    words, rows = features @ truth, torch.arange(IMAGES)
    sums = []

    def fit(part, add_up):
        return TeacherRegression([(rows[part], features[part], words[part])], FEATURES, WORDS, add_up)

    fit(slice(0, None, 2), lambda value: sums.append(value) or value)
    shared = fit(slice(1, None, 2), lambda value: value + sums.pop(0))
    torch.testing.assert_close(shared.weights, make(words, features).weights)


def test_without_examples_nothing_is_fitted():
    with pytest.raises(ValueError, match="no image with captions or labels can be opened"):
        TeacherRegression([], FEATURES, WORDS)


def test_features_are_what_each_teacher_has():
    maps = torch.zeros(2, 3, 4, 4)
    maps[0, 1, 2, 2] = 0.64
    full = {"pooled": torch.ones(2, 5), "logits": torch.ones(2, 9), "grid": torch.ones(2, 5, 7, 7)}
    features = describe([full, {"maps": maps.half()}, {"grid": torch.full((2, 2, 7, 7), 3.0)}])
    assert features.shape == (2, 5 + 3 + 3 + 2 + 1)
    assert features[0, 5:11].tolist() == pytest.approx([0, 0.64, 0, 0, 0.2, 0], abs=1e-3)
    assert features[0, 11:].tolist() == [3, 3, 1]
    assert describe([{"logits": torch.zeros(1, 4)}]).tolist() == [[0.5] * 4 + [1.0]]
