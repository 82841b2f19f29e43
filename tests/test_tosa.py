import math

import pytest
import timm
import timm.optim
import torch
import torch.nn.functional as F
from reference_layers import embed_patches, layer_norm, scores, vit_block
from timm.layers import resample_abs_pos_embed
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from captioner.encoders import create_encoder, tosa
from captioner.encoders.tosa import TokenSelector, choose, run_with_queries

SMALL = {"img_size": 64, "embed_dim": 24, "depth": 5, "num_heads": 3, "num_classes": 5}
VIT = {"img_size": 64, "embed_dim": 24, "num_heads": 3, "num_classes": 0, "dynamic_img_size": True}


def make(seed=0, name="tosa_tiny_patch16_224", noise=0.2, **kwargs):
    """Build a model far from its first weights, so that no bias or norm can be forgotten unseen."""
    torch.manual_seed(seed)
    model = timm.create_model(name, **{**SMALL, **kwargs}).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * noise)
    return model.eval()


def pixels(*size, batch=2, seed=1):
    return torch.rand(batch, 3, *size, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def predict(maps, selector):
    """Predict the next attention from the scores of each head, pair by pair of tokens."""
    hidden = torch.einsum("oh,hqk->oqk", selector.expand.weight[..., 0], torch.stack(maps))
    hidden = (hidden + selector.expand.bias[:, None, None]).clamp(min=0)
    result = torch.einsum("oh,hqk->oqk", selector.reduce.weight[..., 0], hidden)
    return F.log_softmax(result + selector.reduce.bias[:, None, None], -1)  # (H, N, N)


def reference(model, image, ratio):
    """ToSA on one image, equation by equation; returns tokens, who attended in each selective layer, and the losses."""
    x = embed_patches(image, model.vit.patch_embed.proj)
    positions = resample_abs_pos_embed(model.vit.pos_embed, x.shape[:2], (4, 4))[0]
    x = torch.cat([model.vit.cls_token[0], x.flatten(0, 1)]) + positions
    attended, divergences = [], []
    for i, block in enumerate(model.vit.blocks):
        maps, _ = scores(x, block)
        if i % 2 == 0:
            predicted = predict(maps, model.selectors[i // 2]) if i + 1 < len(model.vit.blocks) else None
            x = vit_block(x, block)
            continue
        truth = F.softmax(torch.stack(maps), -1)
        divergences.append((truth * (truth.log() - predicted)).sum(-1).mean())
        importance = predicted.exp().mean((0, 1)).tolist()
        ranked = [0, *sorted(range(1, len(x)), key=lambda token: -importance[token])]
        places = sorted(ranked[: round(ratio * len(x))])
        x = x.clone()
        x[places] = vit_block(x[places], block)
        attended.append(places)
    return layer_norm(x, model.vit.norm), attended, divergences


@pytest.mark.parametrize("ratio", [0.3, 0.75, 1.0])
@pytest.mark.parametrize("size", [(64, 64), (48, 96)])
def test_equals_the_equations(size, ratio):
    model, images = make(ratio=ratio), pixels(*size)
    with torch.no_grad():
        tokens = model.forward_tokens(images)
        maps, named = model.forward_with_losses(images)
        _, chosen, _ = model.run_blocks(model.embed(images, (size[0] // 16, size[1] // 16)), None)
        expected = [reference(model, image, ratio) for image in images]
    for number, (found, attended, _) in enumerate(expected):
        torch.testing.assert_close(tokens[number], found, rtol=0, atol=1e-10)
        if ratio < 1:
            assert [places[number].tolist() for places in chosen[1::2]] == attended
    assert chosen[::2] == [None] * 3
    torch.testing.assert_close(maps.tokens.flatten(1, 2), tokens[:, 1:], rtol=0, atol=1e-12)
    divergence = torch.stack([loss for _, _, layers in expected for loss in layers]).mean()
    torch.testing.assert_close(named, {"selector": divergence}, rtol=1e-9, atol=0)


@pytest.mark.parametrize("depth", [1, 4])
@pytest.mark.parametrize("extra", [{}, {"init_values": 0.1, "reg_tokens": 2, "no_embed_class": True, "pre_norm": True}])
@pytest.mark.parametrize("size", [(64, 64), (32, 80)])
def test_with_the_ratio_1_it_is_the_vit_of_the_same_weights(size, extra, depth):
    model = make(ratio=0.4, depth=depth, **extra)
    vit = timm.create_model("vit_tiny_patch16_224", depth=depth, **VIT, **extra).double().eval()
    vit.load_state_dict({k.removeprefix("vit."): v for k, v in model.state_dict().items() if k.startswith("vit.")})
    images = pixels(*size)
    with torch.no_grad():
        expected = vit.forward_features(images)
        assert torch.equal(model.forward_tokens(images, ratio=1), expected)
        maps = model.forward_maps(images, ratio=1, attention=True)
        assert torch.equal(maps.tokens.flatten(1, 2), expected[:, model.num_prefix_tokens :])
        if depth > 1:
            assert not torch.allclose(model.forward_tokens(images), expected)
            assert torch.equal(model.forward_tokens(images), model.forward_tokens(images, ratio=0.4))


def test_tokens_that_do_not_attend_pass_unchanged_and_in_place():
    model, images = make(depth=2, ratio=0.5), pixels(64, 64)
    with torch.no_grad():
        x = model.embed(images, (4, 4))
        after, q, k = run_with_queries(model.vit.blocks[0], x)
        assert torch.equal(after, model.vit.blocks[0](x))
        tokens, (_, places), _ = model.run_blocks(x, None)
        importance = model.selectors[0](q @ k.mT).exp().mean((1, 2))
    assert places.shape == (2, round(0.5 * 17))
    assert (places[:, 0] == 0).all()  # the class token
    assert (places.diff(dim=1) > 0).all()
    bypass = torch.ones(2, 17, dtype=torch.bool).scatter(1, places, False)
    assert torch.equal(tokens[bypass], after[bypass])
    assert (tokens[~bypass] != after[~bypass]).any(-1).all()
    importance[:, 0] = 1  # whatever it receives
    assert (importance[bypass].view(2, -1).amax(1) <= importance.gather(1, places).amin(1)).all()


def test_prefix_tokens_always_attend():
    model = make(reg_tokens=3, ratio=0.01)
    _, chosen, _ = model.run_blocks(model.embed(pixels(64, 64), (4, 4)), None)
    assert [places.tolist() for places in chosen[1::2]] == [[[0, 1, 2, 3]] * 2] * 2
    assert choose(torch.tensor([[0.0, 5, 1, 9]]), 2, 1).tolist() == [[0, 3]]


def test_importance_is_the_same_in_parts(monkeypatch):
    model = make(depth=2)
    _, q, k = run_with_queries(model.vit.blocks[0], model.embed(pixels(64, 64), (4, 4)))
    whole = model.selectors[0](q @ k.mT).exp().mean((1, 2))
    for cached in (1, 3 * 2 * 17 * 5, 2**18):
        monkeypatch.setattr(tosa, "CACHED", cached)
        torch.testing.assert_close(model.selectors[0].importance(q, k), whole)
    torch.testing.assert_close(whole.sum(1), torch.ones_like(whole[:, 0]))


def test_a_new_selector_predicts_that_attention_stays():
    scored = torch.randn(2, 3, 7, 7)
    torch.testing.assert_close(TokenSelector(3)(scored), scored.log_softmax(-1))


def test_the_divergence_reaches_selectors_alone_and_teaches_them():
    model, images = make(noise=0.1, ratio=0.5), pixels(64, 64)
    maps, named = model.forward_with_losses(images)
    named["selector"].backward(retain_graph=True)
    reached = {key for key, parameter in model.named_parameters() if parameter.grad is not None}
    assert reached == {key for key, _ in model.named_parameters() if key.startswith("selectors.")}
    assert all(model.get_parameter(key).grad.abs().max() > 0 for key in reached)
    model.zero_grad()
    (maps.tokens.square().sum() + maps.summary.sum()).backward()
    missed = {key for key, parameter in model.named_parameters() if parameter.grad is None}
    assert missed == reached | {"head.weight", "head.bias"}

    optimizer = torch.optim.Adam(model.selectors.parameters(), 0.02)
    found = []
    for _ in range(30):
        loss = model.forward_with_losses(images)[1]["selector"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        found.append(loss.item())
    assert 0 < found[-1] < 0.7 * found[0]


def test_a_model_without_selective_layers_has_no_loss():
    assert make(depth=1).forward_with_losses(pixels(64, 64))[1] == {}


def test_flops_fall_with_the_ratio():
    def count(encode, **kwargs):
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter, torch.no_grad():
            encode(torch.zeros(1, 3, 224, 224), **kwargs)
        return counter.get_total_flops()

    with torch.device("meta"):
        vit = count(timm.create_model("vit_small_patch16_224", num_classes=0).forward_features)
        model = create_encoder("tosa_small_patch16_224").eval()
        flops = [count(model.forward_tokens, ratio=ratio) for ratio in (1.0, 0.9, 0.7, 0.5, 0.3)]
    assert flops[0] == vit
    shares = [f / vit for f in flops[1:]]
    # half of the layers cost r and a little less; a selector takes (2 * 6 * 12 + 384) * 197^2 multiply-adds
    assert shares == sorted(shares, reverse=True)
    assert shares == pytest.approx([0.97, 0.87, 0.77, 0.67], abs=0.015)


@pytest.mark.parametrize("ratio", [0, -0.5, 1.01, math.nan])
def test_a_ratio_that_is_no_share_is_refused(ratio):
    message = rf"the ratio of tokens that attend is {ratio}; it must be above 0 and at most 1"
    with pytest.raises(ValueError, match=message) as refused:
        create_encoder("tosa_tiny_patch16_224", depth=1, ratio=ratio)
    assert refused.value.settings == ("encoder_options",)
    with pytest.raises(ValueError, match=message):
        make(depth=2).forward_maps(pixels(64, 64), ratio=ratio)


def test_wrong_images_grids_and_options_are_named():
    model = make(depth=1)
    with pytest.raises(ValueError, match="60x64 px is not a multiple of the patch, 16x16 px"):
        model.forward_tokens(pixels(60, 64))
    with pytest.raises(ValueError, match="compressed grid 5x1 is not within the patch grid 4x4"):
        model.forward_with_losses(pixels(64, 64), (5, 1))
    with pytest.raises(ValueError, match="global_pool"):
        make(global_pool="max")
    with pytest.raises(ValueError, match="does not take its options"):
        create_encoder("tosa_tiny_patch16_224", no_such=1)


@pytest.mark.parametrize("grid", [(2, 3), (3, 6)])
def test_a_grid_pools_the_patches(grid):
    model, images = make(), pixels(48, 96)
    tokens = model.forward_tokens(images, grid)
    whole = model.forward_tokens(images)
    assert torch.equal(tokens[:, :1], whole[:, :1])
    cells = whole[:, 1:].unflatten(1, (3, 6)).movedim(-1, 1)
    torch.testing.assert_close(tokens[:, 1:], F.adaptive_avg_pool2d(cells, grid).flatten(2).mT)
    assert torch.equal(make(grid=grid).forward_tokens(images), tokens)


def test_gradient_checkpointing_changes_nothing():
    gradients = []
    for enable in (False, True):
        model = make().train()
        model.set_grad_checkpointing(enable)
        maps, named = model.forward_with_losses(pixels(64, 64))
        (maps.tokens.square().mean() + named["selector"]).backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    for one, other in zip(*gradients, strict=True):
        assert (one is None and other is None) or torch.allclose(one, other)


def test_starts_from_a_vit_of_more_blocks():
    model = make(depth=3)
    vit = timm.create_model("vit_tiny_patch16_224", depth=5, **{**VIT, "img_size": 96}).double().eval()
    torch.nn.init.normal_(vit.blocks[2].attn.qkv.weight)
    model.init_from(vit)
    for own, other in ((0, 0), (1, 2), (2, 4)):
        assert torch.equal(model.vit.blocks[own].attn.qkv.weight, vit.blocks[other].attn.qkv.weight)
    assert model.vit.pos_embed.shape == (1, 17, 24)
    other = make(seed=3, depth=3)
    other.init_from(model)
    assert torch.equal(other.forward_tokens(pixels(64, 64), ratio=1), model.forward_tokens(pixels(64, 64), ratio=1))
    for wrong, message in (
        ({"depth": 2}, "has 2 blocks, fewer than the encoder's 3"),
        ({"embed_dim": 36}, "has shape .*, the encoder's .*; they must be equal"),
        ({"num_heads": 2}, "has 2 attention heads, the encoder 3"),
        ({"init_values": 0.1}, "only one of them has 'blocks.0.ls1.gamma'"),
    ):
        with pytest.raises(ValueError, match=message) as refused:
            model.init_from(timm.create_model("vit_tiny_patch16_224", **{**VIT, "depth": 3, **wrong}))
        assert refused.value.settings == ("init_from",)
    with pytest.raises(ValueError, match="ResNet is not a ViT"):
        model.init_from(timm.create_model("resnet10t"))


def test_trains_as_any_timm_model_does():
    model = timm.create_model("tosa_tiny_patch16_224", **SMALL, drop_path_rate=0.1)
    optimizer = timm.optim.create_optimizer_v2(model, "adamw", lr=1e-2, weight_decay=0.05, layer_decay=0.9)
    undecayed = {id(p) for group in optimizer.param_groups if group["weight_decay"] == 0 for p in group["params"]}
    assert {id(model.vit.pos_embed), id(model.vit.cls_token)} <= undecayed
    images, labels = torch.randn(4, 3, 64, 64), torch.tensor([0, 1, 2, 4])
    found = []
    for _ in range(12):
        loss = F.cross_entropy(model(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        found.append(loss.item())
    assert found[-1] < 0.5 * found[0]


@pytest.mark.slow
def test_compiles_without_breaks():
    model = make(depth=2).float()
    images = pixels(64, 64).float()
    encode = torch.compile(model.forward_with_losses, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        (found, named), (expected, losses) = encode(images, (2, 3)), model.forward_with_losses(images, (2, 3))
        torch.testing.assert_close(found.tokens, expected.tokens, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(named, losses)


def test_bf16_autocast_stays_close():
    torch.manual_seed(0)
    model, images = timm.create_model("tosa_tiny_patch16_224", **SMALL).eval(), pixels(64, 64).float()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        low, named = model.forward_with_losses(images)
    with torch.no_grad():
        torch.testing.assert_close(low.tokens.float(), model.forward_maps(images).tokens, rtol=0.05, atol=0.05)
    assert named["selector"].isfinite()
