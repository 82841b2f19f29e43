"""Importing this module makes transformers know the captioner: Auto classes and the `image-to-text` pipeline."""

import transformers.pipelines
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor
from transformers.pipelines import PIPELINE_REGISTRY

from captioner.modeling import CaptionerConfig, CaptionerModel
from captioner.pipeline import ImageToTextPipeline
from captioner.processing import CaptionerProcessor

TASK = "image-to-text"

AutoConfig.register(CaptionerConfig.model_type, CaptionerConfig)
AutoModelForImageTextToText.register(CaptionerConfig, CaptionerModel)
AutoProcessor.register(CaptionerConfig, CaptionerProcessor)
PIPELINE_REGISTRY.register_pipeline(TASK, ImageToTextPipeline, pt_model=AutoModelForImageTextToText, type="multimodal")

# Recent transformers 5 rewrites the dropped task's name to `image-text-to-text` before it looks into the registry.
_resolve = getattr(transformers.pipelines, "_resolve_deprecated_task", None)
if _resolve is not None:
    transformers.pipelines._resolve_deprecated_task = lambda task: task if task == TASK else _resolve(task)
