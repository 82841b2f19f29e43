"""Recipes: each is a short function that returns the settings of a run. Options on the command line replace them.

`captioner train flickr8k --data.root DIR --epochs 20` runs `flickr8k()` with two settings changed. The docstring of a
recipe gives its command, how long it takes, and the score that it reached.
"""

from dataclasses import replace
from pathlib import Path

from captioner.data.config import DataConfig
from captioner.pretraining.config import PretrainConfig, TeacherConfig
from captioner.training.config import InputConfig, ModelConfig, ScstConfig, TrainConfig


def debug() -> TrainConfig:
    """Smallest run that uses every part; a minute or two for Flickr8k on a CPU.

    captioner train debug --data.root DIR
    """
    return TrainConfig(
        output=Path("runs/debug"),
        data=DataConfig(workers=0),
        model=ModelConfig(
            encoder="lookupvit_tiny_patch16_224", grid="3x3", layers=2, width=64, heads=2, dropout=0.0, vocab_size=500
        ),
        epochs=2,
        batch_size=8,
        evaluate_images=16,
        num_beams=1,
        log_every=1,
    )


def flickr8k() -> TrainConfig:
    """Train a small decoder from scratch on some thousand images; from cached tokens 17 minutes on two CPU cores.

    captioner train flickr8k --data.root flickr8k --model.encoder local-dir:runs/pretrain

    With the shipped encoder and the `--grids` of the model card: test CIDEr 0.508 at 5x5, beam 3.
    """
    return TrainConfig(
        output=Path("runs/flickr8k"),
        model=ModelConfig(layers=3, width=256, heads=4, vocab_size=4000),
        epochs=10,
        learning_rate=1e-3,
        label_smoothing=0.0,  # with smoothing, the probabilities that SCST samples from are too flat
        save_dtype="float16",
    )


def flickr8k_scst() -> TrainConfig:
    """Continue `flickr8k` with CIDEr-D as the reward, into `runs/flickr8k/scst/best`; from cached tokens 9 minutes.

    captioner train flickr8k_scst --data.root flickr8k

    From that model and with the same `--grids`: test CIDEr 0.539 at 5x5, beam 3.
    """
    return replace(
        flickr8k(),
        stage="scst",
        scst=ScstConfig(samples=5, search="beam"),  # random samples overfit 6,000 images within half an epoch
        epochs=3,
        evaluate_every=0.5,
        learning_rate=1e-4,
        weight_decay=0.0,
        clip=0.1,
    )


def flickr8k_coco_text() -> TrainConfig:
    """Teach the decoder of `flickr8k_coco` language from 240,000 sentences and their tags; not run yet.

    captioner train flickr8k_coco_text --data.root flickr8k coco --data.text text/captions.jsonl.gz \\
        --model.encoder local-dir:runs/lookupvit_flickr8k_coco --model.tags runs/tags
    """
    return TrainConfig(
        Path("runs/flickr8k_coco"),
        stage="text",
        model=ModelConfig(layers=3, width=256, heads=4, vocab_size=6000),
        inputs=InputConfig(tag_dropout=0.2, single_tag_dropout=0.85),
        epochs=3,
        batch_size=192,
        learning_rate=1e-3,
        label_smoothing=0.0,
        mixed_precision="bf16",
        evaluate_every=0.5,
        save_dtype="float16",
    )


def flickr8k_coco() -> TrainConfig:
    """Train on Flickr8k and COCO, from the decoder of `flickr8k_coco_text` if it was run; not run yet.

    captioner train flickr8k_coco --data.root flickr8k coco --data.text text/captions.jsonl.gz \\
        --model.encoder local-dir:runs/lookupvit_flickr8k_coco --model.tags runs/tags
    """
    inputs = InputConfig(tag_dropout=0.3, tag_spread=0.1, image_dropout=0.1, text_share=0.2)
    start = replace(flickr8k_coco_text(), stage="xe", inputs=inputs, epochs=10)
    return replace(start, batch_size=32, learning_rate=6e-4, evaluate_every=1.0)


def flickr8k_coco_scst() -> TrainConfig:
    """Continue `flickr8k_coco` with rewards, into `runs/flickr8k_coco/scst/best`; not run yet.

    captioner train flickr8k_coco_scst --data.root flickr8k coco --data.text text/captions.jsonl.gz
    """
    return replace(
        flickr8k_coco(),
        stage="scst",
        scst=ScstConfig(samples=5, search="beam", meteor_weight=1.0, object_weight=0.5, xe_weight=0.05),
        epochs=3,
        evaluate_every=0.5,
        learning_rate=1e-4,
        weight_decay=0.0,
        clip=0.1,
        mixed_precision="auto",
    )


def coco_small() -> TrainConfig:
    """Train a small decoder from scratch on COCO, `restval` joined to the training split. Not run yet.

    accelerate launch --multi_gpu --num_processes 8 train.py coco_small --data.root coco \\
        --model.encoder local-dir:runs/pretrain
    """
    return TrainConfig(
        output=Path("runs/coco_small"),
        data=DataConfig(restval=True, workers=8),
        model=ModelConfig(layers=6, width=512, heads=8, vocab_size=10_000),
        epochs=20,
        batch_size=32,
        evaluate_images=1000,
    )


def coco_gpt2() -> TrainConfig:
    """Train all of GPT-2 on COCO, with `A photo of` as the prompt. Not run yet.

    accelerate launch --multi_gpu --num_processes 8 train.py coco_gpt2 --data.root coco \\
        --model.encoder local-dir:runs/pretrain
    """
    return replace(
        coco_small(),
        output=Path("runs/coco_gpt2"),
        model=ModelConfig(decoder="openai-community/gpt2", prompt="A photo of"),
        epochs=8,
        learning_rate=5e-5,
    )


def coco_smollm_lora() -> TrainConfig:
    """Train low-rank updates (LoRA) of SmolLM2-360M on COCO, with recomputed activations to save memory. Not run yet.

    pip install "captioner[lora]"
    accelerate launch --multi_gpu --num_processes 8 train.py coco_smollm_lora --data.root coco \\
        --model.encoder local-dir:runs/pretrain
    """
    return replace(
        coco_small(),
        output=Path("runs/coco_smollm_lora"),
        model=ModelConfig(decoder="HuggingFaceTB/SmolLM2-360M", tune="lora", prompt="A photo of"),
        epochs=5,
        batch_size=16,
        accumulation=2,
        learning_rate=2e-4,
        gradient_checkpointing=True,
        save_dtype="bfloat16",
    )


def coco_scst() -> TrainConfig:
    """Continue one of the three above, which `init_from` names, with CIDEr-D as the reward. Not run yet.

    accelerate launch --multi_gpu --num_processes 8 train.py coco_scst --data.root coco \\
        --init-from runs/coco_small/best --output runs/coco_small
    """
    return replace(
        coco_small(),
        stage="scst",
        scst=ScstConfig(samples=5, baseline="mean"),
        epochs=10,
        batch_size=16,
        learning_rate=1e-5,
        weight_decay=0.0,
        clip=0.1,
    )


def pretrain_debug() -> PretrainConfig:
    """Run every part of pretraining once, on a tiny encoder: less than a minute on a CPU.

    The first run downloads the weights of the teacher from the hub.

    captioner pretrain debug --images DIR
    """
    return PretrainConfig(
        output=Path("runs/pretrain_debug"),
        encoder="lookupvit_tiny_patch16_224",
        encoder_options={"depth": 2},
        teachers=(TeacherConfig("resnet18"),),
        grids=(2, 3),
        image_size=64,
        store_size=64,
        views=2,
        steps=4,
        batch_size=4,
        log_every=1,
    )


IMAGENET_TEACHER = TeacherConfig(
    "mobilenetv2_100", num_classes=1001, options={"pad_type": "same"}, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5)
)
"""MobileNetV2 as TensorFlow trains it: with a background class, and an input from -1 to 1."""

COCO_TEACHER = TeacherConfig(
    "yolox_nano.onnx",
    kind="onnx",
    image_size=416,
    mean=(0.0, 0.0, 0.0),
    std=(1 / 255, 1 / 255, 1 / 255),
    channel_order="bgr",
    maps=("map_stride8", "map_stride16", "map_stride32"),
    map_classes="5:85",
    map_objectness=4,
)
"""YOLOX, a detector of COCO's 80 classes. It finds people, for whom ImageNet has no class."""


STEM = {"stem": IMAGENET_TEACHER.name, "stem_options": IMAGENET_TEACHER.options}
"""The first stages of the classifier as the encoder's stem: few images are not enough to train a stem from scratch."""


def lookupvit_small_distill() -> PretrainConfig:
    """Distil LookupViT-S from an ImageNet classifier and a COCO detector on one large GPU. Not run yet.

    captioner pretrain lookupvit_small_distill --images 'pretrain/*_train*.parquet' ... --captions flickr8k \\
        --teachers.0.checkpoint mobilenetv2.safetensors --teachers.1.name yolox_nano.onnx
    """
    return PretrainConfig(
        output=Path("runs/lookupvit_small_distill"),
        encoder_options=STEM | {"drop_path_rate": 0.05},
        teachers=(replace(IMAGENET_TEACHER, image_size=224), COCO_TEACHER),
        captions_repeat=4,
        word_weight=0.2,
        words_from="teachers",
        early_share=0.7,
        steps=12_000,
        batch_size=1024,
        learning_rate=2e-3,
        ema=0.9998,
        compile=True,
        workers=16,
    )


def lookupvit_tiny_distill_cpu() -> PretrainConfig:
    """Distil a shallow LookupViT-Ti from an ImageNet classifier and a COCO detector: 100 minutes on two CPU cores.

    captioner pretrain lookupvit_tiny_distill_cpu --images pretrain/imagenette_2500.parquet ... --captions flickr8k \\
        --teachers.0.checkpoint mobilenetv2.safetensors --teachers.1.name yolox_nano.onnx
    """
    return PretrainConfig(
        output=Path("runs/lookupvit_tiny_distill_cpu"),
        encoder="lookupvit_tiny_patch16_224",
        encoder_options=STEM | {"depth": 6, "img_size": 160},
        teachers=(IMAGENET_TEACHER, replace(COCO_TEACHER, image_size=320)),
        captions_repeat=2,
        word_weight=0.2,
        words_from="teachers",  # an encoder learns an image's own words by heart, and rewards then add nothing
        grids=(3, 5, 5, 5, 7, 10),
        early_size=112,
        early_share=0.75,
        late_size=160,
        store_size=224,
        views=4,
        steps=2000,
        batch_size=256,
        optimizer="muon",
        learning_rate=0.01,
        mixed_precision="bf16",
        workers=2,
    )


LITE2_TEACHER = TeacherConfig(
    "tf_efficientnet_lite2",
    num_classes=1000,
    image_size=224,
    mean=(127 / 255, 127 / 255, 127 / 255),
    std=(128 / 255, 128 / 255, 128 / 255),
)
"""EfficientNet-Lite2, an ImageNet classifier whose features also separate COCO's classes well."""


def lookupvit_flickr8k_coco() -> PretrainConfig:
    """Distil a wider LookupViT from a stronger classifier, a COCO detector and labels of 80 classes. Not finished yet.

    captioner pretrain lookupvit_flickr8k_coco --captions flickr8k coco/annotations/captions_train.json \\
        --images coco/images pretrain/imagenette_2500.parquet ... --held-out coco/annotations/captions_val.json \\
        --tags coco/annotations/labels80.json --teachers.0.checkpoint tf_efficientnet_lite2.safetensors \\
        --teachers.1.name yolox_nano.onnx
    """
    return replace(
        lookupvit_tiny_distill_cpu(),
        output=Path("runs/lookupvit_flickr8k_coco"),
        encoder_options={"stem": LITE2_TEACHER.name, "embed_dim": 256, "num_heads": 4, "depth": 6, "img_size": 160},
        teachers=(LITE2_TEACHER, replace(COCO_TEACHER, image_size=320)),
        tag_weight=0.3,
        views=3,
        train_stem=0.1,
    )


TRAIN = {
    "debug": debug,
    "flickr8k": flickr8k,
    "flickr8k_scst": flickr8k_scst,
    "flickr8k_coco_text": flickr8k_coco_text,
    "flickr8k_coco": flickr8k_coco,
    "flickr8k_coco_scst": flickr8k_coco_scst,
    "coco_small": coco_small,
    "coco_gpt2": coco_gpt2,
    "coco_smollm_lora": coco_smollm_lora,
    "coco_scst": coco_scst,
}
PRETRAIN = {
    "debug": pretrain_debug,
    "lookupvit_small_distill": lookupvit_small_distill,
    "lookupvit_tiny_distill_cpu": lookupvit_tiny_distill_cpu,
    "lookupvit_flickr8k_coco": lookupvit_flickr8k_coco,
}
