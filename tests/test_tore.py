import pytest
import timm
import torch
import torch.nn.functional as F
from reference_layers import affine, bilinear, embed_patches, layer_norm, mlp, vit_block
from timm.layers import resample_abs_pos_embed

from captioner.encoders import Rectangle, create_encoder

SMALL = {"img_size": 64, "embed_dim": 24, "depth": 3, "num_heads": 3, "num_classes": 5}
KINDS = {"vit": SMALL, "lookupvit": {**SMALL, "grid": (3, 2)}}
both = pytest.mark.parametrize("kind", KINDS)
QUARTERS = [Rectangle(0, 0, 2, 2), Rectangle(0, 2, 2, 2), Rectangle(2, 0, 2, 2), Rectangle(2, 2, 2, 2)]


def make(kind, seed=0, plain=False, **kwargs):
    """Build a model far from its first weights, so that no bias or norm can be forgotten unseen."""
    torch.manual_seed(seed)
    name = f"{'' if plain else 'tore_'}{kind}_tiny_patch16_224"
    model = timm.create_model(name, **{**KINDS[kind], **kwargs}).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return model.eval()


def pixels(*size, batch=2, seed=1):
    return torch.rand(batch, 3, *size, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def crop(images, rectangle):
    top, left, rows, columns = rectangle
    return images[..., 16 * top : 16 * (top + rows), 16 * left : 16 * (left + columns)]


def vit_reference(model, image, rectangles, cut, grid=None):
    """TORE on one image and a ViT, equation by equation."""
    size, vit = (image.shape[-2] // 16, image.shape[-1] // 16), model.vit
    positions = resample_abs_pos_embed(vit.pos_embed, size, (4, 4))[0]
    cells, classes, midway = positions[1:].unflatten(0, size), [], []
    for rectangle in rectangles:
        top, left, rows, columns = rectangle
        x = embed_patches(crop(image, rectangle), vit.patch_embed.proj)
        x = (x + cells[top : top + rows, left : left + columns]).flatten(0, 1)
        x = torch.cat([vit.cls_token[0] + positions[:1], x])
        for block in vit.blocks[:cut]:
            x = vit_block(x, block)
        classes.append(x[:1])
        midway.append(x[1:])
    x = torch.cat([sum(classes) / len(classes), *midway])
    for block in vit.blocks[cut:]:
        x = vit_block(x, block)
    return layer_norm(x, vit.norm)


def lookup_block(compressed, lookup, block):
    """Run one LookupViT block on one image, head by head."""
    cross, parts = block.cross, torch.arange(compressed.shape[1]).chunk(block.cross.num_heads)
    p, lk = layer_norm(compressed, block.norm_compressed), layer_norm(lookup, block.norm_lookup)
    q, k, v = affine(p, cross.q), affine(lk, cross.k), affine(lk, cross.v)
    maps = [F.softmax(q[:, part] @ k[:, part].T / len(part) ** 0.5, -1) for part in parts]
    read = torch.cat([attn @ v[:, part] for attn, part in zip(maps, parts, strict=True)], -1)
    compressed = vit_block(compressed + affine(read, cross.proj), block.refine)
    if not block.last:
        v = affine(layer_norm(compressed, block.norm_refined), cross.infuse_v)
        sent = torch.cat([attn.T @ v[:, part] for attn, part in zip(maps, parts, strict=True)], -1)
        lookup = lookup + affine(sent, cross.infuse_proj)
        lookup = lookup + mlp(layer_norm(lookup, block.norm_lookup_mlp), block.lookup_mlp)
    return compressed, lookup


def lookupvit_reference(model, image, rectangles, cut, grid):
    """TORE on one image and a LookupViT, equation by equation."""
    size = (image.shape[-2] // 16, image.shape[-1] // 16)
    positions = bilinear(model.pos_lookup[0], *size)
    classes, midway, looked = [], [], []
    for rectangle in rectangles:
        top, left, rows, columns = rectangle
        x = embed_patches(crop(image, rectangle), model.patch_embed.proj)
        lookup = (x + positions[top : top + rows, left : left + columns]).flatten(0, 1)
        share = (-(-grid[0] * rows // size[0]), -(-grid[1] * columns // size[1]))
        places = torch.zeros(*share, 24, dtype=image.dtype)
        for r in range(share[0]):
            for c in range(share[1]):
                y, x_ = (top + (r + 0.5) * rows / share[0]) / size[0], (left + (c + 0.5) * columns / share[1]) / size[1]
                at = torch.tensor([[[[2 * x_ - 1, 2 * y - 1]]]], dtype=image.dtype)
                stored = model.pos_compressed.movedim(-1, 1)
                places[r, c] = F.grid_sample(stored, at, padding_mode="border", align_corners=False)[0, :, 0, 0]
        compressed = torch.cat([model.cls_token[0], (bilinear(x, *share) + places).flatten(0, 1)])
        for block in model.blocks[:cut]:
            compressed, lookup = lookup_block(compressed, lookup, block)
        classes.append(compressed[:1])
        midway.append(compressed[1:])
        looked.append(lookup)
    compressed, lookup = torch.cat([sum(classes) / len(classes), *midway]), torch.cat(looked)
    for block in model.blocks[cut:]:
        compressed, lookup = lookup_block(compressed, lookup, block)
    return layer_norm(compressed, model.norm)


@both
@pytest.mark.parametrize("cut", [0, 1, 2, 3])
@pytest.mark.parametrize(
    ("size", "rectangles"),
    [
        ((64, 64), QUARTERS[1:3]),
        ((64, 64), [Rectangle(1, 0, 3, 1)]),
        ((48, 96), [Rectangle(0, 1, 2, 3), Rectangle(2, 5, 1, 1), Rectangle(0, 4, 2, 2)]),
    ],
)
def test_equals_the_equations(kind, size, rectangles, cut):
    model, images, grid = make(kind), pixels(*size), (2, 3)
    reference = {"vit": vit_reference, "lookupvit": lookupvit_reference}[kind]
    with torch.no_grad():
        tokens = model.forward_glimpses(images, rectangles, blocks=cut, grid=grid)
        expected = torch.stack([reference(model, image, rectangles, cut, grid) for image in images])
    torch.testing.assert_close(tokens, expected, rtol=0, atol=1e-10)


@both
@pytest.mark.parametrize("size", [(64, 64), (48, 80)])
def test_one_glimpse_that_covers_the_image_is_the_plain_encoder(kind, size):
    extra = {"num_classes": 0, **({"dynamic_img_size": True} if kind == "vit" else {})}
    plain, images = make(kind, plain=True, **extra), pixels(*size)
    model = make(kind, seed=2, num_classes=0)
    model.init_from(plain)
    cells = (size[0] // 16, size[1] // 16)
    with torch.no_grad():
        expected = plain.forward_features(images, *([None] if kind == "lookupvit" else []))
        assert torch.equal(model.forward_tokens(images), expected)
        for cut in range(4):
            midway = model.iterate(images, (0, 0), blocks=cut, image_size=size)
            assert midway.tokens.shape[1] == (6 if kind == "lookupvit" else cells[0] * cells[1])
            close = model.aggregate([midway])
            torch.testing.assert_close(close, expected, rtol=0, atol=1e-12)
            assert torch.equal(close, expected) or kind == "lookupvit"


@both
def test_a_new_glimpse_computes_nothing_again(kind):
    model, images, calls = make(kind), pixels(64, 64), []
    for number, block in enumerate(model.network_blocks):
        forward = "update" if kind == "lookupvit" else "forward"
        computed = getattr(block, forward)

        def counted(*args, number=number, function=computed):
            calls.append((number, args[-1].shape[1]))  # lookup tokens, or patches with the class token
            return function(*args)

        setattr(block, forward, counted)
    with torch.no_grad():
        extra = 0 if kind == "lookupvit" else 1
        midway = [model.iterate(crop(images, part), (part.top, part.left), blocks=2) for part in QUARTERS[:3]]
        assert calls == [(number, 4 + extra) for _ in range(3) for number in (0, 1)]
        model.aggregate(midway)
        calls.clear()
        midway.append(model.iterate(crop(images, QUARTERS[3]), (2, 2), blocks=2))
        model.aggregate(midway)
    assert calls == [(0, 4 + extra), (1, 4 + extra), (2, 16 + extra)]


@both
def test_batch_and_order_of_glimpses_do_not_matter(kind):
    model, images = make(kind), pixels(64, 64, batch=3)
    with torch.no_grad():
        midway = [model.iterate(crop(images, part), (part.top, part.left)) for part in QUARTERS[:3]]
        tokens = model.aggregate(midway)
        turned = model.aggregate([midway[2], midway[0], midway[1]])
        torch.testing.assert_close(turned[:, :1], tokens[:, :1])
        prefix, *parts = tokens.split([1, *(glimpse.tokens.shape[1] for glimpse in midway)], 1)
        torch.testing.assert_close(turned, torch.cat([prefix, parts[2], parts[0], parts[1]], 1))
        for number, image in enumerate(images):
            alone = [model.iterate(crop(image[None], part), (part.top, part.left)) for part in QUARTERS[:3]]
            torch.testing.assert_close(model.aggregate(alone)[0], tokens[number])


@both
def test_each_image_may_have_its_glimpse_elsewhere(kind):
    model, images = make(kind), pixels(64, 64, batch=2)
    first, second = (0, 2), (2, 1)
    parts = torch.cat([crop(image[None], (*place, 2, 2)) for image, place in zip(images, (first, second), strict=True)])
    with torch.no_grad():
        for positions in (torch.tensor([first, second]), [first, second], torch.tensor([first, second]).numpy()):
            tokens = model.aggregate(
                [
                    model.iterate(parts, positions),
                    model.iterate(crop(images, (0, 0, 2, 1)), (0, 0)),
                ]
            )
            for number, place in enumerate((first, second)):
                image = images[number : number + 1]
                alone = [
                    model.iterate(crop(image, (*place, 2, 2)), place),
                    model.iterate(crop(image, (0, 0, 2, 1)), torch.tensor([[0, 0]])),
                ]
                torch.testing.assert_close(model.aggregate(alone)[0], tokens[number])


@both
def test_glimpses_that_cannot_be_are_named(kind):
    model, images = make(kind), pixels(64, 64)
    part = crop(images, QUARTERS[0])
    for positions in ((3, 0), (0, 3), (-1, 0), torch.tensor([[0, 0], [1, 3]])):
        with pytest.raises(
            ValueError, match=r"a glimpse of 2x2 cells at row \S+, column \S+ is not within the 4x4 cells"
        ):
            model.iterate(part, positions)
    with pytest.raises(ValueError, match="is not within the 4x2 cells of the image"):
        model.iterate(part, (0, 1), image_size=(64, 32))
    for positions in (3, "ab", (), (1,), (0, 0.5), [(0, 0), 1], torch.tensor([0.0, 1.0]), torch.zeros(2, 3).int()):
        with pytest.raises(ValueError, match="not a row and a column, or one pair for each image"):
            model.iterate(part, positions)
    with pytest.raises(ValueError, match="there are 3 positions for a glimpse in each of 2 images"):
        model.iterate(part, [(0, 0)] * 3)
    with pytest.raises(ValueError, match="20x32 px is not a multiple of the patch"):
        model.iterate(images[..., :20, :32], (0, 0))
    for blocks in (-1, 4):
        with pytest.raises(ValueError, match=f"the iterator cannot have {blocks} blocks: the network has 3"):
            model.iterate(part, (0, 0), blocks=blocks)
    with pytest.raises(ValueError, match="the iterator cannot have 9 blocks") as refused:
        create_encoder(f"tore_{kind}_tiny_patch16_224", depth=2, iterator_blocks=9)
    assert refused.value.settings == ("encoder_options",)


@both
def test_glimpses_that_do_not_belong_together_are_named(kind):
    model, images = make(kind), pixels(64, 64)
    one = model.iterate(crop(images, QUARTERS[0]), (0, 0), blocks=1)
    with pytest.raises(ValueError, match="there are no glimpses to aggregate"):
        model.aggregate([])
    with pytest.raises(ValueError, match="there are no glimpses to aggregate"):
        model.forward_glimpses(images, [])
    with pytest.raises(ValueError, match="glimpses 0 and 1 overlap; a cell is seen once"):
        model.aggregate([one, model.iterate(crop(images, QUARTERS[0]), (1, 1), blocks=1)])
    beside = model.iterate(crop(images, QUARTERS[0]), (2, 2), blocks=1)
    crossing = model.iterate(crop(images, QUARTERS[0]), [(0, 2), (0, 1)], blocks=1)
    with pytest.raises(ValueError, match="glimpses 0 and 2 overlap in image 1; a cell is seen once"):
        model.aggregate([one, beside, crossing])
    touching = model.iterate(crop(images, QUARTERS[0]), [(0, 2), (2, 0)], blocks=1)
    assert model.aggregate([one, touching]).isfinite().all()
    for other, message in (
        (model.iterate(crop(images, QUARTERS[1]), (0, 2), blocks=2), "their iterators' blocks are 1 and 2"),
        (model.iterate(crop(images, QUARTERS[1])[:1], (0, 2), blocks=1), "their batches are 2 and 1"),
        (
            model.iterate(crop(images, QUARTERS[1]), (0, 2), blocks=1, image_size=(64, 96)),
            "their cells of the image are 4x4 and 4x6",
        ),
    ):
        with pytest.raises(ValueError, match=f"glimpses do not belong together: {message}"):
            model.aggregate([one, other])
    if kind == "lookupvit":
        with pytest.raises(ValueError, match="their compressed grids are 3x2 and 2x2"):
            model.aggregate([one, model.iterate(crop(images, QUARTERS[1]), (0, 2), blocks=1, grid=(2, 2))])
        with pytest.raises(ValueError, match="compressed grid 5x5 is not within the lookup grid 4x4"):
            model.iterate(crop(images, QUARTERS[1]), (0, 2), grid=(5, 5))


@both
def test_a_training_step_draws_every_cut_and_glimpses_that_do_not_overlap(kind):
    model, generator = make(kind), torch.Generator().manual_seed(0)
    cuts, counts, seen, shapes = [], [], torch.zeros(4, 6), set()
    for _ in range(300):
        cut, rectangles = model.draw_glimpses((64, 96), most=5, generator=generator)
        cuts.append(cut)
        counts.append(len(rectangles))
        cells = torch.zeros(4, 6)
        for top, left, rows, columns in rectangles:
            assert min(rows, columns) > 0
            assert max(top + rows - 4, left + columns - 6) <= 0
            cells[top : top + rows, left : left + columns] += 1
            shapes.add((rows, columns))
        assert cells.max() == 1
        seen += cells
    frequent = [cuts.count(cut) for cut in range(4)]
    assert sum(frequent) == 300
    assert min(frequent) > 50
    assert set(counts) == {1, 2, 3, 4, 5}
    assert seen.min() > 80
    assert len(shapes) > 20
    again = model.draw_glimpses((64, 96), generator=torch.Generator().manual_seed(3))
    assert again == model.draw_glimpses((64, 96), generator=torch.Generator().manual_seed(3))
    assert len(model.draw_glimpses((16, 16), most=4)[1]) == 1  # a cell cannot be cut
    with pytest.raises(ValueError, match="a step needs at least one glimpse, not 0"):
        model.draw_glimpses((64, 64), most=0)


@both
def test_trains_on_drawn_glimpses(kind):
    torch.manual_seed(0)
    model = timm.create_model(f"tore_{kind}_tiny_patch16_224", **KINDS[kind]).train()
    optimizer = timm.optim.create_optimizer_v2(model, "adamw", lr=3e-3, layer_decay=0.95)
    images, labels, found = torch.randn(4, 3, 64, 64), torch.arange(4), []
    for _ in range(30):
        cut, rectangles = model.draw_glimpses((64, 64))
        loss = F.cross_entropy(model.forward_head(model.forward_glimpses(images, rectangles, cut)), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        found.append(loss.item())
    assert sum(found[-5:]) < 0.6 * sum(found[:5])


@both
def test_gradients_reach_every_glimpse_and_parameter(kind):
    model, images = make(kind, num_classes=0).train(), pixels(64, 64).requires_grad_()
    model.forward_glimpses(images, QUARTERS[:2], blocks=1)[:, 0].square().sum().backward()
    missed = {key for key, parameter in model.named_parameters() if parameter.grad is None}
    assert not missed
    assert all(crop(images.grad, part).abs().amin((1, 2, 3)).max() > 0 for part in QUARTERS[:2])
    assert crop(images.grad, Rectangle(2, 0, 2, 4)).abs().max() == 0


def test_lookupvit_starts_from_a_lookupvit_or_a_vit():
    model = make("lookupvit")
    vit = timm.create_model("vit_tiny_patch16_224", img_size=64, embed_dim=24, depth=3, num_heads=3, num_classes=0)
    model.init_from(vit)
    assert torch.equal(model.blocks[1].refine.attn.qkv.weight.float(), vit.blocks[1].attn.qkv.weight)
    with pytest.raises(
        ValueError, match="the LookupViT does not fit the encoder: 'blocks.1.cross.infuse_proj.bias' differs"
    ) as refused:
        model.init_from(make("lookupvit", plain=True, depth=2))
    assert refused.value.settings == ("init_from",)


@both
def test_registers_and_half_precision(kind):
    model = make(kind, **({"reg_tokens": 2, "no_embed_class": True} if kind == "vit" else {})).bfloat16()
    tokens = model.forward_glimpses(pixels(64, 64).bfloat16(), QUARTERS[:2])
    assert tokens.dtype == torch.bfloat16
    assert tokens.shape == (2, model.num_prefix_tokens + (8 if kind == "vit" else 4), 24)
    with torch.autocast("cpu", torch.bfloat16):
        low = make(kind).float().forward_glimpses(pixels(64, 64).float(), QUARTERS[:2])
    torch.testing.assert_close(
        low.double(), make(kind).forward_glimpses(pixels(64, 64), QUARTERS[:2]), rtol=0, atol=0.5
    )


@both
@pytest.mark.slow
def test_compiles_without_breaks(kind):
    model, images = make(kind, depth=2).float(), pixels(64, 64).float()

    def two(images):
        midway = [model.iterate(crop(images, part), (part.top, part.left), blocks=1) for part in QUARTERS[:2]]
        return model.aggregate(midway)

    with torch.no_grad():
        found = torch.compile(two, fullgraph=True, backend="aot_eager")(images)
        torch.testing.assert_close(found, two(images), rtol=1e-4, atol=1e-5)
