import pytest
from huggingface_hub.errors import HfHubHTTPError

import captioner
from captioner.data.readers import read_captions


def test_a_folder_that_is_not_there_is_named_where_the_hub_does_not_answer(monkeypatch):
    client = next(base for base in HfHubHTTPError.__bases__ if base is not OSError)

    def dataset_info(self, name, timeout):
        raise client("no such host\nin two lines")

    monkeypatch.setattr("huggingface_hub.HfApi.dataset_info", dataset_info)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    with pytest.raises(
        ValueError, match=r"'nope' is no file and no folder, and the hub does not answer \(no such host\)"
    ):
        read_captions("nope", "train")


def test_a_model_that_is_not_there_is_named_where_the_hub_does_not_answer(monkeypatch):
    def model_info(self, name, timeout):
        raise OSError("no such host\nin two lines")

    monkeypatch.setattr("huggingface_hub.HfApi.model_info", model_info)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    with pytest.raises(ValueError, match=r"^no captioner model at 'runs/best': no folder 'runs/best', and the hub"):
        captioner.load("runs/best")
