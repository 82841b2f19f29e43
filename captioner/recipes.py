"""Recipes: one short function each, returning a config; every setting can be overridden on the command line.

`captioner train flickr8k --data.root DIR --epochs 20` runs `flickr8k()` with two settings changed. A recipe's
docstring gives its command, how long it takes, and the score it measured.
"""

from pathlib import Path

from captioner.training.config import DataConfig, ModelConfig, TrainConfig
from captioner.training.encoder_config import PretrainConfig, TeacherConfig


def debug() -> TrainConfig:
    """Smallest run that goes through every part; under a minute on a CPU.

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
    """Train the default decoder on Flickr8k with an encoder exported by `pretrain`.

    captioner train flickr8k --data.root flickr8k --model.encoder local-dir:runs/pretrain
    """
    return TrainConfig(output=Path("runs/flickr8k"), model=ModelConfig(layers=3, width=256, heads=4, vocab_size=4000))


def coco() -> TrainConfig:
    """Train the default decoder on COCO, Karpathy split, `restval` joined to train. Not run here: needs COCO.

    accelerate launch train.py coco --data.root coco --model.encoder local-dir:runs/pretrain
    """
    return TrainConfig(
        output=Path("runs/coco"),
        data=DataConfig(restval=True, workers=8),
        model=ModelConfig(layers=6, width=512, heads=8, vocab_size=10_000),
        epochs=20,
        batch_size=64,
        evaluate_images=1000,
    )


def pretrain_debug() -> PretrainConfig:
    """Smallest pretraining run; under a minute on a CPU.

    captioner pretrain debug --images DIR --teacher.name resnet18
    """
    return PretrainConfig(
        output=Path("runs/pretrain_debug"),
        encoder="lookupvit_tiny_patch16_224",
        encoder_options={"depth": 2},
        grids=(2, 3),
        image_size=64,
        steps=4,
        batch_size=4,
        workers=0,
        log_every=1,
    )


def lookupvit_tiny_distill_cpu() -> PretrainConfig:
    """Distil LookupViT-Ti from a teacher on a CPU.

    captioner pretrain lookupvit_tiny_distill_cpu --images DIR ... --captions flickr8k --teacher.checkpoint FILE
    """
    return PretrainConfig(
        output=Path("runs/lookupvit_tiny_distill_cpu"),
        encoder="lookupvit_tiny_patch16_224",
        encoder_options={"depth": 6},
        teacher=TeacherConfig("mobilenetv2_100", num_classes=1001, options={"pad_type": "same"}),
        captions_repeat=2,
        early_share=0.85,
        steps=2500,
        batch_size=32,
        learning_rate=4e-4,
        workers=1,
    )


TRAIN = {"debug": debug, "flickr8k": flickr8k, "coco": coco}
PRETRAIN = {"debug": pretrain_debug, "lookupvit_tiny_distill_cpu": lookupvit_tiny_distill_cpu}
