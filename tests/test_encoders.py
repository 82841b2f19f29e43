import pytest
import timm
import torch

from captioner.encoders import PooledEncoder, TokenEncoder, create_encoder, frozen_encoder, rebuild_encoder

STOCK = ["vit_tiny_patch16_224", "resnet18", "swin_tiny_patch4_window7_224", "convnext_atto"]
OURS = timm.list_models("lookupvit*")


@pytest.mark.parametrize("name", OURS)
def test_every_registered_encoder_keeps_the_contract(name):
    encoder = create_encoder(name, img_size=64, depth=2, grid=(2, 2))
    assert isinstance(encoder, TokenEncoder)
    with torch.no_grad():
        for grid in (None, (1, 1), (3, 2)):
            tokens = encoder.forward_tokens(torch.zeros(1, 3, 64, 64), grid)
            assert tokens.shape == (1, encoder.num_tokens(grid), encoder.embed_dim)


@pytest.mark.parametrize("name", STOCK)
def test_any_stock_model_is_an_encoder(name):
    encoder = create_encoder(name)
    assert isinstance(encoder, PooledEncoder)
    with torch.no_grad():
        for grid in (None, (3, 3)):
            tokens = encoder.forward_tokens(torch.zeros(2, 3, 224, 224), grid)
            assert tokens.shape == (2, encoder.num_tokens(grid), encoder.embed_dim)


def test_pooling_averages_patches_and_keeps_prefix_tokens():
    encoder = create_encoder("vit_tiny_patch16_224", img_size=64).eval()
    images = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        every, pooled = encoder.forward_tokens(images), encoder.forward_tokens(images, (2, 2))
    patches = every[0, 1:].view(4, 4, -1)
    torch.testing.assert_close(pooled[0, 0], every[0, 0])
    torch.testing.assert_close(pooled[0, 2], patches[:2, 2:].mean((0, 1)), rtol=1e-5, atol=1e-5)


def test_channels_last_and_channels_first_maps_are_laid_out_alike():
    for name in ("resnet18", "swin_tiny_patch4_window7_224"):
        encoder = create_encoder(name).eval()
        images = torch.randn(1, 3, 224, 224)
        with torch.no_grad():
            features, tokens = encoder.forward_features(images), encoder.forward_tokens(images)
        at = features[0, 2, 4] if name.startswith("swin") else features[0, :, 2, 4]
        torch.testing.assert_close(tokens[0, 2 * 7 + 4], at)


def test_counting_tokens_leaves_running_statistics_alone():
    encoder = create_encoder("resnet18")
    before = {key: value.clone() for key, value in encoder.state_dict().items()}
    assert encoder.num_tokens() == 49
    assert encoder.training
    assert all(value.equal(before[key]) for key, value in encoder.state_dict().items())


def test_a_stock_vit_takes_any_size_divisible_by_the_patch():
    encoder = create_encoder("vit_tiny_patch16_224", depth=1).eval()
    with torch.no_grad():
        assert encoder.forward_tokens(torch.zeros(1, 3, 112, 160), (5, 5)).shape == (1, 26, 192)


def test_a_configuration_reaches_nothing_elsewhere(tmp_path):
    for name, kwargs in (
        (f"local-dir:{tmp_path}", {}),
        ("hf-hub:owner/name", {}),
        ("resnet18", {"checkpoint_path": "weights.pth"}),
        ("resnet18", {"pretrained": True}),
        ("resnet18", {"pretrained_cfg_overlay": {"file": "weights.pth"}}),
    ):
        with pytest.raises(ValueError, match="may not ask for"):
            rebuild_encoder({"name": name, "kwargs": kwargs})


def test_weights_that_are_no_safetensors_are_refused(tmp_path):
    (tmp_path / "config.json").write_text('{"architecture": "resnet18"}')
    torch.save(create_encoder("resnet18").model.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"no model\.safetensors"):
        create_encoder(f"local-dir:{tmp_path}")


@pytest.mark.parametrize("name", ["lookupvit_tiny_patch16_224", "resnet18"])
def test_a_frozen_encoder_stays_as_it_is(name):
    encoder = create_encoder(name).freeze()
    before = {key: value.clone() for key, value in encoder.state_dict().items()}
    encoder.train()
    assert not any(module.training for module in encoder.modules())
    for _ in range(2):
        tokens = encoder.encode(torch.randn(2, 3, 224, 224))
    assert not tokens.requires_grad
    assert not any(p.requires_grad for p in encoder.parameters())
    for key, value in encoder.state_dict().items():
        assert torch.equal(value, before[key]), key


def test_a_frozen_encoder_has_its_own_dtype():
    encoder = create_encoder("lookupvit_tiny_patch16_224", depth=1).freeze().to(torch.bfloat16)
    assert encoder.encode(torch.zeros(1, 3, 224, 224)).dtype == torch.bfloat16


def test_unknown_names_suggest_known_ones():
    with pytest.raises(ValueError, match=r"no encoder named 'lookupvit_giant'.*lookupvit_base_patch16_224"):
        create_encoder("lookupvit_giant")


def test_a_grid_larger_than_the_map_is_refused():
    with pytest.raises(ValueError, match="grid 8x8 is larger than the encoder's feature map, 7x7"):
        create_encoder("resnet18").forward_tokens(torch.zeros(1, 3, 224, 224), (8, 8))


def test_a_frozen_encoder_without_trained_weights_is_told(caplog):
    assert frozen_encoder("resnet18").frozen
    assert "the encoder 'resnet18' has random weights" in caplog.text


def test_a_name_with_a_tag_means_its_pretrained_weights():
    with pytest.raises(ValueError, match="no weights of the encoder 'vit_tiny_patch16_224.augreg_in21k'"):
        create_encoder("vit_tiny_patch16_224.augreg_in21k")  # tests run without the hub
    with pytest.raises(ValueError, match=r"no weights of the encoder 'vit_tiny_patch16_224.nobody'"):
        create_encoder("vit_tiny_patch16_224.nobody")
