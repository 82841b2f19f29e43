"""Greedy and beam search over images: the captions of transformers' `generate`, 3 beams in half of the time.

What differs: the decoder reads the prefix of an image once for all beams, and `slot_cache.py` stores it once. An image
leaves as soon as its search ends, and the next one takes its slot. The log-probability of a caption is summed up during
the search, so that it needs no second pass.

What is the same: the tokens. The order of operations on the scores, their dtype, the constants and the calls of `topk`
are those of `_sample` and `_beam_search` in transformers' `generation/utils.py`, so that ties resolve alike. An image
leaves only when no further step could change its captions. Rounding may differ; it matters only where two different
texts have the same score, as with two words that share an embedding.

Letters: B images, S of them active, K beams, k candidates, P prefix tokens, E decoder width, T0 prompt tokens, W
prompt tokens with words of tags, T longest text, V vocabulary, C columns of the cache, R texts returned for an image.
"""

from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import torch

from captioner.fusion import Fusion
from captioner.generation.decoder_steps import DecoderSteps
from captioner.generation.gpt2_steps import Gpt2Steps, is_plain_gpt2
from captioner.generation.settings import SearchSettings
from captioner.generation.slot_cache import SlotCache

FAR = -1.0e9
"""Score of what must not be chosen, as in transformers."""

ROWS = {"cpu": 192}
"""Texts that a step continues, by device: on a CPU, more would not make a token cheaper."""

GPU_ROWS = 1024
"""Texts that a step continues on other devices."""

State = dict[str, torch.Tensor]
"""The active images: tensors with one row for each, (S, ...)."""


class Batch(NamedTuple):
    """Images and the prompts of their texts."""

    prefix: torch.Tensor
    """(B, P, E)"""
    input_ids: torch.Tensor
    """Start token and prompt (B, T0)."""
    attention_mask: torch.Tensor
    """0 where a prompt is padded on its left (B, T0)."""
    read_ids: torch.Tensor
    """What the decoder reads: words of tags before the prompt (B, W)."""
    read_mask: torch.Tensor
    """0 where this is padded on its left (B, W)."""

    def arrange(self, fusion: Fusion) -> dict[str, torch.Tensor]:
        """Return the decoder's arguments, as a fusion arranges them; more than the prompt is read as embeddings."""
        inputs = fusion.arrange(self.prefix, self.read_ids, self.read_mask)
        if "input_ids" in inputs and self.read_ids.shape != self.input_ids.shape:
            inputs["inputs_embeds"] = fusion.decoder.get_input_embeddings()(inputs.pop("input_ids"))
        return inputs

    def cut(self, start: int, stop: int | None = None) -> "Batch":
        """Return some of the images."""
        return Batch(*(part[start:stop] for part in self))


class Found(NamedTuple):
    """The texts found for one image."""

    number: int
    """Number of the image, in the order of the batches."""
    texts: torch.Tensor
    """R texts, best first, filled up after their end (R, T)."""
    lengths: torch.Tensor
    """Their lengths with the prompt (R,)."""
    logprobs: torch.Tensor
    """Their log-probabilities under the model, prompt excluded (R,), float32."""


class BeamSearch:
    """A search over any number of images.

    Args:
        fusion: the decoder, and the way in which it reads the prefix.
        settings: the settings.
        slots: images that are active at a time; `None` for the number at which the device is fastest.
        logprob: whether to sum up log-probabilities.
    """

    def __init__(self, fusion: Fusion, settings: SearchSettings, slots: int | None = None, logprob: bool = False):
        self.fusion, self.decoder, self.settings, self.logprob = fusion, fusion.decoder, settings, logprob
        config = settings.config
        self.beams, self.returned = config.num_beams, config.num_return_sequences
        self.max_length, self.end = config.max_length, settings.end
        device = self.decoder.device
        self.slots = slots or max(1, ROWS.get(device.type, GPU_ROWS) // self.beams)
        self.select = self.select_beams if self.beams > 1 else self.select_greedy
        places = range(-settings.prompt_length, self.max_length - settings.prompt_length + 1)
        lengths = [float(max(1, place) ** config.length_penalty) for place in places]
        self.penalties = torch.tensor(lengths, device=device)  # by the length of a text; the prompt does not count
        make = Gpt2Steps if is_plain_gpt2(self.decoder) else DecoderSteps
        self.steps = make(self.decoder, self.slots, self.max_length - settings.prompt_length - 1, self.beams)
        self.batches: Iterator[Batch] = iter(())
        self.waiting: Batch | None = None
        self.state: State = {}
        self.working = self.admitted = 0

    @property
    def cache(self) -> SlotCache:
        """The keys and values; they exist from the first pass on."""
        assert self.steps.cache is not None
        return self.steps.cache

    def run(self, batches: Iterable[Batch]) -> Iterator[Found]:
        """Search for the captions of images; each image is yielded when its search ends, so not in order.

        Args:
            batches: the images, in batches of any size. Each batch is fetched when the one before has its slots.
        """
        self.batches = iter(batches)
        more = True
        while more or self.working:
            # a pass for one image costs nearly as much as for several, so wait until a quarter of the slots is free
            while more and self.slots - self.working >= max(1, self.slots // 4):
                more = self.admit()
                yield from self.release()
            if self.working:
                self.step()
                yield from self.release()

    def admit(self) -> bool:
        """Put the next images into the free slots and choose their first tokens; return whether there were any."""
        if self.waiting is None:
            self.waiting = next(self.batches, None)
            if self.waiting is None:
                return False
        free = self.slots - self.working
        batch, rest = self.waiting.cut(0, free), self.waiting.cut(free)
        self.waiting = rest if len(rest.prefix) else None
        inputs: dict[str, Any] = batch.arrange(self.fusion)
        mask = inputs["attention_mask"]  # (B, C0)
        positions = (mask.long().cumsum(1) - 1).clamp(min=0)
        if mask.all():
            inputs["attention_mask"] = None
        logits = self.steps.read_prompt(inputs, positions, self.working)  # (B, 1, V)
        self.cache.prepare(self.working, len(mask))
        new = self.new_state(batch, mask, positions[:, -1] + 1)
        new = self.select(new, logits.float().expand(-1, self.beams, -1))
        self.state = {name: torch.cat([self.state[name], new[name]]) for name in new} if self.working else new
        self.working += len(mask)
        self.admitted += len(mask)
        return True

    def new_state(self, batch: Batch, mask: torch.Tensor, positions: torch.Tensor) -> State:
        """Return the state of images whose prefix and prompt the decoder has read.

        Args:
            batch: the images.
            mask: 1 for the columns that it has read, 0 for padding (B, C0).
            positions: position of the first new token (B,).
        """
        count, device = len(mask), mask.device
        # in float, because some kernels would convert a boolean mask in every layer
        columns = torch.full((count, self.beams, self.cache.columns), -torch.inf, device=device)
        columns[:, :, : mask.shape[1]].masked_fill_(mask.bool()[:, None], 0.0)
        texts = torch.full((count, self.beams, self.max_length), self.settings.fill, device=device)
        texts[:, :, : self.settings.prompt_length] = batch.input_ids[:, None]
        state = {
            "number": torch.arange(self.admitted, self.admitted + count),
            "length": torch.full((count,), self.settings.prompt_length, device=device),  # of the running texts
            "position": positions,
            "mask": columns.to(self.decoder.dtype),
            "texts": texts,  # (B, K, T)
            "token": texts[:, :, 0],  # the token that the decoder reads next (B, K)
            "scores": torch.zeros(count, self.beams, device=device),
            "logprobs": torch.zeros(count, self.beams, device=device),
            "ended": torch.zeros(count, dtype=torch.bool, device=device),  # whether the search has ended
        }
        if "encoder_hidden_states" in batch.arrange(self.fusion):
            state["prefix"] = batch.prefix
        if self.beams > 1:
            state["scores"][:, 1:] = FAR  # all beams are still the same text
            state |= {
                "found": texts.clone(),
                "found_scores": torch.full((count, self.beams), FAR, device=device),
                "found_logprobs": torch.zeros(count, self.beams, device=device),
                "found_lengths": torch.zeros(count, self.beams, dtype=torch.long, device=device),
                "is_found": torch.zeros(count, self.beams, dtype=torch.bool, device=device),
                "improvable": torch.ones(count, 1, dtype=torch.bool, device=device),
            }
        return state

    def step(self) -> None:
        """Let the decoder read the last token of every text, and choose the next one."""
        state = self.state
        start, used = self.cache.next_step(self.working)
        mask = state["mask"]  # (S, K, C)
        own = torch.eye(self.beams, device=mask.device, dtype=torch.bool)
        mask[:, :, start : start + self.beams] = torch.where(own, 0.0, -torch.inf).to(mask.dtype)
        positions = state["position"][:, None].expand(-1, self.beams)
        logits = self.steps.read_tokens(state["token"], positions, mask[:, None, :, :used], state.get("prefix"))
        state["position"] = state["position"] + 1
        self.state = self.select(state, logits.float())

    def process(self, state: State, scores: torch.Tensor) -> torch.Tensor:
        """Apply the logits processors, such as a penalty of repetition, to scores (S, K, V)."""
        if not self.settings.processors:
            return scores
        scores = scores.clone()
        for length in state["length"].unique().tolist():
            rows = (state["length"] == length).nonzero()[:, 0]
            texts = state["texts"][rows, :, :length].flatten(0, 1)
            processed = self.settings.processors(texts, scores[rows].flatten(0, 1))
            scores[rows] = processed.unflatten(0, (len(rows), -1))
        return scores

    def select_greedy(self, state: State, logits: torch.Tensor) -> State:
        """Choose the most probable token of each text, from logits (S, 1, V)."""
        token = self.process(state, logits).argmax(-1)  # (S, 1)
        length = state["length"]
        texts = state["texts"].scatter(2, length[:, None, None], token[..., None])
        state = {**state, "texts": texts, "token": token, "length": length + 1}
        if self.logprob:
            chosen = logits.gather(2, token[..., None])[..., 0] - logits.logsumexp(-1)
            state["logprobs"] = state["logprobs"] + chosen
        state["ended"] = torch.isin(token, self.end)[:, 0] | (length + 1 >= self.max_length)
        return state

    def select_beams(self, state: State, logits: torch.Tensor) -> State:
        """Choose the K texts of each image that continue, and store those that ended, from logits (S, K, V)."""
        vocabulary = logits.shape[-1]
        raw = logits.log_softmax(-1)  # (S, K, V)
        scores = (self.process(state, raw) + state["scores"][:, :, None]).flatten(1)  # (S, K*V)
        keep = max(2, 1 + len(self.end)) * self.beams
        scores, places = scores.topk(keep)  # (S, k)
        parents, tokens = places // vocabulary, places % vocabulary
        length = state["length"][:, None]  # (S, 1)
        texts = take(state["texts"], parents).scatter(2, length[..., None].expand(-1, keep, 1), tokens[..., None])
        logprobs = take(state["logprobs"], parents)
        if self.logprob:
            logprobs = logprobs + raw.flatten(1).gather(1, places)
        stops = torch.isin(tokens, self.end) | (length + 1 >= self.max_length)

        # the texts that continue
        running = scores + stops.to(torch.float32) * FAR
        order = running.topk(self.beams)[1]  # (S, K)
        going = {"texts": take(texts, order), "token": take(tokens, order), "logprobs": take(logprobs, order)}
        going |= {"scores": take(running, order), "mask": take(state["mask"], take(parents, order))}

        state = {**state, **going, "length": state["length"] + 1}
        stops[:, self.beams :] = False  # a text counts as ended if it is among the best K
        state |= self.add_found(state, texts, scores, logprobs, stops)  # even if none ended: it reorders ties

        config, improvable = self.settings.config, state["improvable"]
        reached = self.penalties[length + 1]  # (S, 1)
        if config.early_stopping == "never" and config.length_penalty > 0:
            reached = self.penalties[-1]
        best = state["scores"][:, :1] / reached
        worst = torch.where(state["is_found"], state["found_scores"].amin(1, keepdim=True), FAR)
        state["improvable"] = improvable & (best > worst).any(1, keepdim=True)
        over = ~state["improvable"][:, 0] | (state["length"] >= self.max_length)
        state["ended"] = over | (state["is_found"].all(1) & (config.early_stopping is True))
        return state

    def add_found(
        self, state: State, texts: torch.Tensor, scores: torch.Tensor, logprobs: torch.Tensor, stops: torch.Tensor
    ) -> State:
        """Merge the candidates that ended with the best K texts found before.

        Args:
            state: the active images.
            texts: the candidates (S, k, T).
            scores: their scores (S, k).
            logprobs: their log-probabilities (S, k).
            stops: whether they ended (S, k).
        """
        length = state["length"][:, None]  # (S, 1), with the new token
        final = scores / self.penalties[length]
        full = state["is_found"].all(1, keepdim=True) & (self.settings.config.early_stopping is True)
        final += full.to(torch.float32) * FAR
        final += (~state["improvable"]).to(torch.float32) * FAR
        final += (~stops) * FAR
        merged = torch.cat([state["found_scores"], final], 1)
        order = merged.topk(self.beams)[1]  # (S, K)
        return {
            "found": take(torch.cat([state["found"], texts], 1), order),
            "found_scores": take(merged, order),
            "found_logprobs": take(torch.cat([state["found_logprobs"], logprobs], 1), order),
            "found_lengths": take(torch.cat([state["found_lengths"], length.expand(-1, scores.shape[1])], 1), order),
            "is_found": take(torch.cat([state["is_found"], stops], 1), order),
        }

    def release(self) -> Iterator[Found]:
        """Yield the texts of the images whose search has ended, and free their slots."""
        ended = self.state["ended"].tolist() if self.working else []
        if not any(ended):
            return
        state, going = self.state, [slot for slot, end in enumerate(ended) if not end]
        for slot, end in enumerate(ended):
            if end:
                yield self.found(slot)
        count = len(going)
        free = [slot for slot in range(count) if ended[slot]]
        movers = [slot for slot in going if slot >= count]
        index = torch.arange(count)
        index[free] = torch.tensor(movers, dtype=torch.long)
        self.state = {name: values[index.to(values.device)] for name, values in state.items()}
        if free:
            device = state["token"].device
            self.cache.move(torch.tensor(movers, device=device), torch.tensor(free, device=device))
        self.working = count

    def found(self, slot: int) -> Found:
        """Return the texts found for the image in a slot."""
        state, number = self.state, int(self.state["number"][slot])
        if self.beams == 1:
            return Found(number, state["texts"][slot], state["length"][slot : slot + 1], state["logprobs"][slot])
        parts = (state[name][slot, : self.returned] for name in ("found", "found_lengths", "found_logprobs"))
        return Found(number, *parts)


def take(values: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
    """Take entries of the second dimension: values (S, n, ...) and order (S, m) give (S, m, ...)."""
    index = order.view(*order.shape, *(1 for _ in values.shape[2:]))
    return torch.take_along_dim(values, index, 1)
