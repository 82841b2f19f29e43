import pytest
import stvit_reference as ref
import timm
import timm.optim
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from captioner.encoders import create_encoder, describe_encoder, rebuild_encoder
from captioner.encoders.semantic import count_windows, cut_windows, join_windows

GLOBAL = {"img_size": 64, "embed_dim": 24, "depth": 5, "num_heads": 3, "image_layers": 2, "grid": (2, 2)}
LOCAL = {"img_size": 64, "embed_dim": 12, "depths": (2, 1, 4, 1), "num_heads": (1, 2, 2, 4), "image_layers": 1}
LOCAL |= {"window_size": 2, "overlap": 1, "grid": (2, 2)}
KINDS = {
    "stvit_small_patch16_224": GLOBAL,
    "stvitr_small_patch16_224": GLOBAL | {"depth": 8, "unit_layers": 3},
    "stvit_swin_tiny_patch4_window7_224": LOCAL,
    "stvitr_swin_tiny_patch4_window7_224": LOCAL | {"depths": (2, 1, 8, 2), "unit_layers": 4},
}
every_kind = pytest.mark.parametrize("name", KINDS)
recovering = pytest.mark.parametrize("name", [name for name in KINDS if name.startswith("stvitr_")])


def make(name, seed=0, **kwargs):
    torch.manual_seed(seed)
    model = create_encoder(name, **{**KINDS[name], "num_classes": 5, **kwargs}).double()
    with torch.no_grad():  # away from the initial zeros and LayerScale, so that nothing can be forgotten unseen
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return model.eval()


def reference(model, image, grid):
    """Return the tokens, the dense tokens before the norm or `None`, and the attention, of one image."""
    size = image.shape[1] // model.stride, image.shape[2] // model.stride
    cells = size[0] * size[1]
    own = torch.eye(cells, dtype=torch.float64)
    if model.num_prefix_tokens:
        positions = ref.bilinear(model.pos_embed.flatten(0, 2), model.pos_embed.shape[1:3], size)
        x = torch.cat([model.cls_token[0], ref.patches(model.patch_embed.proj, image, 16) + positions])
        rows = torch.cat([torch.zeros(1, cells, dtype=torch.float64), own])
        for stage in model.stages:
            if hasattr(stage, "generation"):
                x, rows, side = ref.unit(stage, x, rows, size, grid)
            else:
                x, rows = ref.self_block(stage.block, x, rows)
    else:
        side = 8 * size[0], 8 * size[1]
        x = ref.layer_norm(ref.patches(model.patch_embed.proj, image, 4), model.patch_embed.norm)
        rows = own.view(*size, -1).repeat_interleave(8, 0).repeat_interleave(8, 1).flatten(0, 1)
        first, second, third, last = model.stages
        for part in (first, second, *third.parts, last):
            if hasattr(part, "generation"):
                x, rows, side = ref.unit(part, x, rows, side, (2 * grid[0], 2 * grid[1]))
            elif hasattr(part, "stage"):
                x, rows, side = ref.swin_stage(part.stage, x, rows, side)
            else:
                x, rows, side = ref.merge(part.downsample, x, rows, side)
                for block in part.blocks:
                    x, rows = ref.self_block(block, x, rows)
    x, p = ref.layer_norm(x, model.norm), model.num_prefix_tokens
    dense = None
    if model.recovers:
        dense = x[p:].view(*size, -1)
        x = torch.cat([x[:p], ref.pool(x[p:], side, grid, ref.mean)])
        rows = torch.cat([rows[:p], ref.pool(rows[p:], side, grid, ref.mean)])
    return x, dense, (rows / rows.sum(1, keepdim=True)).view(-1, *size)


@every_kind
@pytest.mark.parametrize(("size", "grid"), [((64, 64), (2, 2)), ((64, 128), (2, 3)), ((128, 64), (1, 1))])
def test_tokens_and_attention_equal_the_equations(name, size, grid):
    model = make(name)
    image = torch.randn(3, *size, dtype=torch.float64)
    with torch.no_grad():
        maps = model.forward_maps(image[None], grid, attention=True)
        tokens, dense, attention = reference(model, image, grid)
        torch.testing.assert_close(model.forward_tokens(image[None], grid)[0], tokens, rtol=0, atol=1e-10)
    torch.testing.assert_close(maps.attention[0], attention, rtol=0, atol=1e-12)
    assert (maps.dense is None) == (dense is None)
    if dense is not None:
        torch.testing.assert_close(maps.dense[0], dense, rtol=0, atol=1e-10)


def test_windows_are_those_of_the_paper():
    """At 14 x 14 cells: 2 x 2 windows, pooled from 7 x 7 cells to 3 x 3, in neighbourhoods that `unfold` cuts."""
    x = torch.randn(2, 14, 14, 5)
    assert count_windows((14, 14), (6, 6), 7) == (2, 2)
    cut = cut_windows(x, (2, 2), 3)  # (2*4, 100, 5)
    unfolded = F.unfold(x.movedim(-1, 1), kernel_size=10, stride=4).view(2, 5, 100, 4)
    assert torch.equal(cut, unfolded.permute(0, 3, 2, 1).flatten(0, 1))
    windows = x.unflatten(2, (2, 7)).unflatten(1, (2, 7)).transpose(2, 3).flatten(0, 2)  # (2*4, 7, 7, 5)
    each = F.adaptive_max_pool2d(windows.movedim(-1, 1), 3).flatten(2).mT
    whole = F.adaptive_max_pool2d(x.movedim(-1, 1), 6).movedim(1, -1)
    assert torch.equal(cut_windows(whole, (2, 2)), each)


@pytest.mark.parametrize(
    ("size", "grid", "windows"),
    [((14, 14), (5, 5), (1, 1)), ((28, 14), (8, 6), (4, 2)), ((21, 21), (6, 4), (3, 2)), ((7, 7), (2, 2), (1, 1))],
)
def test_windows_cover_every_map_and_grid(size, grid, windows):
    assert count_windows(size, grid, 7) == windows
    places = torch.arange(size[0] * size[1]).view(1, *size, 1).double()
    cut = cut_windows(places, windows, 3)
    assert len(cut) == windows[0] * windows[1]
    assert set(cut.flatten().tolist()) == set(places.flatten().tolist())
    tokens = torch.randn(2, *grid, 3)
    assert torch.equal(join_windows(cut_windows(tokens, windows), windows, grid), tokens)


@every_kind
def test_gradients_reach_every_parameter(name):
    model = make(name).train()
    pixels = torch.randn(2, 3, 64, 64, dtype=torch.float64, requires_grad=True)
    model(pixels).square().sum().backward()
    assert [key for key, p in model.named_parameters() if p.grad is None or not p.grad.any()] == []
    assert pixels.grad.any()


@every_kind
def test_gradient_checkpointing_changes_nothing(name):
    gradients = []
    for enable in (False, True):
        model = make(name).train()
        model.set_grad_checkpointing(enable)
        model(torch.ones(1, 3, 64, 64, dtype=torch.float64)).sum().backward()
        gradients.append([p.grad for p in model.parameters()])
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b)


def gmacs(name):
    # torch counts no FLOPs of the fused attention of CPUs
    with torch.device("meta"), torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        model, pixels = timm.create_model(name, num_classes=0).eval(), torch.zeros(1, 3, 224, 224)
        with FlopCounterMode(display=False) as counter:
            model.forward_features(pixels)
    return counter.get_total_flops() / 2e9


def test_multiply_adds_are_saved_as_the_paper_claims():
    costs = {"deit_small_patch16_224": 4.60, "swin_tiny_patch4_window7_224": 4.49}
    costs |= {"stvit_small_patch16_224": 1.85, "stvitr_small_patch16_224": 2.42}
    costs |= {"stvit_swin_tiny_patch4_window7_224": 2.81, "stvitr_swin_tiny_patch4_window7_224": 3.09}
    found = {name: gmacs(name) for name in costs}
    assert found == pytest.approx(costs, abs=0.01)
    deit, swin = found["deit_small_patch16_224"], found["swin_tiny_patch4_window7_224"]
    assert found["stvit_small_patch16_224"] < 0.45 * deit
    assert found["stvitr_swin_tiny_patch4_window7_224"] < 0.70 * swin


@pytest.mark.parametrize(
    ("name", "millions"),
    [
        ("stvit_tiny_patch16_224", 5.7),
        ("stvit_small_patch16_224", 22.1),
        ("stvit_base_patch16_224", 86.6),
        ("stvitr_base_patch16_224", 86.6),
        ("stvit_swin_tiny_patch4_window7_224", 28.3),
        ("stvitr_swin_small_patch4_window7_224", 49.6),
        ("stvitr_swin_base_patch4_window7_224", 87.8),
    ],
)
def test_variants_have_the_sizes_of_the_networks_they_come_from(name, millions):
    with torch.device("meta"):
        model = timm.create_model(name)
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(millions, rel=0.02)


@every_kind
def test_layer_scale_starts_small_and_only_on_semantic_layers(name):
    model = create_encoder(name, **KINDS[name])
    scales = {key: p for key, p in model.named_parameters() if "ls1" in key or "ls2" in key}
    assert scales
    assert all(torch.equal(p, torch.full_like(p, 1e-5)) for p in scales.values())
    crosses = [key for key in dict(model.named_modules()) if "generation." in key and key.endswith(".attn")]
    assert {f"{key.removesuffix('attn')}ls1.gamma" for key in crosses} <= scales.keys()


@every_kind
def test_it_trains_as_any_timm_model_does(name):
    torch.manual_seed(0)
    model = timm.create_model(name, **KINDS[name], num_classes=20)
    optimizer = timm.optim.create_optimizer_v2(model, "adamw", lr=1e-2, weight_decay=0.05)
    undecayed = {id(p) for group in optimizer.param_groups if group["weight_decay"] == 0 for p in group["params"]}
    tables = [p for key, p in model.named_parameters() if key.endswith(("centres", "pos_embed", "bias_table"))]
    assert len(tables) >= 2
    assert {id(p) for p in tables} <= undecayed
    images, labels = torch.randn(4, 3, 64, 64), torch.tensor([0, 5, 10, 19])
    losses = []
    for _ in range(12):
        loss = F.cross_entropy(model(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


@every_kind
def test_a_description_and_a_state_dict_bring_it_back(name):
    model = make(name, num_classes=0)
    rebuilt = rebuild_encoder(describe_encoder(name, **KINDS[name])).double().eval()
    rebuilt.load_state_dict(model.state_dict())
    pixels = torch.randn(1, 3, 64, 64, dtype=torch.float64)
    assert torch.equal(model(pixels), rebuilt(pixels))


@every_kind
def test_bf16_autocast_stays_close(name):
    model, pixels = create_encoder(name, **KINDS[name]).eval(), torch.randn(2, 3, 64, 96)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        low = model.forward_tokens(pixels, (2, 3))
    with torch.no_grad():
        torch.testing.assert_close(low.float(), model.forward_tokens(pixels, (2, 3)), rtol=0.1, atol=0.1)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["stvit_small_patch16_224", "stvitr_swin_tiny_patch4_window7_224"])
def test_compiles_without_breaks(name):
    depth = {"depths": (1, 1, 4, 1)} if "swin" in name else {"depth": 5}
    model, pixels = make(name, **depth).float(), torch.randn(2, 3, 64, 64)
    encode = torch.compile(model.forward_maps, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        for found, expected in zip(encode(pixels, (1, 2))[:3], model.forward_maps(pixels, (1, 2))[:3], strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@recovering
def test_dense_features_as_timm_gives_them(name):
    model = make(name, num_classes=0)
    pixels = torch.randn(2, 3, 64, 96, dtype=torch.float64)
    with torch.no_grad():
        maps = model.forward_intermediates(pixels, norm=True, intermediates_only=True)
        assert torch.equal(maps[-1].movedim(1, -1), model.forward_maps(pixels).dense)
        tokens, last = model.forward_intermediates(pixels, 1)
        assert torch.equal(tokens, model.forward_tokens(pixels))
        backbone = timm.create_model(name, features_only=True, out_indices=(1, 2), **KINDS[name]).double().eval()
        backbone.load_state_dict({f"model.{k}": v for k, v in model.state_dict().items()}, strict=False)
        found = backbone(pixels)
    assert len(last) == 1
    for feature, expected, channels, stride in zip(
        found, maps[1:3], backbone.feature_info.channels(), backbone.feature_info.reduction(), strict=True
    ):
        assert torch.equal(feature, expected)
        assert feature.shape == (2, channels, 64 // stride, 96 // stride)
    assert len(backbone.model.stages) == 3  # those after the last map are dropped


def test_features_of_every_stride():
    with torch.device("meta"):
        backbone = timm.create_model("stvitr_swin_tiny_patch4_window7_224", features_only=True)
    assert backbone.feature_info.reduction() == [4, 8, 16, 32]
    assert backbone.feature_info.channels() == [96, 192, 384, 768]


def test_dense_features_need_recovery():
    for name in ("stvit_small_patch16_224", "stvit_swin_tiny_patch4_window7_224"):
        with pytest.raises(ValueError, match="has no dense features: choose a variant of STViT-R"):
            timm.create_model(name, features_only=True, **KINDS[name])
        assert create_encoder(name, **KINDS[name]).forward_maps(torch.zeros(1, 3, 64, 64)).dense is None


@every_kind
def test_wrong_shapes_are_named_in_one_line(name):
    encoder = create_encoder(name, **KINDS[name])
    stride = encoder.stride
    for shape, grid, message, setting in [
        ((60, 64), None, f"image of 60x64 px is not a multiple of the stride, {stride}x{stride} px", "image_size"),
        ((0, 64), None, "image of 0x64 px is not a multiple", "image_size"),
        ((64, 64), (9, 1), r"compressed grid 9x1 is not within the \w+ \w+ (2x2|4x4)", "grid"),
    ]:
        for encode in (encoder.forward_tokens, encoder.forward_maps):
            with pytest.raises(ValueError, match=message) as error:
                encode(torch.zeros(1, 3, *shape), grid)
            assert setting in error.value.settings
            assert "\n" not in str(error.value)


def test_an_image_smaller_than_a_window_is_refused():
    message = "image of 96x128 px has 6x8 cells in stage 3, fewer than a window of 7x7"
    name = "stvit_swin_tiny_patch4_window7_224"
    encoder = create_encoder(name, embed_dim=12, depths=(1, 1, 4, 1))
    for encode in (encoder.forward_tokens, encoder.forward_maps):
        with pytest.raises(ValueError, match=message) as error:
            encode(torch.zeros(1, 3, 96, 128))
        assert error.value.settings == ("image_size", "encoder_options")
    with pytest.raises(ValueError, match=message):
        create_encoder(name, img_size=(96, 128))
    assert encoder.forward_tokens(torch.zeros(1, 3, 128, 160), (4, 5)).shape == (1, 20, 96)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("stvit_small_patch16_224", {"depth": 3}, "semantic tokens need at least 2 layers, not 1: two generate them$"),
        ("stvitr_small_patch16_224", {"depth": 11}, "9 layers do not divide into semantic units of 4"),
        (
            "stvitr_small_patch16_224",
            {"depth": 6, "unit_layers": 2},
            "at least 3 layers, not 2: two generate them and one recovers",
        ),
        ("stvitr_small_patch16_224", {"unit_layers": 0}, "do not divide into semantic units of 0 layers"),
        ("stvit_small_patch16_224", {"image_layers": 5}, "at least 2 layers, not 0"),
        ("stvit_small_patch16_224", {"image_layers": -1}, "image_layers is -1, which is less than 0"),
        ("stvit_swin_tiny_patch4_window7_224", {"image_layers": -1}, "image_layers is -1"),
        ("stvit_swin_tiny_patch4_window7_224", {"image_layers": 5}, "at least 2 layers, not 0"),
        ("stvit_swin_tiny_patch4_window7_224", {"window_size": 0}, "window_size is 0, which is less than 1"),
        ("stvit_swin_tiny_patch4_window7_224", {"overlap": -1}, "overlap is -1"),
        ("stvit_swin_tiny_patch4_window7_224", {"depths": (1, 1, 0, 1)}, "at least 2 layers, not 0"),
        ("stvitr_swin_tiny_patch4_window7_224", {"depths": (1, 1, 0, 1)}, "0 layers do not divide"),
        ("stvit_small_patch16_224", {"depth": 0}, "at least 2 layers, not 0"),
        ("stvit_small_patch16_224", {"num_heads": 5}, "divisible"),
        ("stvit_small_patch16_224", {"global_pool": "max"}, "global_pool"),
        ("stvit_swin_tiny_patch4_window7_224", {"global_pool": "token"}, "a STViTSwin has avg"),
        ("stvit_swin_tiny_patch4_window7_224", {"depths": (1, 1, 2, 1)}, "at least 2 layers, not 1"),
        ("stvit_swin_tiny_patch4_window7_224", {"depths": (1, 1, 4)}, "must each have 4 numbers"),
    ],
)
def test_options_that_do_not_fit_are_refused(name, options, message):
    with pytest.raises(ValueError, match=message) as error:
        create_encoder(name, **{**KINDS[name], "unit_layers": 4 if "stvitr" in name else None, **options})
    assert "\n" not in str(error.value)
