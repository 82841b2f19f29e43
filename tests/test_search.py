"""Searching for captions in Python: samples, several captions, prompts, confidence, images opened ahead."""

import math
import threading
import time

import pytest
import torch

from captioner import ImageError
from captioner.data.open_ahead import open_ahead
from captioner.search import SeededNoise


def test_the_largest_sum_of_logits_and_noise_is_a_draw():
    probabilities = torch.tensor([0.5, 0.3, 0.15, 0.05])
    rows = [(f"image {number}", 0) for number in range(4000)]
    noise = SeededNoise(0, rows)
    for _ in range(2):  # at each token
        drawn = noise(torch.zeros(0), probabilities.log().expand(len(rows), -1)).argmax(1)
        shares = torch.bincount(drawn, minlength=4) / len(rows)
        assert (shares - probabilities).abs().max() < 0.03
    assert noise(torch.zeros(0), torch.tensor([[0.0, -math.inf]]).expand(len(rows), -1)).argmax(1).max() == 0


def test_samples_repeat_by_their_seed_and_differ_without_one(model, image):
    def draw(**options):
        return [result.caption for result in model.stream([image] * 3, do_sample=True, **options)]

    assert draw(seed=1) == draw(seed=1) == draw(seed=1, batch_size=1)
    assert len(set(draw(seed=1))) > 1  # images in memory have no names: their numbers tell them apart
    torch.manual_seed(0)
    first = draw()
    assert draw() != first
    torch.manual_seed(0)
    assert draw() == first
    assert draw(seed=1, top_k=1) == draw(seed=2, top_k=1) == [model(image)] * 3


def test_the_model_s_own_settings_of_sampling_count(model, image, caplog):
    model.model.generation_config.update(do_sample=True, temperature=1e-6)
    assert len({model(image, seed=seed) for seed in range(4)}) == 1
    assert not caplog.records
    with pytest.raises(ValueError, match="no beams"):
        model.stream(image, num_beams=2)


def test_confidence_is_the_mean_probability_of_a_token(model, image):
    [result] = model.stream(image, captions=3)
    for one in result.candidates:
        assert 0 < one.confidence < 1
        tokens = math.log(one.confidence) and one.logprob / math.log(one.confidence)
        assert tokens == pytest.approx(round(tokens), abs=0.1)
    assert result.caption == result.candidates[0].caption
    assert result.as_dict()["captions"][0] == vars(result.candidates[0])
    [single] = model.stream(image, captions=1)
    assert single.candidates is None
    for search in ({"captions": 3}, {"captions": 5, "do_sample": True, "seed": 1, "temperature": 2.0}):
        [shown], [hidden] = model.stream(image, **search), model.stream(image, logprob=False, **search)
        assert [one.caption for one in hidden.candidates] == [one.caption for one in shown.candidates]
    [without] = model.stream(image, captions=2, logprob=False)
    assert [one.logprob for one in without.candidates] == [None, None]


def test_captions_of_low_confidence_are_errors(model, image):
    with pytest.raises(ImageError, match="the confidence is .* below 0.99"):
        model(image, min_confidence=0.99)
    [result] = model.stream(image, min_confidence=0.99, captions=2)
    assert (result.caption, result.candidates, result.reason) == (None, [], "below the least confidence")
    [result] = model.stream(image, min_confidence=1e-9, logprob=False)
    assert result.caption is not None
    assert result.logprob is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"captions": 0}, "captions must be a whole number above 0"),
        ({"captions": 3, "num_beams": 2}, "3 captions of each image need as many beams, not 2"),
        ({"min_confidence": 1.5}, "min_confidence is a probability between 0 and 1"),
        ({"min_confidence": math.nan}, "not nan"),
        ({"do_sample": True, "num_beams": 2}, "no beams"),
        ({"do_sample": True, "top_p": 2.0}, "top_p cannot be 2.0"),
        ({"do_sample": True, "temperature": -1}, "temperature cannot be -1"),
        ({"do_sample": True, "top_k": "many"}, "top_k cannot be 'many'"),
        ({"workers": -1}, "workers must be"),
    ],
)
def test_options_are_checked_before_the_first_image(model, image, options, message):
    with pytest.raises(ValueError, match=message):
        model.stream([image], **options)


def test_a_prompt_is_part_of_the_caption_and_the_model_s_own_is_not(model, image):
    assert model(image, prompt=" a dog ").startswith("a dog")
    model.processor.prompt = "a dog"
    assert not model(image).startswith("a dog")
    with pytest.raises(ValueError, match="room for 64 tokens"):
        model(image, prompt="dog " * 80)


def test_threads_open_ahead_in_order_within_bounds():
    taken, opened, most = [], [], []

    def items():
        for number in range(40):
            taken.append(number)
            yield number

    def open_one(number):
        time.sleep(0.001 * (number % 3))
        opened.append(threading.current_thread().name)
        return number

    results = open_ahead(items(), open_one, 3, 5)
    for place, result in enumerate(results):
        assert result == place
        most.append(len(taken) - place)
    assert max(most) == 5
    assert threading.current_thread().name not in opened
    with pytest.raises(ZeroDivisionError):
        list(open_ahead([1, 0], lambda number: 1 // number, 2, 4))
    assert list(open_ahead([], open_one, 2, 4)) == []
    unfinished = open_ahead(items(), open_one, 2, 4)
    next(unfinished)
    unfinished.close()


def test_workers_change_nothing(model, image):
    images = [image, b"broken", image.rotate(90)] * 4
    plain = list(model.stream(images, batch_size=5))
    assert list(model.stream(images, batch_size=5, workers=3)) == plain
