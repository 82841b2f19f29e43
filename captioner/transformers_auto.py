"""Make transformers know the captioner: Auto classes, and the `image-to-text` pipeline that transformers 5 dropped."""

import torch
import transformers.pipelines
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor, Pipeline
from transformers.pipelines import PIPELINE_REGISTRY

from captioner.images import ImageSource
from captioner.modeling import CaptionerConfig, CaptionerModel
from captioner.processing import CaptionerProcessor

TASK = "image-to-text"


def register() -> None:
    """Register config, model and processor with the Auto classes, and the pipeline under its old name.

    Calling it again changes nothing.
    """
    AutoConfig.register(CaptionerConfig.model_type, CaptionerConfig, exist_ok=True)
    AutoModelForImageTextToText.register(CaptionerConfig, CaptionerModel, exist_ok=True)
    AutoProcessor.register(CaptionerConfig, CaptionerProcessor, exist_ok=True)
    if TASK in PIPELINE_REGISTRY.get_supported_tasks():
        return
    model = AutoModelForImageTextToText
    PIPELINE_REGISTRY.register_pipeline(TASK, ImageToTextPipeline, pt_model=model, type="multimodal")
    # Recent transformers 5 rewrites the dropped task's name to `image-text-to-text` before it looks into the registry.
    resolve = getattr(transformers.pipelines, "_resolve_deprecated_task", None)
    if resolve is not None:
        transformers.pipelines._resolve_deprecated_task = lambda task: task if task == TASK else resolve(task)


class ImageToTextPipeline(Pipeline):
    """The `image-to-text` task that transformers 5 dropped: images in, `[{"generated_text": ...}]` out."""

    _load_processor = True
    _load_image_processor = False
    _load_feature_extractor = False
    _load_tokenizer = False
    _pipeline_calls_generate = False

    def __init__(self, model: CaptionerModel, **kwargs):
        if not isinstance(model, CaptionerModel):
            raise ValueError(f"image-to-text runs captioner models; for {type(model).__name__} use image-text-to-text")
        super().__init__(model, **kwargs)

    def _sanitize_parameters(self, max_new_tokens: int | None = None, generate_kwargs: dict | None = None, **kwargs):
        generation = dict(generate_kwargs or {})
        if max_new_tokens is not None:
            generation["max_new_tokens"] = max_new_tokens
        return {}, generation | kwargs, {}

    def preprocess(self, image: ImageSource) -> dict:
        """Open and transform one image."""
        return {"image": self.processor(image).pixel_values}

    def _forward(self, inputs: dict, **generation) -> dict:
        pixel_values = inputs["image"]
        start = torch.tensor([self.processor.prompt_ids()], device=self.device).expand(len(pixel_values), -1)
        return {"sequences": self.model.generate(pixel_values, start, **generation)}

    def postprocess(self, outputs: dict) -> list[dict[str, str]]:
        """Decode the captions of one image."""
        return [{"generated_text": text} for text in self.processor.captions(outputs["sequences"])]
