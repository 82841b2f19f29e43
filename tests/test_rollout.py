import pytest
import timm
import torch
import torch.nn.functional as F
from timm.layers import set_fused_attn

from captioner.encoders import create_encoder
from captioner.encoders.mhbc import MHBC
from captioner.encoders.rollout import AttentionRecorder, attention_weights

SMALL = {"img_size": 64, "embed_dim": 24, "depth": 3, "num_heads": 3, "grid": (2, 2)}


def make(**kwargs):
    torch.manual_seed(0)
    model = create_encoder("lookupvit_tiny_patch16_224", **{**SMALL, **kwargs}).double().eval()
    with torch.no_grad():  # far from the initial weights, whose attention is even
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.5)
    return model


def attentions_of(layers, forward):
    """Attention (B, N, N) of timm's layers in a forward pass, from their own projections."""
    found = []

    def attend(layer, args):
        q, k, _ = layer.qkv(args[0]).unflatten(-1, (3, layer.num_heads, -1)).permute(2, 0, 3, 1, 4)
        found.append((layer.q_norm(q) @ layer.k_norm(k).mT * q.shape[-1] ** -0.5).softmax(-1).mean(1))

    hooks = [layer.register_forward_pre_hook(attend) for layer in layers]
    forward()
    for hook in hooks:
        hook.remove()
    return found


def reference(model, pixels, size, grid):
    """The rollout of `rollout.py`, image by image and sum by sum, from the attention of every step."""
    gathered, gather = [], MHBC.gather

    def watched(self, *args):
        result = gather(self, *args)
        gathered.append(result[1].mean(1))
        return result

    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr(MHBC, "gather", watched)
        refined = attentions_of([b.refine.attn for b in model.blocks], lambda: model.forward_tokens(pixels, grid))
        tokens = model.forward_tokens(pixels, grid)
    results = []
    for image in range(len(pixels)):
        cells, count = size[0] * size[1], 1 + grid[0] * grid[1]
        P = torch.zeros(count, cells, dtype=torch.float64)
        for cell in range(cells):  # how much of it the bilinear resize takes
            one = torch.eye(cells, dtype=torch.float64)[cell].view(1, 1, *size)
            P[1:, cell] = F.interpolate(one, size=grid, mode="bilinear").flatten()
        L = torch.eye(cells, dtype=torch.float64)
        steps = zip(gathered[: len(refined)], refined, strict=True)
        for A, S in ((a[image], s[image]) for a, s in steps):
            P = torch.stack([0.5 * P[m] + 0.5 * sum(A[m, n] * L[n] for n in range(cells)) for m in range(count)])
            P = torch.stack([0.5 * P[m] + 0.5 * sum(S[m, k] * P[k] for k in range(count)) for m in range(count)])
            shares = [A[:, n] / A[:, n].sum() for n in range(cells)]
            L = torch.stack([0.5 * L[n] + 0.5 * sum(shares[n][m] * P[m] for m in range(count)) for n in range(cells)])
        results.append((P / P.sum(1, keepdim=True)).view(count, *size))
    return tokens, torch.stack(results)


@pytest.mark.parametrize("absorb", [True, False])
@pytest.mark.parametrize(("size", "grid"), [((4, 4), (2, 2)), ((3, 5), (2, 3)), ((2, 2), (2, 2))])
def test_two_streams_are_rolled_out_as_the_equations_say(size, grid, absorb):
    model, pixels = make(absorb=absorb), torch.randn(2, 3, 16 * size[0], 16 * size[1], dtype=torch.float64)
    tokens, expected = reference(model, pixels, size, grid)
    with torch.no_grad():
        maps = model.forward_maps(pixels, grid, attention=True)
    assert torch.equal(maps.tokens.flatten(1, 2), tokens[:, 1:])
    torch.testing.assert_close(maps.attention, expected, rtol=0, atol=1e-12)


def test_as_many_compressed_as_lookup_tokens_are_told_apart():
    model, pixels = make(absorb=False), torch.randn(1, 3, 16, 80, dtype=torch.float64)  # 1x5 cells, 1 + 1x4 tokens
    expected = reference(model, pixels, (1, 5), (1, 4))[1]
    torch.testing.assert_close(model.forward_maps(pixels, (1, 4), attention=True).attention, expected)


def seeks_light(model):
    """Let every compressed token attend to the brightest patch."""
    for parameter in model.parameters():
        torch.nn.init.zeros_(parameter)
    model.patch_embed.proj.weight[0] = 1.0  # the first channel is brightness
    for block in model.blocks:
        for norm in (block.norm_lookup, block.norm_compressed, block.refine.norm1, block.refine.norm2):
            torch.nn.init.ones_(norm.weight)
        block.cross.k.weight.copy_(torch.eye(24))
        block.cross.q.bias[0] = 50.0  # of the first head
    return model


@pytest.mark.parametrize("depth", [1, 3])
def test_attention_follows_what_is_attended_to(depth):
    with torch.no_grad():
        model = seeks_light(make(depth=depth, cross_heads=1, absorb=None))
        for row, column in ((0, 0), (1, 3), (3, 2)):
            pixels = torch.zeros(1, 3, 64, 64, dtype=torch.float64)
            pixels[..., 16 * row : 16 * row + 16, 16 * column : 16 * column + 16] = 1.0
            attention = model.forward_maps(pixels, (2, 2), attention=True).attention[0].flatten(1)  # (5, 16)
            assert (attention.argmax(1) == 4 * row + column).all()
            assert attention.max(1).values.min() >= 0.5


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "vit_small_patch14_reg4_dinov2"])
def test_a_vit_is_rolled_out_as_the_paper_says(name, fused):
    set_fused_attn(fused)
    torch.manual_seed(0)
    side = 56 if "patch14" in name else 64
    encoder = create_encoder(name, img_size=side, depth=3).eval()
    set_fused_attn(True)
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    count, pixels = encoder.num_prefix_tokens, torch.rand(2, 3, side, side)
    with torch.no_grad():
        maps = encoder.forward_maps(pixels, (2, 4), attention=True)
        attentions = attentions_of([block.attn for block in encoder.model.blocks], lambda: encoder(pixels))
    rollout = torch.eye(attentions[0].shape[-1])
    for attention in attentions:
        rollout = (torch.eye(attention.shape[-1]) + attention) / 2 @ rollout
    rows = rollout[..., count:] / rollout[..., count:].sum(-1, keepdim=True)
    prefix, patches = rows[:, :count].unflatten(-1, (4, 4)), rows[:, count:].unflatten(-1, (4, 4))
    torch.testing.assert_close(maps.attention[:, :count], prefix)
    pooled = patches.unflatten(1, (4, 4)).unflatten(1, (2, 2)).mean(2)  # two rows of patches each
    torch.testing.assert_close(maps.attention[:, count:], pooled.flatten(1, 2))
    assert (rows.amax(-1) > 0.2).any()  # it is not even


def test_a_cnn_gives_each_token_the_cells_it_pools():
    encoder = create_encoder("resnet10t").eval()
    with torch.no_grad():
        attention = encoder.forward_maps(torch.rand(1, 3, 128, 160), (2, 2), attention=True).attention[0]
    assert attention.shape == (4, 4, 5)
    expected = torch.zeros(4, 5)
    expected[:2, :3] = 1 / 6
    torch.testing.assert_close(attention[0], expected)
    torch.testing.assert_close(attention[3], expected.flip(0, 1))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"attn_mask": torch.ones(5, 5, dtype=torch.bool).tril()},
        {"attn_mask": torch.arange(25.0).view(5, 5).sin()},
        {"is_causal": True},
        {"scale": 0.3},
    ],
)
def test_recorded_weights_mix_the_values(options):
    torch.manual_seed(0)
    q, k = torch.randn(2, 3, 2, 5, 4).unbind()
    each = torch.eye(5).expand(3, 2, 5, 5)  # values that give the weights back
    with AttentionRecorder() as recorder:
        weights = F.scaled_dot_product_attention(q, k, each, **options)
    [recorded] = recorder.maps
    torch.testing.assert_close(recorded, weights.mean(1))


def test_grouped_queries_are_recorded():
    q, k = torch.randn(3, 4, 5, 8), torch.randn(3, 2, 5, 8)
    each = torch.eye(5).expand(3, 2, 5, 5)
    expected = F.scaled_dot_product_attention(q, k, each, enable_gqa=True).mean(1)
    torch.testing.assert_close(attention_weights(q, k, each, enable_gqa=True), expected)


def test_attention_costs_nothing_unless_asked_for(monkeypatch):
    model = timm.create_model("lookupvit_tiny_patch16_224", **SMALL).eval()
    monkeypatch.setattr("captioner.encoders.rollout.attention_weights", None)
    monkeypatch.setattr("captioner.encoders.lookupvit.mix", None)
    model.forward_maps(torch.zeros(1, 3, 64, 64))
    with pytest.raises(TypeError):
        model.forward_maps(torch.zeros(1, 3, 64, 64), attention=True)
