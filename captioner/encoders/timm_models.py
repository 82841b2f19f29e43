"""Stock timm models as encoders: their feature map pooled to a grid of tokens, the baseline of every comparison.

Letters: B batch, N tokens of the model, M tokens handed on, D width, (h, w) the model's own grid.
"""

import torch
import torch.nn.functional as F
from torch import nn

from captioner.encoders.base import TokenEncoder
from captioner.grids import Grid


class PooledEncoder(TokenEncoder):
    """Any timm ViT or CNN as a `TokenEncoder`.

    A ViT hands on its prefix tokens (class, registers) and its patches; a CNN its feature map, row by row. With a
    `grid`, patches are average-pooled to it; without, all of them are handed on.
    """

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model
        self.embed_dim = self.num_features = model.num_features
        self.num_prefix_tokens = getattr(model, "num_prefix_tokens", 0)
        self.channels_last = getattr(model, "output_fmt", "NCHW") == "NHWC"

    @property
    def default_cfg(self) -> dict:
        """The wrapped model's timm configuration: input size, mean, deviation."""
        return self.model.pretrained_cfg

    pretrained_cfg = default_cfg

    @property
    def timm_model(self) -> nn.Module:
        """The wrapped model."""
        return self.model

    def forward_features(self, x: torch.Tensor) -> torch.Tensor:
        """Return the wrapped model's own features."""
        return self.model.forward_features(x)

    def forward_head(self, x: torch.Tensor, pre_logits: bool = False) -> torch.Tensor:
        """Classify the wrapped model's features."""
        return self.model.forward_head(x, pre_logits=pre_logits)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Classify pixels (B, C, H, W) into logits."""
        return self.model(x)

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Put a fresh classifier of `num_classes` outputs in place (0 for none)."""
        self.model.reset_classifier(num_classes, *([global_pool] if global_pool else []))

    def forward_tokens(self, pixel_values: torch.Tensor, grid: Grid | None = None) -> torch.Tensor:
        """Encode pixels (B, C, H, W) into tokens (B, M, D), prefix tokens first."""
        x = self.forward_features(pixel_values)
        if x.ndim == 4:
            return pool_map(x if not self.channels_last else x.movedim(-1, 1), grid)  # (B, M, D)
        prefix, patches = x[:, : self.num_prefix_tokens], x[:, self.num_prefix_tokens :]
        if grid is None:
            return x  # (B, N, D)
        patch = self.model.patch_embed.patch_size
        rows = pixel_values.shape[-2] // patch[0]
        pooled = pool_map(patches.unflatten(1, (rows, -1)).movedim(-1, 1), grid)
        return torch.cat([prefix, pooled], 1)  # (B, M, D)

    def num_tokens(self, grid: Grid | None = None) -> int:
        """Count the tokens for an image of the model's own size; without a grid, by encoding one such image."""
        if grid is not None:
            return self.num_prefix_tokens + grid[0] * grid[1]
        reference = next(self.parameters())
        blank = torch.zeros(1, *self.default_cfg["input_size"], dtype=reference.dtype, device=reference.device)
        training = self.training
        self.eval()  # else a CNN's running statistics would take the blank image in
        with torch.no_grad():
            tokens = self.encode(blank)
        self.train(training)
        return tokens.shape[1]


def pool_map(feature_map: torch.Tensor, grid: Grid | None) -> torch.Tensor:
    """Average-pool a map (B, D, h, w) to a grid and lay it out as tokens (B, rows * columns, D).

    Raises:
        ValueError: the grid is larger than the map.
    """
    height, width = feature_map.shape[-2:]
    if grid is not None:
        if grid[0] > height or grid[1] > width:
            raise ValueError(f"grid {grid[0]}x{grid[1]} is larger than the encoder's feature map, {height}x{width}")
        feature_map = F.adaptive_avg_pool2d(feature_map, grid)
    return feature_map.flatten(2).mT
