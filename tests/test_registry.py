import json

import pytest
import torch

from captioner.encoders import create_encoder, describe_encoder, frozen_encoder, rebuild_encoder


@pytest.mark.parametrize(
    ("name", "kwargs"),
    [
        ("local-dir:FOLDER", {}),
        ("hf-hub:owner/name", {}),
        ("resnet18", {"checkpoint_path": "weights.pth"}),
        ("resnet18", {"pretrained": True}),
        ("resnet18", {"pretrained_cfg": {"file": "weights.pth"}}),
        ("resnet18", {"pretrained_cfg_overlay": {"file": "weights.pth"}}),
        ("resnet18", {"cache_dir": "/tmp"}),
    ],
)
def test_a_configuration_reaches_nothing_elsewhere(name, kwargs):
    with pytest.raises(ValueError, match="may not hold"):
        rebuild_encoder({"name": name, "kwargs": kwargs})


@pytest.mark.parametrize("description", [{}, {"name": 5}, {"name": "resnet18", "kwargs": [1]}, "resnet18", [1]])
def test_what_is_no_description_is_refused(description):
    with pytest.raises(ValueError, match="the encoder_config of a captioner is not valid"):
        rebuild_encoder(description)


@pytest.mark.parametrize(
    ("name", "kwargs"),
    [
        ("resnet18", {"nonsense": 1}),
        ("resnet18", {"features_only": True}),
        ("vit_tiny_patch16_224", {"depth": "many"}),
        ("vit_tiny_patch16_224", {"num_heads": 7}),
        ("vit_tiny_patch16_224", {"num_heads": 0}),
        ("lookupvit_tiny_patch16_224", {"embed_dim": -3}),
        ("lookupvit_tiny_patch16_224", {"patch_size": 0}),
    ],
)
def test_options_that_cannot_be_are_named_in_one_line(name, kwargs):
    [(key, value)] = kwargs.items()
    with pytest.raises(ValueError, match=f"the encoder '{name}' does not take its options, {key}={value}: ") as error:
        rebuild_encoder({"name": name, "kwargs": kwargs})
    assert "\n" not in str(error.value)


def test_a_fault_in_an_encoders_own_code_is_not_hidden(monkeypatch):
    def broken(*args, **kwargs):
        raise AttributeError("a misspelt name")

    monkeypatch.setattr("timm.create_model", broken)
    with pytest.raises(AttributeError, match="misspelt"):
        create_encoder("resnet18")


def test_weights_that_are_no_safetensors_are_refused(tmp_path):
    (tmp_path / "config.json").write_text('{"architecture": "resnet18"}')
    torch.save(create_encoder("resnet18").model.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"no model\.safetensors"):
        create_encoder(f"local-dir:{tmp_path}")


@pytest.mark.parametrize("config", ["[]", "{}", '{"architecture": 5}', "not JSON"])
def test_a_folder_that_describes_no_encoder_is_refused(tmp_path, config):
    (tmp_path / "config.json").write_text(config)
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(ValueError, match="describes no timm model|no encoder at"):
        create_encoder(f"local-dir:{tmp_path}")


def test_an_exported_encoder_is_described_by_its_options_alone(tmp_path):
    model = {"num_classes": 3, "depth": 2, "global_pool": "avg", "pretrained": True}
    (tmp_path / "config.json").write_text(json.dumps({"architecture": "vit_tiny_patch16_224", "model_args": model}))
    (tmp_path / "model.safetensors").touch()
    described = describe_encoder(f"local-dir:{tmp_path}", embed_dim=96)
    assert described == {"name": "vit_tiny_patch16_224", "kwargs": {"depth": 2, "embed_dim": 96}}
    assert describe_encoder("resnet18.a1_in1k") == {"name": "resnet18", "kwargs": {}}


def test_unknown_names_suggest_known_ones():
    with pytest.raises(ValueError, match=r"no encoder named 'lookupvit_giant'.*lookupvit_base_patch16_224"):
        create_encoder("lookupvit_giant")


def test_a_model_of_several_maps_is_refused():
    with pytest.raises(ValueError, match="a CrossVit has several feature maps"):
        create_encoder("crossvit_9_240").forward_tokens(torch.zeros(1, 3, 240, 240))


def test_tokens_that_lie_on_no_grid_are_still_tokens():
    encoder = create_encoder("coat_lite_tiny").eval()
    with torch.no_grad():
        assert encoder.forward_tokens(torch.zeros(1, 3, 224, 224)).shape == (1, encoder.num_tokens(), 320)
    with pytest.raises(ValueError, match="the 50 tokens of CoaT do not lie on a grid"):
        encoder.forward_maps(torch.zeros(1, 3, 224, 224))


def test_the_size_of_an_encoder_is_the_one_it_was_built_for():
    encoder = create_encoder("swin_tiny_patch4_window7_224", img_size=(64, 96), window_size=4, depths=(1, 1))
    assert encoder.default_cfg["input_size"] == (3, 64, 96)
    assert encoder.num_tokens() == 8 * 12


@pytest.mark.parametrize("size", [(97, 70), (33, 129), (64, 64)])
@pytest.mark.parametrize("name", ["resnet10t", "tf_efficientnet_lite0", "lcnet_035"])
def test_the_map_of_a_cnn_is_known_at_odd_sizes(name, size):
    encoder = create_encoder(name).eval()
    with torch.no_grad():
        maps = encoder.forward_maps(torch.rand(1, 3, *size))
    assert encoder.largest_grid(size) == tuple(maps.tokens.shape[1:3])
    assert encoder.stride == 32


def test_pooling_averages_patches_and_keeps_prefix_tokens():
    encoder = create_encoder("vit_tiny_patch16_224", img_size=64, depth=2).eval()
    pixels = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        every, pooled = encoder.forward_tokens(pixels), encoder.forward_tokens(pixels, (2, 2))
    patches = every[0, 1:].view(4, 4, -1)
    torch.testing.assert_close(pooled[0, 0], every[0, 0])
    torch.testing.assert_close(pooled[0, 2], patches[:2, 2:].mean((0, 1)), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["resnet10t", "swin_tiny_patch4_window7_224"])
def test_channels_last_and_channels_first_maps_are_laid_out_alike(name):
    encoder = create_encoder(name).eval()
    pixels = torch.randn(1, 3, 224, 224)
    with torch.no_grad():
        features, maps = encoder.forward_features(pixels), encoder.forward_maps(pixels)
        tokens = encoder.forward_tokens(pixels)
    at = features[0, 2, 4] if name.startswith("swin") else features[0, :, 2, 4]
    torch.testing.assert_close(maps.tokens[0, 2, 4], at)
    torch.testing.assert_close(tokens[0, 2 * maps.tokens.shape[2] + 4], at)


def test_a_frozen_encoder_without_trained_weights_is_told(caplog):
    assert frozen_encoder("resnet18").frozen
    assert "the encoder 'resnet18' has random weights" in caplog.text


def test_a_name_with_a_tag_means_its_pretrained_weights():
    with pytest.raises(ValueError, match="no weights of the encoder 'vit_tiny_patch16_224.augreg_in21k'"):
        create_encoder("vit_tiny_patch16_224.augreg_in21k")  # tests run without the hub
    with pytest.raises(ValueError, match=r"no weights of the encoder 'vit_tiny_patch16_224.nobody'"):
        create_encoder("vit_tiny_patch16_224.nobody")
