"""The configuration of a captioner model."""

from typing import Any

from transformers import AutoConfig, PretrainedConfig

from captioner.errors import SettingError
from captioner.fusion import FUSIONS
from captioner.grids import Grid, parse_grid
from captioner.tag_head import TagConfig


class CaptionerConfig(PretrainedConfig):
    """Configuration of a `CaptionerModel`.

    Args:
        encoder_config: `{"name": timm name, "kwargs": {...}}`, the arguments of `create_encoder`.
        text_config: configuration of any causal language model, as an object or a dict with `model_type`.
        fusion: how the decoder reads the image, a key of `FUSIONS`.
        grid: compressed grid (rows, columns) of the image tokens; `None` for the encoder's default.
        blind: whether the image tokens are zeroed. Such a model is the image-blind baseline: its scores show how much
            the captions of a training set teach without images.
        tags: the object tags, as `TagConfig.to_dict` returns them, with the decoder's tokens of each tag; `None` for a
            captioner without tags.

    Raises:
        SettingError: there is no such fusion, or the decoder does not support it.
        ValueError: the tags have another form, or tokens that the decoder lacks.
    """

    model_type = "captioner"
    sub_configs = {"text_config": AutoConfig}  # noqa: RUF012 - transformers declares it so

    def __init__(
        self,
        encoder_config: dict | None = None,
        text_config: PretrainedConfig | dict | None = None,
        fusion: str = "prefix",
        grid: Grid | None = None,
        blind: bool = False,
        tags: dict | None = None,
        **kwargs: Any,
    ):
        if fusion not in FUSIONS:
            raise SettingError(f"there is no fusion '{fusion}'; there are {', '.join(FUSIONS)}", "fusion")
        self.encoder_config = encoder_config or {"name": "lookupvit_small_patch16_224", "kwargs": {}}
        if text_config is None:
            text_config = {"model_type": "gpt2"}
        if isinstance(text_config, dict):
            text_config = AutoConfig.for_model(**text_config)
        FUSIONS[fusion].configure(text_config)
        self.text_config: PretrainedConfig = text_config
        self.fusion, self.blind = fusion, blind
        self.grid = parse_grid(grid)
        self.tags = tags
        if (found := self.tag_config) is not None:
            found.check_tokens(self.vocab_size)
        super().__init__(**kwargs)

    @property
    def tag_config(self) -> TagConfig | None:
        """The object tags; `None` for a captioner without tags."""
        return None if self.tags is None else TagConfig.from_dict(self.tags)

    @property
    def hidden_size(self) -> int:
        """Decoder width E."""
        return self.text_config.hidden_size

    @property
    def vocab_size(self) -> int:
        """Decoder vocabulary V."""
        return self.text_config.vocab_size
