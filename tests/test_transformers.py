"""The calls that people know from transformers work on a captioner, and print nothing that they cannot act on."""

import logging
import subprocess
import sys

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    AutoProcessor,
    GenerationConfig,
    TextIteratorStreamer,
    Trainer,
    TrainingArguments,
)

import captioner
from captioner import CaptionerModel, CaptionerProcessor
from captioner.transformers_versions import checkpoint_activations

SMALL = {"vocab_size": 300, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
SMALL |= {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
GROUPED = {"num_key_value_heads": 1, "head_dim": 16, "intermediate_size": 64}
CASES = [
    ("gpt2", "prefix", {"n_positions": 64}),
    ("gpt2", "cross_attention", {"n_positions": 64}),
    ("opt", "prefix", {"ffn_dim": 64, "word_embed_proj_dim": 16}),
    ("llama", "prefix", GROUPED),
    ("qwen3", "prefix", GROUPED),
    ("mistral", "prefix", {**GROUPED, "sliding_window": 8}),
    ("gpt_neox", "prefix", {"intermediate_size": 64}),
    ("bloom", "prefix", {}),
]
PROMPTS = ["a dog runs", "two", "a red chair on the beach"]


@pytest.fixture
def photos() -> list[Image.Image]:
    random = np.random.default_rng(0)
    return [Image.fromarray(random.integers(0, 256, (40, 50, 3), np.uint8)) for _ in PROMPTS]


@pytest.fixture
def transformers_log():
    """What transformers logs as a warning or worse."""
    records: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: records.append(record.getMessage())
    logger = logging.getLogger("transformers")
    logger.addHandler(handler)
    yield records
    logger.removeHandler(handler)


@pytest.mark.parametrize(("name", "fusion", "special"), CASES)
def test_prompts_of_other_lengths_in_a_batch_change_no_caption(
    name, fusion, special, make_model, processor, photos, transformers_log
):
    model = make_model(AutoConfig.for_model(name, **SMALL, **special), fusion=fusion)
    inputs = processor(images=photos, text=PROMPTS)
    sequences = model.generate(**inputs, num_beams=2)
    length = inputs.input_ids.shape[1]
    assert torch.equal(sequences[:, :length], inputs.input_ids)
    tokens = model.encode(inputs.pixel_values)
    together = model.log_probability(sequences, tokens, inputs.input_ids, inputs.attention_mask)
    for row, (photo, prompt) in enumerate(zip(photos, PROMPTS, strict=True)):
        single = processor(images=photo, text=prompt)
        alone = model.generate(**single, num_beams=2)
        texts = [processor.decode(ids, skip_special_tokens=True) for ids in (alone[0], sequences[row])]
        assert texts[0] == texts[1]
        assert texts[0].strip().startswith(prompt)
        expected = model.log_probability(alone, tokens[row : row + 1], single.input_ids)
        assert together[row].item() == pytest.approx(expected.item(), abs=1e-4)
    assert transformers_log == []


def test_the_processor_pads_cuts_and_converts_as_asked(processor, photos):
    assert processor(text=PROMPTS).attention_mask.tolist()[1][0] == 0  # on the left
    assert processor(text=PROMPTS, padding_side="right").attention_mask.tolist()[1][-1] == 0
    assert processor(text=PROMPTS, padding="max_length", max_length=20).input_ids.shape == (3, 20)
    assert processor(text=PROMPTS, pad_to_multiple_of=16).input_ids.shape[1] % 16 == 0
    cut = processor(text=PROMPTS, truncation=True, max_length=3).input_ids
    assert cut.shape[1] == 3
    assert cut[0].tolist() == processor.prompt_ids(PROMPTS[0])[:3]
    lists = processor(images=photos, text=PROMPTS, padding=False, return_tensors=None)
    assert [len(ids) for ids in lists.input_ids] == [len(processor.prompt_ids(text)) for text in PROMPTS]
    assert isinstance(processor(images=photos, return_tensors="np").pixel_values, np.ndarray)
    with pytest.raises(ValueError, match="padding"):
        processor(text=PROMPTS, padding=False)


def test_images_come_alone_in_lists_and_in_lists_of_one(processor, photos):
    expected = torch.stack([processor.pixels(photo) for photo in photos])
    for images in (photos, tuple(photos), [[photo] for photo in photos], (p for p in photos)):
        assert torch.equal(processor(images=images).pixel_values, expected)
    assert torch.equal(processor(photos[0]).pixel_values, expected[:1])
    assert processor(images=photos, text="a").input_ids.shape[0] == 3
    with pytest.raises(ValueError, match="2 texts for 3 images; give one text for all of them or one for each"):
        processor(images=photos, text=["a", "b"])
    with pytest.raises(ValueError, match="nothing to process"):
        processor()


def test_the_processors_own_prompt_stands_where_no_text_is_given(tokenizer, make_model, photos):
    processor = CaptionerProcessor(tokenizer, image={"input_size": (3, 64, 64)}, prompt="two men")
    own = processor.prompt_ids()
    for text in (None, ""):
        assert processor(images=photos[0], text=text).input_ids.tolist() == [own]
    assert processor.prompts(2)["input_ids"].tolist() == [own, own]
    assert processor(images=photos[0], text="a cat").input_ids[0].tolist() == processor.prompt_ids("a cat") != own
    model = make_model()
    sequences = model.generate(**processor(images=photos))
    assert processor.captions(sequences) == [
        text.removeprefix("two men").strip() for text in processor.post_process_image_text_to_text(sequences)
    ]


def test_generate_takes_the_settings_of_transformers(make_model, processor, photos):
    model, inputs = make_model(), processor(images=photos[:2], text="a dog")
    length = inputs.input_ids.shape[1]
    plain = model.generate(**inputs, num_beams=1)
    output = model.generate(**inputs, num_beams=1, return_dict_in_generate=True, output_scores=True)
    assert torch.equal(output.sequences, plain)
    assert len(output.scores) == plain.shape[1] - length
    scores = model.compute_transition_scores(output.sequences, output.scores, normalize_logits=True)
    tokens = model.encode(inputs.pixel_values)
    logprobs = model.log_probability(plain, tokens, inputs.input_ids)
    torch.testing.assert_close(scores.masked_fill(scores.isinf(), 0).sum(1), logprobs)
    assert len(model.generate(**inputs, num_beams=3, num_return_sequences=3)) == 6
    assert len(model.generate(**inputs, do_sample=True, num_return_sequences=2)) == 4
    for settings in (GenerationConfig(max_new_tokens=3), GenerationConfig(max_length=length + 3)):
        new = model.generate(**inputs, generation_config=settings, eos_token_id=None)
        assert torch.equal(new, model.generate(**inputs, max_new_tokens=3, eos_token_id=None))
        assert new.shape[1] == length + 3
    assert model.generate(**inputs, max_length=length + 2, eos_token_id=None).shape[1] == length + 2
    tuples = model(**inputs, return_dict=False)
    assert torch.equal(tuples[0], model(**inputs).logits)


def test_a_streamer_gets_the_words_as_they_come(make_model, processor, photos):
    model, inputs = make_model(), processor(images=photos[0], text="a dog")
    streamer = TextIteratorStreamer(processor.tokenizer, skip_prompt=True, skip_special_tokens=True)
    sequences = model.generate(**inputs, num_beams=1, streamer=streamer)
    new = processor.decode(sequences[0, inputs.input_ids.shape[1] :], skip_special_tokens=True)
    assert "".join(streamer).strip() == new.strip()


def test_auto_classes_load_a_saved_captioner(saved_model, processor, images, transformers_log):
    captioner.register()
    captioner.register()  # again changes nothing
    loaded, model = (kind.from_pretrained(saved_model) for kind in (AutoProcessor, AutoModelForImageTextToText))
    assert isinstance(loaded, CaptionerProcessor)
    assert isinstance(model, CaptionerModel)
    path = images / "b.png"
    assert torch.equal(loaded(images=path).pixel_values, processor(images=path).pixel_values)
    assert loaded.text(PROMPTS)["input_ids"].tolist() == processor.text(PROMPTS)["input_ids"].tolist()
    names = {path.name for path in saved_model.iterdir()}
    assert names == {"config.json", "generation_config.json", "model.safetensors", "processor_config.json"} | {
        "tokenizer.json",
        "tokenizer_config.json",
    }
    assert transformers_log == []


def test_the_image_text_to_text_pipeline_continues_texts(saved_model, photos, transformers_log):
    captioner.register()
    pipe = transformers.pipeline("image-text-to-text", model=str(saved_model))
    model, processor = pipe.model, pipe.processor
    for photo, text in zip(photos, ("a dog", "a", ""), strict=True):
        expected = processor.post_process_image_text_to_text(
            model.generate(**processor(photo, text), max_new_tokens=6)
        )[0]
        assert pipe(images=photo, text=text, max_new_tokens=6) == [{"input_text": text, "generated_text": expected}]
        new = pipe(images=photo, text=text, return_full_text=False, max_new_tokens=6)[0]["generated_text"]
        assert text + new == expected
    several = pipe(images=photos, text=PROMPTS, max_new_tokens=4)
    assert all(row["generated_text"].startswith(text) for row, text in zip(several, PROMPTS, strict=True))
    given = transformers.pipeline("image-text-to-text", model=model, processor=processor)
    one, other = (p(images=photos[0], text="a dog", max_new_tokens=6) for p in (given, pipe))
    assert one == other
    with pytest.raises(ValueError, match="a captioner has no chat template"):
        pipe(text=[{"role": "user", "content": [{"type": "image", "image": photos[0]}]}])
    assert transformers_log == []


def test_the_image_to_text_pipeline_is_back(saved_model, images):
    captioner.register()
    pipe = transformers.pipeline("image-to-text", model=str(saved_model))
    one = pipe(str(images / "a.jpg"))
    several = pipe([str(images / "a.jpg"), Image.new("L", (30, 90))], batch_size=2, max_new_tokens=4)
    assert list(one[0]) == ["generated_text"]
    assert len(several) == 2
    assert len(pipe(str(images / "a.jpg"), num_beams=2, num_return_sequences=2)) == 2
    assert one[0]["generated_text"] == captioner.caption(images / "a.jpg", model=saved_model)


def test_a_tokenizer_with_a_chat_template_is_saved_and_loaded(tokenizer, tmp_path):
    CaptionerProcessor(tokenizer, prompt="a photo of", max_length=17).save_pretrained(tmp_path)
    (tmp_path / "chat_template.jinja").write_text("{{ messages }}")
    loaded = CaptionerProcessor.from_pretrained(tmp_path)
    assert (loaded.prompt, loaded.max_length) == ("a photo of", 17)
    with pytest.raises(ValueError, match="no chat template"):
        loaded.apply_chat_template([{"role": "user", "content": "hello"}])


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing` is deprecated")  # transformers warns of its own default
def test_the_trainer_of_transformers_trains_and_evaluates(make_model, processor, photos, tmp_path):
    def collate(rows: list[dict]) -> dict[str, torch.Tensor]:
        pixels = torch.stack([processor.pixels(row["image"]) for row in rows])
        return {"pixel_values": pixels, **processor.text([row["caption"] for row in rows])}

    rows = [{"image": image, "caption": text} for image, text in zip(photos, PROMPTS, strict=True)] * 4
    decoder = AutoConfig.for_model("gpt2", **SMALL, n_positions=64, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
    settings = {"max_steps": 4, "use_cpu": True, "report_to": [], "logging_steps": 1, "disable_tqdm": True}
    settings |= {"remove_unused_columns": False, "learning_rate": 1e-2, "seed": 0, "save_strategy": "no"}
    first = {}
    for batch, accumulation in ((12, 1), (4, 3)):  # each token weighs the same, however a step is split
        args = TrainingArguments(
            tmp_path, per_device_train_batch_size=batch, gradient_accumulation_steps=accumulation, **settings
        )
        trainer = Trainer(make_model(decoder), args, train_dataset=rows, eval_dataset=rows[:3], data_collator=collate)
        trainer.train()
        first[batch] = trainer.state.log_history[0]["loss"]
    assert float(first[12]) == pytest.approx(float(first[4]), abs=2e-3)
    result = trainer.predict(rows[:3])
    batch = collate(rows[:3])
    assert result.predictions.shape == (*batch["labels"].shape, decoder.vocab_size)
    assert result.metrics["test_loss"] < float(first[4]) - 0.1
    assert result.metrics["test_loss"] == pytest.approx(trainer.model(**batch).loss.item(), abs=1e-4)


def test_training_and_captioning_log_no_warning_of_transformers(make_model, processor, photos, transformers_log):
    model, text = make_model(), processor.text([*PROMPTS, *PROMPTS])
    pixels = processor(images=photos).pixel_values
    model(pixels, **text).loss.backward()
    checkpoint_activations(model.decoder)
    model.train()(pixels, **text).loss.backward()
    model.eval().generate(pixels, do_sample=True, temperature=1.0, top_k=0, top_p=1.0, num_return_sequences=2)
    model.generate(pixels, repetition_penalty=1.2, no_repeat_ngram_size=2, max_length=9)
    assert transformers_log == []


def test_importing_changes_nothing_in_transformers_and_loading_logs_nothing(saved_model):
    code = """
import sys, transformers.pipelines as pipelines, transformers.models.auto.modeling_auto as auto

def state():
    return (
        getattr(pipelines, "_resolve_deprecated_task", None),
        dict(auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES),
        list(pipelines.PIPELINE_REGISTRY.get_supported_tasks()),
        "captioner" in transformers.CONFIG_MAPPING,
    )

import transformers
before = state()
import captioner
for name in captioner.__all__:
    getattr(captioner, name)
captioner.CaptionerProcessor.from_pretrained(sys.argv[1])
assert state() == before and not before[-1]
captioner.register()
assert "captioner" in transformers.CONFIG_MAPPING and state() != before
"""
    result = subprocess.run([sys.executable, "-c", code, str(saved_model)], capture_output=True, text=True, timeout=120)
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")
