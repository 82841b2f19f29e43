"""Self-critical sequence training (SCST): the model samples captions and learns from their scores.

Rennie et al., 2017, https://arxiv.org/abs/1612.00563. The baseline is theirs, the reward of the greedy caption, or that
of Luo, 2020, https://arxiv.org/abs/2003.09971 ("new self-critical"): the mean reward of the image's other samples.

Three choices decide what is learned. They follow Luo's reference implementation unless stated otherwise:

- **The end token counts as a word.** It is appended to every reference, and to every sample that reached it, before
  n-grams are counted. Without it, a caption that stops at "a man on a" costs nothing, and models learn to stop there.
- **References are tokenized as in evaluation** (PTB, lower case, no punctuation), so that the reward is the score. The
  n-gram statistics are those of the training split, counted once; of several data sets, those of all together.
- **Samples come from the model's own distribution**: temperature 1, no token excluded, and no dropout in sampling or
  learning (Luo has dropout). The gradient is then that of the captions' own probabilities. With `search="beam"` the
  captions are the beams of a search instead (Cornia et al., 2020, https://arxiv.org/abs/1912.08226). The model then
  learns from captions close to those that it will write; random samples are much worse captions.

Letters: B images, K samples of each, M image tokens, D encoder width, T text tokens, N of them that are learned.
"""

import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch import nn

from captioner.labels import label_generated, put_before, split_targets, token_loss
from captioner.processing import CaptionerProcessor
from captioner.runs.sharding import whole_weights
from captioner.tags import TagVocabulary
from captioner.training.config import ScstConfig
from captioner.training.inputs import PairedInputs, ReadImages, join_texts
from captioner.training.rewards import CaptionReward
from captioner.training.wrapped import call_method


class SelfCritical:
    """The objective of stage scst: the tokens of sampled captions, weighted by reward minus baseline.

    Each image is encoded once for all its samples. The CPU computes the rewards while the device runs the forward pass
    whose losses they weight.

    Args:
        accelerator: accelerator that prepares the model.
        processor: the model's processor.
        references: captions of each image of the training table.
        config: the settings of SCST.
        max_new_tokens: longest sample in tokens.
        vocabulary: the objects of the object reward, if it has a weight.
        inputs: gives images tags and takes images away; human texts are learned only with it.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        processor: CaptionerProcessor,
        references: Sequence[Sequence[str]],
        config: ScstConfig,
        max_new_tokens: int,
        vocabulary: TagVocabulary | None = None,
        inputs: PairedInputs | None = None,
    ):
        self.accelerator, self.processor, self.config = accelerator, processor, config
        weights = (config.bleu_weight, config.meteor_weight, config.object_weight)
        self.reward = CaptionReward(references, *weights, vocabulary)
        self.max_new_tokens, self.inputs = max_new_tokens, inputs
        self.prompt_length = len(processor.prompt_ids())

    @torch.no_grad()
    def prepare(self, model: nn.Module, batch: dict) -> dict:
        """Sample K captions of each of B images.

        Returns:
            `image_tokens` (B, M, D), with `inputs` those of a blank image behind them; the samples, then the human
            texts, if there are any, as `input_ids`, `attention_mask` and `labels` (B*K + human, T), and the number of
            the image tokens of each as `owners`; `images` (B*K,), the row of each sample's image in the training table;
            `captions`, the samples as text, and whether each `ended`; with the greedy baseline also `greedy_captions`
            and `greedy_ended` (B).
        """
        captioner = self.accelerator.unwrap_model(model)
        captioner.eval()
        prompts = self.processor.prompts(len(batch["rows"]), self.accelerator.device)
        settings: dict[str, Any] = {**prompts, "max_new_tokens": self.max_new_tokens}
        count = self.config.samples
        with self.accelerator.autocast(), whole_weights(model):
            tokens = batch.get("image_tokens")
            if tokens is None:
                tokens = captioner.encode(batch["pixel_values"], batch.get("grid"))
            if self.inputs is not None:
                read = self.inputs.read_images(captioner, tokens)
            else:
                read = ReadImages(tokens, torch.arange(len(tokens), device=tokens.device), captioner.pick_tags(tokens))
            settings |= {"image_tokens": read.image_tokens[read.owners], "tags": read.tags}
            search = {"do_sample": True, "num_beams": 1, "temperature": 1.0, "top_k": 0, "top_p": 1.0}
            if self.config.search == "beam":
                search = {"do_sample": False, "num_beams": count}
            sampled = captioner.generate(**settings, **search, num_return_sequences=count)  # (B*K, T)
            decoded = dict(zip(("captions", "ended"), self.decode(sampled), strict=True))
            if self.config.baseline == "greedy":
                greedy = self.decode(captioner.generate(**settings, do_sample=False, num_beams=1))
                decoded |= dict(zip(("greedy_captions", "greedy_ended"), greedy, strict=True))
        captioner.train()
        images = np.repeat(batch["rows"].cpu().numpy(), count)  # (B*K,)
        text = label_generated(sampled, self.prompt_length, self.processor.tokenizer.eos_token_id)
        if captioner.tags is not None:
            text = put_before(text, [captioner.tags.words_of(group) for group in read.tags for _ in range(count)])
        owners = read.owners.repeat_interleave(count)  # (B*K,)
        if self.inputs is not None and self.config.xe_weight:
            human = self.inputs.prepare(model, batch | {"image_tokens": tokens})
            text, owners = join_texts(text, human), torch.cat([owners, human["owners"]])
        return {"image_tokens": read.image_tokens, "owners": owners, "images": images, **decoded, **text}

    def decode(self, sequences: torch.Tensor) -> tuple[list[str], list[bool]]:
        """Decode generated texts (B, T) without the prompt; returns B texts, and whether each reached its end token."""
        generated = sequences[:, self.prompt_length :]
        ended = (generated == self.processor.tokenizer.eos_token_id).any(1)
        return self.processor.tokenizer.batch_decode(generated, skip_special_tokens=True), ended.tolist()

    def loss(self, model: nn.Module, batch: dict) -> tuple[torch.Tensor, dict[str, float]]:
        """Return the loss: the sum over tokens of negative log-likelihood times the text's advantage.

        The advantage of a human text is `xe_weight`.
        """
        inputs, targets = split_targets(batch)  # it waits for the device, so it comes before the forward
        images = {name: batch[name] for name in ("image_tokens", "owners")}
        logits = call_method(model, "logits_at", **images, **inputs)  # (N, V)
        losses = token_loss(logits, targets, reduction="none")  # (N,)
        start = time.perf_counter()
        advantage, means = self.advantage(batch)  # meanwhile, a GPU computes the forward
        means["reward_ms"] = 1000 * (time.perf_counter() - start)
        positions = inputs["positions"]
        human = np.full(len(positions) - len(advantage), self.config.xe_weight)
        advantage = np.concatenate([advantage, human])
        weights = torch.tensor(advantage, dtype=losses.dtype, device=losses.device)[:, None]  # (B*K + human, 1)
        return (losses * weights.expand(positions.shape)[positions]).sum(), means

    def advantage(self, batch: dict) -> tuple[np.ndarray, dict[str, float]]:
        """Return each sample's reward minus its baseline (B*K,), and the mean rewards."""
        count = self.config.samples
        scores = self.reward.scores(batch["images"], batch["captions"], batch["ended"])
        rewards = self.reward.total(scores).reshape(-1, count)  # (B, K)
        parts = {f"reward_{name}": values.mean() for name, values in scores.items()} if len(scores) > 1 else {}
        if self.config.baseline == "mean":
            others = (rewards.sum(1, keepdims=True) - rewards) / (count - 1)
            return (rewards - others).ravel(), {"reward": rewards.mean()} | parts
        greedy = self.reward(batch["images"][::count], batch["greedy_captions"], batch["greedy_ended"])  # (B,)
        means = {"reward": rewards.mean(), "reward_greedy": greedy.mean()} | parts
        return (rewards - greedy[:, None]).ravel(), means


def silence_dropout(module: nn.Module) -> None:
    """Set every dropout rate to zero, in modules and in attributes, so that training mode is like eval mode."""
    for part in module.modules():
        if isinstance(part, nn.Dropout):
            part.p = 0.0
        for name, value in vars(part).items():
            if "dropout" in name and isinstance(value, float):
                setattr(part, name, 0.0)
