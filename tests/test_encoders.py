"""The contract, held by every encoder of this package and by one stock model of each kind."""

from functools import cache

import pytest
import timm
import torch

from captioner.encoders import TokenEncoder, create_encoder, own_encoders, rebuild_encoder
from captioner.errors import SettingError

STOCK = {
    "vit_tiny_patch16_224": {"img_size": 64, "depth": 2},
    "vit_small_patch14_reg4_dinov2": {"img_size": 56, "depth": 1},  # a class token and registers
    "vit_little_patch16_reg4_gap_256": {"img_size": 64, "depth": 1},  # registers alone
    "eva02_tiny_patch14_224": {"img_size": 56, "depth": 1, "dynamic_img_size": True},  # rotary positions
    "resnet10t": {},
    "tf_efficientnet_lite0": {},  # "same" padding
    "swin_tiny_patch4_window7_224": {
        **{"img_size": 64, "window_size": 4, "depths": (1, 1), "num_heads": (3, 6), "strict_img_size": False}
    },
}
POOLED = ("tosa_", "tore_vit_")  # their own map is that of the patches, which a grid pools
OWN = {
    "stvit_": {"embed_dim": 48, "depth": 3, "image_layers": 1},
    "stvitr_": {"embed_dim": 48, "depth": 4, "image_layers": 1, "unit_layers": 3},
    "stvit_swin_": {"embed_dim": 24, "depths": (1, 2, 3, 1), "image_layers": 1, "window_size": 4},
    "stvitr_swin_": {"embed_dim": 24, "depths": (1, 1, 8, 2), "image_layers": 1, "unit_layers": 4, "window_size": 4},
    **{start: {"depth": 2, "grid": None} for start in POOLED},
}


def small(name: str) -> dict:
    """Return options that make one of our own encoders fast: a single block, or those of the longest name in `OWN`."""
    start = max((start for start in OWN if name.startswith(start)), key=len, default="")
    return {"img_size": 64, "grid": (2, 2), **OWN.get(start, {"depth": 1})}


OPTIONS = {name: small(name) for name in own_encoders()} | STOCK
every_encoder = pytest.mark.parametrize("name", OPTIONS)


@cache
def shared_encoder(name: str) -> TokenEncoder:
    """Build an encoder once, for the tests that leave it as it is."""
    torch.manual_seed(0)
    return create_encoder(name, **OPTIONS[name]).eval()


def images(name: str, wide: bool = False) -> torch.Tensor:
    side = OPTIONS[name].get("img_size", 96)
    generator = torch.Generator().manual_seed(0)
    return torch.rand(2, 3, side, side * 3 // 2 if wide else side, generator=generator)


def test_the_suite_has_every_encoder_of_this_package():
    assert {f"lookupvit_{size}_patch16_224" for size in ("tiny", "small", "base", "large")} <= set(own_encoders())
    assert {f"{kind}_small_patch16_224" for kind in ("stvit", "stvitr")} <= set(own_encoders())
    assert {f"{kind}_swin_tiny_patch4_window7_224" for kind in ("stvit", "stvitr")} <= set(own_encoders())
    assert own_encoders() == [name for name in OPTIONS if name not in STOCK]


@every_encoder
def test_facts(name):
    encoder = shared_encoder(name)
    assert isinstance(encoder, TokenEncoder)
    assert encoder.chooses_grid == (name in own_encoders() and not name.startswith(POOLED))
    assert encoder.grid == ((2, 2) if encoder.chooses_grid else None)
    assert encoder.has_class_token <= (encoder.num_prefix_tokens > 0)
    assert {"input_size", "mean", "std", "architecture"} <= encoder.default_cfg.keys()
    height, width = encoder.default_cfg["input_size"][1:]
    cells = encoder.largest_grid((height, width))
    for side, pixels in zip(cells, (height, width), strict=True):
        assert side in (pixels // encoder.stride, -(-pixels // encoder.stride))  # CNNs may count a part of a cell
    with torch.no_grad():
        tokens = encoder.forward_tokens(torch.zeros(1, 3, height, width))
    assert tokens.shape == (1, encoder.num_tokens(), encoder.embed_dim)


def test_prefix_tokens_are_those_of_the_model():
    prefixes = {name: (shared_encoder(name).num_prefix_tokens, shared_encoder(name).has_class_token) for name in STOCK}
    assert list(prefixes.values()) == [(1, True), (5, True), (4, False), (1, True), (0, False), (0, False), (0, False)]


@every_encoder
@pytest.mark.parametrize("wide", [False, True])
def test_tokens_and_maps_agree_at_every_grid_and_shape(name, wide):
    encoder, pixels = shared_encoder(name), images(name, wide)
    largest = encoder.largest_grid(tuple(pixels.shape[-2:]))
    with torch.no_grad():
        for grid in (None, (1, 1), (2, 1), (2, 3) if wide else (1, 2), largest):
            tokens = encoder.forward_tokens(pixels, grid)
            maps = encoder.forward_maps(pixels, grid)
            shape = grid or encoder.grid or largest
            assert tokens.shape == (2, encoder.num_prefix_tokens + shape[0] * shape[1], encoder.embed_dim)
            assert grid is None or encoder.num_tokens(grid) == tokens.shape[1]
            assert maps.tokens.shape == (2, *shape, encoder.embed_dim)
            assert torch.equal(maps.tokens.flatten(1, 2), tokens[:, encoder.num_prefix_tokens :])
            summary = tokens[:, 0] if encoder.has_class_token else maps.tokens.mean((1, 2))
            torch.testing.assert_close(maps.summary, summary)
            assert (maps.dense is not None) == encoder.has_dense_tokens
            if maps.dense is not None:
                assert maps.dense.shape == (2, *largest, encoder.embed_dim)
            assert maps.attention is None
    assert not torch.allclose(tokens[0], tokens[1])  # images differ, so their tokens do


@every_encoder
def test_attention_says_where_each_token_comes_from(name):
    encoder, pixels = shared_encoder(name), images(name, wide=True)
    height, width = encoder.largest_grid(tuple(pixels.shape[-2:]))
    with torch.no_grad():
        for grid in (None, (2, 3), (1, 2)):
            plain, maps = encoder.forward_maps(pixels, grid), encoder.forward_maps(pixels, grid, attention=True)
            assert torch.equal(plain.tokens, maps.tokens)
            assert torch.equal(plain.summary, maps.summary)
            rows, columns = maps.tokens.shape[1:3]
            assert maps.attention.shape == (2, encoder.num_prefix_tokens + rows * columns, height, width)
            assert maps.attention.min() >= 0
            torch.testing.assert_close(maps.attention.sum((-1, -2)), torch.ones(maps.attention.shape[:2]))
            places = maps.attention[:, encoder.num_prefix_tokens :].unflatten(1, (rows, columns))  # (2, r, c, h, w)
            middle_y = (places.sum(-1) * torch.arange(height)).sum(-1)  # of what each token comes from
            middle_x = (places.sum(-2) * torch.arange(width)).sum(-1)
            if name.startswith("tosa_"):  # tokens that bypass a layer stay nearer to their own place than others
                middle_y, middle_x = middle_y.mean(2, keepdim=True), middle_x.mean(1, keepdim=True)
            assert (middle_y.diff(dim=1) > 0).all()
            assert (middle_x.diff(dim=2) > 0).all()


@every_encoder
def test_a_grid_larger_than_the_map_is_refused(name):
    encoder, pixels = shared_encoder(name), images(name)
    rows, columns = encoder.largest_grid(tuple(pixels.shape[-2:]))
    for encode in (encoder.forward_tokens, encoder.forward_maps):
        with pytest.raises(ValueError, match=rf"grid {rows + 1}x1 is not within the \w+ \w+ {rows}x{columns}") as error:
            encode(pixels, (rows + 1, 1))
        assert "grid" in error.value.settings


@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("vit_tiny_patch16_224", (65, 64)),
        ("swin_tiny_patch4_window7_224", (30, 30)),
        *((n, (64, 65)) for n in own_encoders()),
    ],
)
def test_an_image_size_that_is_not_taken_is_refused(name, size):
    encoder = shared_encoder(name)
    if name.startswith("swin"):
        encoder = create_encoder(name, **OPTIONS[name] | {"strict_img_size": True})
    for encode in (encoder.forward_tokens, encoder.forward_maps, lambda x: encoder.largest_grid(x.shape[-2:])):
        with pytest.raises(SettingError, match=rf"{size[0]}x{size[1]} px") as error:
            encode(torch.zeros(1, 3, *size))
        assert "image_size" in error.value.settings


@every_encoder
def test_a_frozen_encoder_stays_as_it_is(name):
    encoder = create_encoder(name, **OPTIONS[name]).freeze()
    before = {key: value.clone() for key, value in encoder.state_dict().items()}
    encoder.train()
    assert not any(module.training for module in encoder.modules())
    tokens = encoder.encode(images(name))
    assert not tokens.requires_grad
    assert not any(p.requires_grad for p in encoder.parameters())
    for key, value in encoder.state_dict().items():
        assert torch.equal(value, before[key]), key


@every_encoder
def test_counting_leaves_running_statistics_and_modes_alone(name):
    encoder = create_encoder(name, **OPTIONS[name])
    list(encoder.children())[-1].eval()
    before = {key: value.clone() for key, value in encoder.state_dict().items()}
    modes = [module.training for module in encoder.modules()]
    assert encoder.num_tokens() > 0
    assert encoder.largest_grid(tuple(images(name).shape[-2:])) > (0, 0)
    assert [module.training for module in encoder.modules()] == modes
    assert all(value.equal(before[key]) for key, value in encoder.state_dict().items())


@every_encoder
def test_timm_trains_it_as_a_classifier(name):
    options = OPTIONS[name]
    model = timm.create_model(name, num_classes=7, **options).eval()
    pixels = images(name)
    logits = model(pixels)
    assert logits.shape == (2, 7)
    features = model.forward_features(pixels)
    assert torch.equal(model.get_classifier()(model.forward_head(features, pre_logits=True)), logits)
    logits.square().sum().backward()
    assert model.get_classifier().weight.grad.abs().sum() > 0
    encoder = create_encoder(name, num_classes=7, **options).eval()
    assert encoder(pixels).shape == (2, 7)
    encoder.reset_classifier(3)
    assert encoder.num_classes == 3
    assert encoder(pixels).shape == encoder.forward_head(encoder.forward_features(pixels)).shape == (2, 3)
    encoder.reset_classifier(0)
    assert encoder(pixels).shape[0] == 2
    assert name in STOCK or encoder.no_weight_decay() <= dict(encoder.named_parameters()).keys()


@every_encoder
def test_gradients_reach_every_parameter(name):
    torch.manual_seed(0)
    encoder, pixels = create_encoder(name, **OPTIONS[name]).train(), images(name)
    maps, losses = encoder.forward_with_losses(pixels, (2, 2))
    loss = sum(losses.values()) + maps.tokens.square().sum() + maps.summary.abs().sum()
    if maps.dense is not None:
        loss = loss + maps.dense.square().sum()
    loss.backward()
    without = [key for key, parameter in encoder.named_parameters() if parameter.grad is None]
    # the norm before the classifier of a ViT that pools by the mean is not part of the tokens
    assert [key for key in without if "fc_norm" not in key] == []


@every_encoder
def test_half_precision_stays_close(name):
    encoder = create_encoder(name, **OPTIONS[name]).freeze()
    pixels = images(name)
    whole = encoder.encode(pixels, 2)
    half = encoder.to(torch.bfloat16).encode(pixels, "2x2")
    assert half.dtype == torch.bfloat16
    assert (half.float() - whole).square().mean() < 0.01 * whole.square().mean()
    maps = encoder.forward_maps(pixels.bfloat16(), (2, 2), attention=True)
    torch.testing.assert_close(maps.attention.sum((-1, -2)), torch.ones(maps.attention.shape[:2]))
    with torch.autocast("cpu", torch.bfloat16):
        maps = encoder.float().forward_maps(pixels, (2, 2), attention=True)
    torch.testing.assert_close(maps.attention.sum((-1, -2)), torch.ones(maps.attention.shape[:2]))


@every_encoder
def test_weights_go_into_a_rebuilt_encoder(name):
    encoder = shared_encoder(name)
    rebuilt = rebuild_encoder({"name": name, "kwargs": OPTIONS[name]}).eval()
    pixels = images(name)
    with torch.no_grad():
        tokens = encoder.forward_tokens(pixels)
        assert not torch.equal(rebuilt.forward_tokens(pixels), tokens)
        rebuilt.load_state_dict(encoder.state_dict())
        assert torch.equal(rebuilt.forward_tokens(pixels), tokens)
