"""The tokens that are learned, the loss on them, and the way of training to it."""

import typing

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from captioner.data.row_stream import RowStream
from captioner.labels import IGNORED, count_targets, label_generated, split_targets, token_loss
from captioner.processing import CaptionerProcessor
from captioner.training.objectives import CrossEntropy
from captioner.training.wrapped import call_method

CAPTIONS = ["a dog runs", "two men on a beach", "a cat", "a red chair on the grass"]


def test_each_position_predicts_the_next_label(processor):
    text = processor.text(CAPTIONS)
    inputs, targets = split_targets(text)
    assert torch.equal(inputs["input_ids"], text["input_ids"][:, :-1])
    assert torch.equal(text["labels"][:, 1:][inputs["positions"]], targets)
    assert (
        len(targets) == count_targets(text["labels"]) == inputs["positions"].sum() == text["attention_mask"].sum() - 4
    )


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_the_loss_is_that_of_the_labelled_tokens_by_definition(smoothing):
    generator = torch.Generator().manual_seed(0)
    logits, targets = torch.randn(2, 3, 7, generator=generator), torch.tensor([[1, IGNORED, 6], [0, 2, IGNORED]])
    logprobs = logits.log_softmax(-1)
    expected = torch.zeros(2, 3)
    for row, place in (targets != IGNORED).nonzero().tolist():
        hit, spread = logprobs[row, place, targets[row, place]], logprobs[row, place].mean()
        expected[row, place] = -(1 - smoothing) * hit - smoothing * spread
    torch.testing.assert_close(token_loss(logits, targets, smoothing), expected.sum())
    torch.testing.assert_close(token_loss(logits, targets, smoothing, "none"), expected.flatten())
    assert token_loss(logits.half(), targets).dtype == torch.float32


def test_generated_texts_are_labelled_from_the_prompt_to_the_end():
    sequences = torch.tensor([[0, 1, 5, 9, 2, 0], [1, 5, 5, 9, 8, 7], [0, 1, 5, 3, 9, 9]])
    mask = torch.tensor([[0, 1, 1], [1, 1, 1], [0, 1, 1]])
    plain = label_generated(sequences, 3, 2)
    assert torch.equal(plain["input_ids"], sequences)
    assert plain["attention_mask"].tolist() == [[1, 1, 1, 1, 1, 0], [1] * 6, [1] * 6]
    moved = label_generated(sequences, 3, [2, 3], mask)
    rows = [ids[keep.bool()].tolist() for ids, keep in zip(moved["input_ids"], moved["attention_mask"], strict=True)]
    assert rows == [[1, 5, 9, 2], [1, 5, 5, 9, 8, 7], [1, 5, 3]]
    assert moved["attention_mask"].diff(dim=1).amax() <= 0  # padding on the right alone
    learned = [ids[ids != IGNORED].tolist() for ids in moved["labels"]]
    assert learned == [[9, 2], [9, 8, 7], [3]]
    assert (label_generated(sequences, 3, None)["labels"][:, 3:] == sequences[:, 3:]).all()


def test_a_caption_that_is_too_long_is_cut_counted_and_learned_without_an_end(tokenizer, caplog):
    long = "a dog runs through the grass and two men on a beach"
    captions = [long, "a cat", long + " on a swing", "a dog"]
    short, whole = (CaptionerProcessor(tokenizer, max_length=length) for length in (6, 40))
    end = tokenizer.eos_token_id
    full, cut = whole.texts(captions), short.texts(captions)
    assert (full.cut, cut.cut, len(cut)) == (0, 2, 4)
    ids, labels = (cut.batch(range(4))[name] for name in ("input_ids", "labels"))
    assert torch.equal(ids[[0, 2]], full.batch([0, 2])["input_ids"][:, :6])
    assert [(row == end).any().item() for row in labels] == [False, True, False, True]
    uncut = [1, 3]
    for name, values in full.batch(uncut).items():
        assert torch.equal(cut.batch(uncut)[name], values)
    full.warn_cut(40)
    assert caplog.messages == []
    cut.warn_cut(6)
    expected = "2 of 4 captions have more than 6 tokens (max_length): they are cut, and learned without an end"
    assert caplog.messages == [expected]


def test_a_stream_reports_its_first_batch_with_cut_captions(tokenizer, caplog):
    stream = RowStream([0, 1], CaptionerProcessor(tokenizer, max_length=6), captions_per_image=1, seed=0)
    for captions in (["a cat"], ["a dog runs through the grass and two men"], ["two men on a beach and a red chair"]):
        stream.collate([{"image": torch.zeros(3, 4, 4), "captions": captions}])
    assert len(caplog.messages) == 1
    assert "1 of 1 captions of one batch (no other is reported) have more than 6 tokens" in caplog.messages[0]


def test_a_caption_of_exactly_the_longest_length_keeps_its_end(tokenizer):
    length = len(CaptionerProcessor(tokenizer).texts(["a dog runs"]).ids)
    for longest, cut in ((length, 0), (length - 1, 1)):
        assert CaptionerProcessor(tokenizer, max_length=longest).texts(["a dog runs"]).cut == cut


def test_a_method_runs_through_the_forward_of_a_wrapped_model():
    class Inner(nn.Module):
        def forward(self, x):
            return x + 1

        def double(self, x, fail=False):
            if fail:
                raise RuntimeError("failed")
            return 2 * self(x)

    inner = Inner()
    calls = []
    wrapped = nn.parallel.DataParallel(inner)  # without devices it only forwards, as data-parallel training does
    wrapped.register_forward_pre_hook(lambda *_: calls.append(1))
    assert call_method(wrapped, "double", 3) == call_method(inner, "double", 3) == 8
    assert calls == [1]
    with pytest.raises(RuntimeError, match="failed"):
        call_method(wrapped, "double", 3, fail=True)
    assert "forward" not in vars(inner)
    inner.forward = lambda x: x + 10  # as accelerate puts one there for mixed precision
    assert call_method(wrapped, "double", 3) == 26
    assert wrapped(3) == 13


def test_cross_entropy_has_the_loss_and_gradient_of_the_whole_forward(make_model, processor):
    model, text = make_model(), processor.text(CAPTIONS)
    tokens = torch.randn(2, 5, model.encoder.embed_dim, generator=torch.Generator().manual_seed(0))
    loss, _ = CrossEntropy(0.1).loss(model, {"image_tokens": tokens, **text})
    logits = model(image_tokens=tokens, **text).logits
    expected = F.cross_entropy(
        logits[:, :-1].flatten(0, 1), text["labels"][:, 1:].flatten(), label_smoothing=0.1, reduction="sum"
    )
    torch.testing.assert_close(loss, expected)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    torch.testing.assert_close(*(torch.autograd.grad(value, parameters) for value in (loss, expected)))


def test_the_command_line_offers_every_fusion():
    from captioner.fusion import FUSIONS
    from captioner.training.config import ModelConfig

    assert set(typing.get_args(typing.get_type_hints(ModelConfig)["fusion"])) == set(FUSIONS)
