import math

import pytest
import timm
import timm.optim
import torch
import torch.nn.functional as F
from reference_layers import affine, bilinear, embed_patches, layer_norm, mlp, vit_block
from torch.utils.flop_counter import FlopCounterMode

from captioner.encoders import create_encoder
from captioner.encoders.lookupvit import LookupBlock

SMALL = {"img_size": 64, "embed_dim": 24, "depth": 3, "num_heads": 3, "num_classes": 5, "grid": (2, 2)}


def make(seed=0, **kwargs):
    torch.manual_seed(seed)
    model = timm.create_model("lookupvit_tiny_patch16_224", **{**SMALL, **kwargs}).double()
    with torch.no_grad():  # away from the initial zeros, so that no bias or norm can be forgotten unseen
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return model.eval()


def reference(model, image, grid):
    """LookupViT on one image, head by head and equation by equation."""
    dim = model.embed_dim
    x = embed_patches(image, model.patch_embed.proj)
    rows, columns = x.shape[:2]
    lookup = (x + bilinear(model.pos_lookup[0], rows, columns)).reshape(-1, dim)
    grid_tokens = (bilinear(x, *grid) + bilinear(model.pos_compressed[0], *grid)).reshape(-1, dim)
    compressed = torch.cat([model.cls_token[0], grid_tokens])

    for block in model.blocks:
        cross, heads = block.cross, block.cross.num_heads
        p, lk = layer_norm(compressed, block.norm_compressed), layer_norm(lookup, block.norm_lookup)
        q, k, v = affine(p, cross.q), affine(lk, cross.k), affine(lk, cross.v)
        maps, read = [], []
        for part in torch.arange(dim).chunk(heads):
            maps.append(F.softmax(q[:, part] @ k[:, part].T / math.sqrt(dim / heads), -1))
            read.append(maps[-1] @ v[:, part])
        compressed = compressed + affine(torch.cat(read, -1), cross.proj)

        compressed = vit_block(compressed, block.refine)

        if block is not model.blocks[-1]:
            v = affine(layer_norm(compressed, block.norm_refined), cross.infuse_v)
            parts = torch.arange(dim).chunk(cross.num_heads)
            sent = [attn.T @ v[:, part] for attn, part in zip(maps, parts, strict=True)]
            lookup = lookup + affine(torch.cat(sent, -1), cross.infuse_proj)
            lookup = lookup + mlp(layer_norm(lookup, block.norm_lookup_mlp), block.lookup_mlp)
    return layer_norm(compressed, model.norm)


@pytest.mark.parametrize("absorb", [False, True, None])
@pytest.mark.parametrize(
    ("size", "grid"), [((64, 64), (2, 2)), ((64, 64), (3, 3)), ((48, 96), (2, 4)), ((64, 64), (1, 1))]
)
def test_equals_the_equations(size, grid, absorb):
    model = make(absorb=absorb)
    image = torch.randn(3, *size, dtype=torch.float64)
    with torch.no_grad():
        tokens = model.forward_tokens(image[None], grid)[0]
        expected = reference(model, image, grid)
    assert tokens.shape == (1 + grid[0] * grid[1], 24)
    torch.testing.assert_close(tokens, expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("cross_heads", [None, 1, 2])
def test_direct_equals_absorbed_in_outputs_and_gradients(cross_heads):
    results = []
    for absorb in (False, True):
        model = make(absorb=absorb, cross_heads=cross_heads).train()
        image = torch.randn(2, 3, 64, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
        image.requires_grad_()
        output = model.forward_tokens(image, (3, 3))
        output.square().sum().backward()
        gradients = {name: p.grad for name, p in model.named_parameters() if not name.startswith("head.")}
        results.append((output, image.grad, gradients))
    (direct, direct_image, direct_grads), (absorbed, absorbed_image, absorbed_grads) = results
    torch.testing.assert_close(direct, absorbed, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(direct_image, absorbed_image, rtol=1e-9, atol=1e-11)
    for name, gradient in direct_grads.items():
        assert gradient is not None, name
        assert gradient.abs().max() > 0, name
        torch.testing.assert_close(
            gradient, absorbed_grads[name], rtol=1e-9, atol=1e-10, msg=lambda m, n=name: f"{n}: {m}"
        )


# PAPERS.md, GMACs of 12 whole blocks (the last one included, though its infusion is never needed): width, lookup
# tokens, grid, plain ViT blocks, LookupViT direct, absorbed
FLOPS = [
    (384, 196, 3, 4.52, 1.68, 0.83),
    (384, 196, 5, 4.52, 2.15, 1.60),
    (384, 196, 7, 4.52, 2.87, 2.78),
    (384, 784, 5, 22.3, 6.53, 3.91),
    (768, 196, 5, 17.4, 8.46, 6.40),
    (768, 784, 5, 77.9, 25.5, 15.6),
]


def gmacs(run):
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        run()
    return counter.get_total_flops() / 2e9


@pytest.mark.parametrize(("dim", "n", "grid", "vit", "direct", "absorbed"), FLOPS)
def test_multiply_adds_are_those_of_the_table(dim, n, grid, vit, direct, absorbed):
    with torch.device("meta"):
        streams = torch.zeros(1, 1 + grid * grid, dim), torch.zeros(1, n, dim)
        for absorb, expected in ((False, direct), (True, absorbed)):
            block = LookupBlock(dim, dim // 64, absorb=absorb)
            assert 12 * gmacs(lambda block=block: block(streams)) == pytest.approx(expected, rel=0.03)
        block = timm.models.vision_transformer.Block(dim, dim // 64)
        assert 12 * gmacs(lambda: block(torch.zeros(1, n + 1, dim))) == pytest.approx(vit, rel=0.03)


@pytest.mark.parametrize(("grid", "absorbs"), [(3, True), (5, True), (7, True), (10, False)])
def test_the_cheaper_form_is_picked(grid, absorbs):
    """At width 384 with 6 heads, absorbing pays while H * M stays below about D."""
    with torch.device("meta"):
        streams = torch.zeros(1, 1 + grid * grid, 384), torch.zeros(1, 196, 384)
        costs = {a: gmacs(lambda a=a: LookupBlock(384, 6, absorb=a)(streams)) for a in (True, False, None)}
        assert LookupBlock(384, 6).cross.absorbs(1 + grid * grid, 196) is absorbs
    assert costs[None] == min(costs[True], costs[False])


def test_the_last_block_computes_nothing_for_the_lookup_tokens():
    model = make()
    names = [name for name, _ in model.blocks[-1].named_parameters()]
    assert not [name for name in names if "infuse" in name or "lookup_mlp" in name]


def test_trains_as_any_timm_model_does():
    model = timm.create_model(
        "lookupvit_tiny_patch16_224", num_classes=200, **{k: v for k, v in SMALL.items() if k != "num_classes"}
    )
    optimizer = timm.optim.create_optimizer_v2(model, "adamw", lr=1e-2, weight_decay=0.05)
    undecayed = {id(p) for group in optimizer.param_groups if group["weight_decay"] == 0 for p in group["params"]}
    assert {id(model.pos_lookup), id(model.pos_compressed), id(model.cls_token)} <= undecayed
    images, labels = torch.randn(4, 3, 64, 64), torch.tensor([0, 50, 100, 199])
    losses = []
    for _ in range(12):
        loss = F.cross_entropy(model(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


def test_timm_interface():
    model = make().float()
    images = torch.randn(2, 3, 64, 64)
    assert model(images).shape == (2, 5)
    assert model.forward_head(model.forward_features(images), pre_logits=True).shape == (2, 24)
    model.reset_classifier(7, "avg")
    assert model(images).shape == (2, 7)
    model.reset_classifier(0)
    assert model(images).shape == (2, 24)
    assert model.default_cfg["input_size"] == (3, 224, 224)
    assert {"lookupvit_tiny_patch16_224", "lookupvit_base_patch16_224"} <= set(timm.list_models("lookupvit*"))


@pytest.mark.parametrize(
    ("name", "dim", "depth", "heads", "millions"),
    [
        ("tiny", 192, 12, 3, 8.5),
        ("small", 384, 12, 6, 33.3),
        ("base", 768, 12, 12, 131.9),
        ("large", 1024, 24, 16, 476.7),
    ],
)
def test_variants_have_the_sizes_of_vit(name, dim, depth, heads, millions):
    with torch.device("meta"):
        model = create_encoder(f"lookupvit_{name}_patch16_224")
    assert (model.embed_dim, len(model.blocks), model.blocks[0].refine.attn.num_heads) == (dim, depth, heads)
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(millions, rel=0.02)


def test_state_dict_round_trip():
    model, other = make(seed=0), make(seed=1)
    image = torch.randn(1, 3, 64, 64, dtype=torch.float64)
    assert not torch.equal(model(image), other(image))
    other.load_state_dict(model.state_dict())
    assert torch.equal(model(image), other(image))


def test_gradient_checkpointing_changes_nothing():
    gradients = []
    for enable in (False, True):
        model = make().train()
        model.set_grad_checkpointing(enable)
        model(torch.ones(1, 3, 64, 64, dtype=torch.float64)).sum().backward()
        gradients.append([p.grad for p in model.parameters()])
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("grid", [(2, 2), (4, 4)])
def test_bf16_autocast_stays_close(grid):
    model = timm.create_model("lookupvit_tiny_patch16_224", **SMALL).eval()
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        low = model.forward_tokens(images, grid)
    with torch.no_grad():
        torch.testing.assert_close(low.float(), model.forward_tokens(images, grid), rtol=0.05, atol=0.05)


@pytest.mark.slow
def test_compiles_without_breaks():
    model = make().float()
    images = torch.randn(2, 3, 64, 64)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    encode = torch.compile(model.forward_maps, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(images), model(images), rtol=1e-5, atol=1e-5)
        for found, expected in zip(encode(images, (3, 2))[:3], model.forward_maps(images, (3, 2))[:3], strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("shape", "grid", "message"),
    [
        ((60, 64), None, "60x64 px is not a multiple of the patch"),
        ((64, 64), (5, 5), "5x5 is not within the lookup grid 4x4"),
    ],
)
def test_wrong_shapes_are_named(shape, grid, message):
    with pytest.raises(ValueError, match=message):
        make().float().forward_tokens(torch.zeros(1, 3, *shape), grid)


def test_unknown_pooling_and_heads_are_refused():
    with pytest.raises(ValueError, match="global_pool"):
        make(global_pool="max")
    with pytest.raises(ValueError, match="not divisible"):
        make(cross_heads=5)
