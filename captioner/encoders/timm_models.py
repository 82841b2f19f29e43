"""Stock timm models as encoders: their feature map pooled to a grid of tokens, the baseline of every comparison.

Letters: B batch, N tokens of the model, M tokens returned, D width, (h, w) the model's own map.
"""

from typing import Any

import torch
from torch import nn

from captioner.encoders.base import TokenEncoder, TokenMaps, image_size
from captioner.encoders.maps import pool_tokens
from captioner.encoders.rollout import AttentionRecorder, roll_out
from captioner.grids import Grid


class PooledEncoder(TokenEncoder):
    """Any timm ViT or CNN as a `TokenEncoder`.

    It returns a ViT's prefix tokens (class, registers) and patches, or a CNN's feature map, row by row. The model
    always computes its own map (`chooses_grid` is false); with a `grid`, the map is average-pooled to it.

    Args:
        model: the timm model.
    """

    def __init__(self, model: Any):
        prefix, stages = getattr(model, "num_prefix_tokens", 0), getattr(model, "feature_info", None) or [{}]
        stride = stages[-1].get("reduction", 0)
        super().__init__(embed_dim=model.num_features, num_prefix_tokens=prefix, stride=stride)
        self.model: Any = model  # timm has no base class that declares what its models have
        self.default_cfg = self.pretrained_cfg = model.pretrained_cfg
        class_token = getattr(model, "cls_token", None)
        self.has_class_token = prefix > 0 and getattr(model, "has_class_token", class_token is not None)
        self.channels_last = getattr(model, "output_fmt", "NCHW") == "NHWC"
        self.num_classes = getattr(model, "num_classes", 0)
        self.map_sizes: dict[tuple[int, int], Grid] = {}
        self.stride = stride or self.own_size[0] // self.largest_grid(self.own_size)[0]

    @property
    def own_size(self) -> tuple[int, int]:
        """Height and width in pixels of the images that the model is made for."""
        _, height, width = self.default_cfg["input_size"]
        return height, width

    @property
    def timm_model(self) -> nn.Module:
        """The wrapped model."""
        return self.model

    def forward_features(self, x: torch.Tensor, grid: Grid | None = None) -> torch.Tensor:
        """Return the wrapped model's own features, tokens (B, N, D) or a map; the grid changes nothing.

        Raises:
            ValueError: the model returns several maps.
        """
        x = self.model.forward_features(x)
        if not isinstance(x, torch.Tensor):
            raise ValueError(f"a {type(self.model).__name__} has several feature maps, an encoder needs one")
        return x

    def forward_head(self, x: torch.Tensor, pre_logits: bool = False) -> torch.Tensor:
        """Classify the wrapped model's features."""
        return self.model.forward_head(x, pre_logits=pre_logits)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Classify pixels (B, C, H, W) into logits."""
        return self.model(x)

    def get_classifier(self) -> nn.Module:
        """Return the wrapped model's classifier layer."""
        return self.model.get_classifier()

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Make a new classifier of `num_classes` outputs (0 for none)."""
        self.model.reset_classifier(num_classes, *([global_pool] if global_pool else []))
        self.num_classes = num_classes

    def no_weight_decay(self) -> set[str]:
        """Return the names of the parameters without weight decay in timm."""
        return {f"model.{name}" for name in getattr(self.model, "no_weight_decay", set)()}

    def forward_tokens(self, pixel_values: torch.Tensor, grid: Grid | None = None) -> torch.Tensor:
        """Encode pixels (B, C, H, W) into tokens (B, M, D), prefix tokens first."""
        x = self.forward_features(pixel_values)
        if grid is None and x.ndim == 3:
            return x  # also tokens that lie on no grid
        maps = self.places(x, image_size(pixel_values))
        if grid is not None:
            maps = pool_tokens(maps, self.check_grid(grid, (maps.shape[1], maps.shape[2])))
        tokens = maps.flatten(1, 2)
        return torch.cat([x[:, : self.num_prefix_tokens], tokens], 1) if self.num_prefix_tokens else tokens

    def forward_maps(self, pixel_values: torch.Tensor, grid: Grid | None = None, attention: bool = False) -> TokenMaps:
        """Encode pixels (B, C, H, W) into tokens at their places; see `TokenMaps`.

        Attention is rolled out through the blocks of a model that attends between all its tokens, such as a ViT (see
        `rollout.py`); a pooled token has the mean of its patches. In other models (CNNs, attention within windows),
        each token has equal shares of the cells that it is pooled from.
        """
        recorder = None
        if attention:
            with AttentionRecorder() as recorder:
                x = self.forward_features(pixel_values)
        else:
            x = self.forward_features(pixel_values)
        places = self.places(x, image_size(pixel_values))  # (B, h, w, D)
        size = (places.shape[1], places.shape[2])
        grid = self.check_grid(grid, size)
        pooled = places if grid == size else pool_tokens(places, grid)  # (B, r, c, D)
        summary = x[:, 0] if self.has_class_token else pooled.mean((1, 2))
        return TokenMaps(summary, pooled, attention=self.roll_out(recorder, pooled, size) if recorder else None)

    def roll_out(self, recorder: AttentionRecorder, tokens: torch.Tensor, size: Grid) -> torch.Tensor:
        """Return the share of each cell in each token (B, M, h, w), from the recorded attention of the model.

        Args:
            recorder: the recorded attention.
            tokens: the pooled tokens (B, r, c, D).
            size: the model's map (h, w).
        """
        grid = (tokens.shape[1], tokens.shape[2])
        blocks, cells = len(getattr(self.model, "blocks", ())), size[0] * size[1]
        count = self.num_prefix_tokens + cells
        if blocks == 0 or [m.shape[1:] for m in recorder.maps] != [(count, count)] * blocks:
            return self.covered_cells(tokens, size, grid)
        rows = roll_out(recorder.maps, self.num_prefix_tokens)  # (B, N, h*w)
        prefix, patches = rows.split([self.num_prefix_tokens, cells], 1)
        patches = pool_tokens(patches.unflatten(1, size), grid).flatten(1, 2)  # (B, r*c, h*w)
        return torch.cat([prefix, patches], 1).unflatten(-1, size)

    def places(self, x: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
        """Lay the model's features out as a map (B, h, w, D), without prefix tokens.

        Args:
            size: height and width in pixels of the images.

        Raises:
            ValueError: the tokens lie on no grid.
        """
        if x.ndim == 4:
            return x if self.channels_last else x.movedim(1, -1)
        patches = x[:, self.num_prefix_tokens :]
        count = patches.shape[1]
        rows = round((count * size[0] / size[1]) ** 0.5)
        grid = (rows, count // rows) if rows else (0, 0)
        embed: Any = getattr(self.model, "patch_embed", None)
        if hasattr(embed, "dynamic_feat_size"):
            exact = embed.dynamic_feat_size(size)  # it takes padding into account
            grid = exact if exact[0] * exact[1] == count else grid
        if grid[0] * grid[1] != count:
            raise ValueError(f"the {count} tokens of {type(self.model).__name__} do not lie on a grid")
        return patches.unflatten(1, grid)

    def largest_grid(self, image_size: tuple[int, int]) -> Grid:
        """Return the map (h, w) of an image of H x W pixels, found by encoding a blank one, once for each size."""
        size = image_size[0], image_size[1]
        if size not in self.map_sizes:
            places = self.places(self.encode_blank(size), size)
            self.map_sizes[size] = (places.shape[1], places.shape[2])
        return self.map_sizes[size]

    def num_tokens(self, grid: Grid | None = None) -> int:
        """Count the tokens for an image of the model's own size; without a grid, by encoding one such image."""
        if grid is not None:
            return self.num_prefix_tokens + grid[0] * grid[1]
        x = self.encode_blank(self.own_size)
        return x.shape[1] if x.ndim == 3 else self.places(x, self.own_size).flatten(1, 2).shape[1]

    @torch.no_grad()
    def encode_blank(self, size: tuple[int, int]) -> torch.Tensor:
        """Return the model's features of a black image of H x W pixels."""
        some = next(self.model.parameters())
        blank = torch.zeros(1, self.default_cfg["input_size"][0], *size, dtype=some.dtype, device=some.device)
        modes = {module: module.training for module in self.model.modules()}
        self.model.eval()  # in training mode, the black image would change running statistics
        try:
            return self.forward_features(blank)
        finally:
            for module, training in modes.items():
                module.training = training
