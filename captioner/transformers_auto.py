"""Register the captioner with transformers: with its Auto classes, and with its pipelines for images.

Importing this module changes nothing in transformers; `register` does.
"""

from typing import Any

import transformers.pipelines
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor, Pipeline
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
from transformers.pipelines import PIPELINE_REGISTRY

from captioner.configuration import CaptionerConfig
from captioner.images import ImageSource
from captioner.modeling import CaptionerModel
from captioner.processing import CaptionerProcessor

TASK = "image-to-text"


def register() -> None:
    """Register the captioner with transformers, for this process.

    After this, `AutoConfig`, `AutoModelForImageTextToText` and `AutoProcessor` load captioners, and `pipeline` runs
    them as `image-text-to-text` and as `image-to-text`, which transformers 5 dropped. A second call changes nothing.
    """
    AutoConfig.register(CaptionerConfig.model_type, CaptionerConfig, exist_ok=True)
    AutoModelForImageTextToText.register(CaptionerConfig, CaptionerModel, exist_ok=True)
    AutoProcessor.register(CaptionerConfig, CaptionerProcessor, exist_ok=True)
    # The pipeline image-text-to-text logs an error for a model that is not in this table of names.
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES[CaptionerConfig.model_type] = CaptionerModel.__name__
    if TASK in PIPELINE_REGISTRY.get_supported_tasks():
        return
    model = AutoModelForImageTextToText
    PIPELINE_REGISTRY.register_pipeline(TASK, ImageToTextPipeline, pt_model=model, type="multimodal")
    # The newest versions of transformers replace the dropped task's name by `image-text-to-text` before they read the
    # registry.
    resolve = getattr(transformers.pipelines, "_resolve_deprecated_task", None)
    if resolve is not None:
        transformers.pipelines._resolve_deprecated_task = lambda task: task if task == TASK else resolve(task)


class ImageToTextPipeline(Pipeline):
    """The task `image-to-text`, which transformers 5 dropped: images in, `[{"generated_text": ...}]` out."""

    model: CaptionerModel
    processor: CaptionerProcessor

    _load_processor = True
    _load_image_processor = False
    _load_feature_extractor = False
    _load_tokenizer = False
    _pipeline_calls_generate = False

    def __init__(self, model: CaptionerModel, **kwargs: Any):
        if not isinstance(model, CaptionerModel):
            raise ValueError(f"image-to-text runs captioner models; for {type(model).__name__} use image-text-to-text")
        super().__init__(model, **kwargs)

    def _sanitize_parameters(
        self, max_new_tokens: int | None = None, generate_kwargs: dict | None = None, **kwargs: Any
    ) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
        generation = dict(generate_kwargs or {})
        if max_new_tokens is not None:
            generation["max_new_tokens"] = max_new_tokens
        return {}, generation | kwargs, {}

    def preprocess(self, input_: ImageSource, **preprocess_parameters: Any) -> dict[str, Any]:
        """Open and transform one image."""
        return {"image": self.processor(input_).pixel_values}

    def _forward(self, input_tensors: dict[str, Any], **forward_parameters: Any) -> dict[str, Any]:
        pixel_values = input_tensors["image"]
        prompts: dict[str, Any] = self.processor.prompts(len(pixel_values), self.device)
        return {"sequences": self.model.generate(pixel_values, **prompts, **forward_parameters)}

    def postprocess(self, model_outputs: dict[str, Any], **postprocess_parameters: Any) -> list[dict[str, str]]:
        """Decode the captions of one image."""
        return [{"generated_text": text} for text in self.processor.captions(model_outputs["sequences"])]
