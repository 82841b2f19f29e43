"""STViT that starts from the weights of the network it changes."""

import pytest
import timm
import torch
import torch.nn.functional as F

from captioner.encoders import create_encoder

VIT = {"img_size": 64, "embed_dim": 24, "num_heads": 3, "depth": 6, "num_classes": 0}
SWIN = {"img_size": 64, "embed_dim": 12, "depths": (2, 2, 4, 2), "num_heads": (1, 2, 2, 4), "window_size": 2}
PAIRS = {
    "stvit_small_patch16_224": ("vit_small_patch16_224", VIT, {"image_layers": 2}),
    "stvitr_small_patch16_224": ("deit_small_patch16_224", VIT, {"image_layers": 3, "unit_layers": 3}),
    "stvit_swin_tiny_patch4_window7_224": ("swin_tiny_patch4_window7_224", SWIN, {"image_layers": 2}),
    "stvitr_swin_tiny_patch4_window7_224": ("swin_tiny_patch4_window7_224", SWIN, {"unit_layers": 4}),
}
every_pair = pytest.mark.parametrize("name", PAIRS)


def pair(name):
    """Return an encoder that starts from a network of random weights, and the network."""
    other, common, options = PAIRS[name]
    torch.manual_seed(0)
    network = timm.create_model(other, **common).double().eval()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    encoder = create_encoder(name, **common, **options, grid=(2, 2)).double().eval()
    encoder.init_from(network)
    return encoder, network


@every_pair
def test_layers_on_image_tokens_compute_what_the_network_does(name):
    """Also where the network's input has another mean and deviation than the encoder's."""
    encoder, network = pair(name)
    pixels = torch.rand(2, 3, 64, 64, dtype=torch.float64)
    theirs, ours = (
        (pixels - torch.tensor(cfg["mean"]).view(3, 1, 1)) / torch.tensor(cfg["std"]).view(3, 1, 1)
        for cfg in (network.pretrained_cfg, encoder.default_cfg)
    )
    assert torch.equal(theirs, ours) == (name != "stvit_small_patch16_224")
    with torch.no_grad():
        _, expected = network.forward_intermediates(theirs)
        x, size = encoder.embed(ours, encoder.largest_grid((64, 64)), attention=False)
        for stage, features in zip(encoder.stages[:2], expected[:2], strict=True):
            x, size = stage(x, size, (2, 2))
            image = x.tokens[:, encoder.num_prefix_tokens :].mT.unflatten(2, size)
            torch.testing.assert_close(image, features, rtol=0, atol=1e-6)  # means and deviations are single precision


def test_generation_starts_as_the_network_attention_of_the_centres():
    encoder, network = pair("stvit_small_patch16_224")
    own, source = encoder.stages[2].generation[0], network.blocks[2]
    centres, image = torch.randn(1, 5, 24).double(), torch.randn(1, 16, 24).double()
    both = torch.cat([centres, image], 1)
    with torch.no_grad():
        q, k, v = source.attn.qkv(source.norm1(both)).unflatten(-1, (3, 3, 8)).permute(2, 0, 3, 1, 4)
        read = F.scaled_dot_product_attention(q[:, :, :5], k, v).transpose(1, 2).flatten(2)
        x = centres + source.attn.proj(read)
        torch.testing.assert_close(own(centres, both)[0], x + source.mlp(source.norm2(x)))


@every_pair
def test_every_layer_takes_the_weights_at_its_depth(name):
    encoder, network = pair(name)
    blocks = network.blocks if hasattr(network, "blocks") else [b for stage in network.layers for b in stage.blocks]
    mlps = [m for key, m in encoder.named_modules() if key.endswith("mlp.fc1")]
    assert len(mlps) == len(blocks)
    assert all(torch.equal(m.weight, b.mlp.fc1.weight) for m, b in zip(mlps, blocks, strict=True))
    scales = [p for key, p in encoder.named_parameters() if key.endswith("gamma")]
    assert all((p == 1).all() for p in scales)
    assert torch.equal(encoder.norm.weight, network.norm.weight)


@pytest.mark.parametrize(
    ("name", "other", "options", "message"),
    [
        ("stvit_small_patch16_224", "vit_tiny_patch16_224", {"embed_dim": 48}, "its 'weight' is"),
        ("stvit_small_patch16_224", "vit_tiny_patch16_224", {"num_heads": 2}, "it has 2 heads where the encoder has 3"),
        (
            "stvit_small_patch16_224",
            "vit_tiny_patch16_224",
            {"depth": 5},
            "5 layers, fewer than the encoder's 6",
        ),
        ("stvit_small_patch16_224", "vit_tiny_patch16_224", {"init_values": 0.1}, "it has LayerScale where"),
        ("stvit_small_patch16_224", "vit_tiny_patch16_224", {"patch_size": 8}, "its 'weight' is"),
        ("stvit_small_patch16_224", "resnet10t", None, "ResNet does not fit the encoder: it is not a ViT"),
        ("stvit_swin_tiny_patch4_window7_224", "resnet10t", None, "it is not a Swin of four stages"),
        ("stvit_swin_tiny_patch4_window7_224", "swin_tiny_patch4_window7_224", {"depths": (2, 2, 6, 2)}, "its stage 3"),
        ("stvit_swin_tiny_patch4_window7_224", "swin_tiny_patch4_window7_224", {"window_size": 4}, "bias_table' is"),
    ],
)
def test_what_does_not_fit_is_refused(name, other, options, message):
    _, common, own = PAIRS[name]
    network = timm.create_model(other, **({} if options is None else {**common, **options}))
    encoder = create_encoder(name, **common, **own, grid=(2, 2))
    with pytest.raises(ValueError, match=message) as error:
        encoder.init_from(network)
    assert "init_from" in error.value.settings
    assert "\n" not in str(error.value)


def test_a_name_without_weights_is_one_line():
    with pytest.raises(ValueError, match="no ViT named 'nosuch' in timm"):
        create_encoder("stvit_small_patch16_224", **VIT, image_layers=2).init_from("nosuch")
