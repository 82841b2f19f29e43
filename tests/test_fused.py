"""Encoders as they compute for a captioner on a CPU: batch norms folded, activations fused, in bfloat16 where fast."""

import copy

import pytest
import timm
import torch
from timm.layers import BatchNormAct2d, Conv2dSame
from torch import nn

from captioner import create_encoder
from captioner.encoders import fused
from captioner.encoders.fused import FusedConv, fuse_convolutions


def randomise(network: nn.Module) -> nn.Module:
    """Give a network weights and running statistics as if it had learned."""
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_mean, -0.5, 0.5)
            nn.init.uniform_(module.running_var, 0.5, 2.0)
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.uniform_(module.bias, -0.5, 0.5)
    return network.eval()


@pytest.fixture
def encoder():
    torch.manual_seed(0)
    options = {"stem": "mobilenetv2_100", "stem_options": {"pad_type": "same"}}
    encoder = create_encoder("lookupvit_tiny_patch16_224", depth=2, embed_dim=32, num_heads=2, img_size=64, **options)
    return randomise(encoder).freeze()


@pytest.mark.parametrize("size", [(64, 64), (48, 80), (160, 160)])
def test_the_tokens_are_the_same_up_to_rounding(encoder, size):
    fast = encoder.optimize_for_inference()
    assert any(isinstance(part, FusedConv) for part in fast.modules())
    assert not any(isinstance(part, nn.BatchNorm2d) for part in fast.patch_embed.modules())
    for count in (1, 5, 9):
        pixels = torch.randn(count, 3, *size)
        torch.testing.assert_close(fast.encode(pixels, "2x2"), encoder.encode(pixels, "2x2"), atol=1e-4, rtol=1e-4)


def test_the_encoder_itself_stays_as_it_was(encoder):
    before = {name: value.clone() for name, value in encoder.state_dict().items()}
    for dtype in (torch.float32, torch.bfloat16):
        encoder.optimize_for_inference(dtype)
        after = encoder.state_dict()
        assert before.keys() == after.keys()
        assert all(
            torch.equal(value, after[name]) and value.dtype == after[name].dtype for name, value in before.items()
        )
    assert encoder.patch_embed.images_at_a_time is None


@pytest.mark.parametrize("name", ["lookupvit_tiny_patch16_224", "vit_tiny_patch16_224", "resnet18"])
def test_any_encoder_has_the_form(name):
    encoder = randomise(create_encoder(name, img_size=64) if "vit" in name else create_encoder(name)).freeze()
    assert encoder.optimize_for_inference() is encoder
    half = encoder.optimize_for_inference(torch.bfloat16)
    assert {parameter.dtype for parameter in encoder.parameters()} == {torch.float32}
    tokens = half.encode(torch.randn(1, 3, 64, 64), "2x2")
    assert tokens.dtype == torch.bfloat16
    assert not any(parameter.requires_grad for parameter in half.parameters())


def test_bfloat16_is_close(encoder):
    pixels = torch.randn(4, 3, 64, 64)
    expected = encoder.encode(pixels, "2x2")
    got = encoder.optimize_for_inference(torch.bfloat16).encode(pixels, "2x2").float()
    assert (got - expected).abs().mean() < 0.05 * expected.abs().mean()


@pytest.mark.parametrize("padding", [0, 1, (1, 2), "same"])
@pytest.mark.parametrize("act", [nn.ReLU, nn.ReLU6, nn.SiLU, None])
def test_one_convolution(act, padding):
    torch.manual_seed(0)
    for kernel, stride, groups, bias in (
        (3, 1, 1, True),
        (3, 2, 8, False),
        (5, 2, 1, False),
        (4, 2, 2, True),
        (1, 1, 1, True),
    ):
        options = {"stride": stride, "groups": groups, "bias": bias}
        if padding == "same":
            conv = Conv2dSame(8, 16, kernel, **options)
        else:
            conv = nn.Conv2d(8, 16, kernel, padding=padding, **options)
        norm = BatchNormAct2d(16, act_layer=act, apply_act=act is not None, inplace=False)
        network = randomise(nn.Sequential(conv, norm))
        for size in ((8, 8), (9, 7), (8, 11)):
            x = torch.randn(3, 8, *size)
            fast = fuse_convolutions(network, x)
            assert isinstance(fast[0], FusedConv)
            torch.testing.assert_close(fast(x), network(x), atol=1e-5, rtol=1e-5)
            torch.testing.assert_close(fast(x[:1]), network(x[:1]), atol=1e-5, rtol=1e-5)


def test_what_cannot_be_folded_stays():
    conv, norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)

    class Twice(nn.Module):
        """A convolution that is used twice, with a norm behind one use only."""

        def __init__(self):
            super().__init__()
            self.conv, self.norm = conv, norm

        def forward(self, x):
            return self.norm(self.conv(x)) + self.conv(x)

    x = torch.randn(1, 3, 8, 8)
    for network in (
        Twice(),
        nn.Sequential(conv, nn.ReLU(), norm),
        nn.Sequential(conv, nn.BatchNorm2d(4, track_running_stats=False)),
        nn.Sequential(nn.Conv2d(3, 4, 3, padding=1, padding_mode="reflect"), norm),
        nn.Sequential(nn.Conv2d(3, 4, 3, padding="same"), norm),
        nn.Sequential(nn.Conv2d(3, 4, 3, padding="valid"), norm),
        nn.Sequential(nn.Linear(8, 8)),
    ):
        assert fuse_convolutions(network.eval(), x) is network


def test_networks_of_timm():
    for name in ("resnet18", "regnetx_002", "efficientnet_b0"):
        network, x = randomise(timm.create_model(name, num_classes=3)), torch.randn(2, 3, 64, 64)
        fast = fuse_convolutions(network, x)
        assert fast is not network
        torch.testing.assert_close(fast(x), network(x), atol=1e-3, rtol=1e-3)


def test_a_torch_without_these_operators_keeps_the_network(encoder, monkeypatch):
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    assert encoder.optimize_for_inference() is encoder
    assert fused.fast_dtype() == torch.float32


def test_a_captioner_uses_it_and_saves_the_model_as_it_was(saved_model, images, tmp_path):
    import captioner
    from captioner.inference import Captioner

    loaded = captioner.load(saved_model, "cpu")
    assert {parameter.dtype for parameter in loaded.model.encoder.parameters()} == {torch.float32}
    exact = Captioner(copy.deepcopy(loaded.model), loaded.processor, "cpu", encoder_dtype=torch.float32)
    assert next(exact.encoder.parameters()).dtype == torch.float32
    assert next(loaded.encoder.parameters()).dtype == fused.fast_dtype()
    assert len(loaded(sorted(images.iterdir()))) == 3
