"""ALPRO's training step compared with the same computation in PyTorch: `python -m benchmarks.alpro_step`.

Both compute the contrastive, matching and masked-language losses, the backward pass, clipping and AdamW in float32 without dropout,
with the same number of negatives and the same share of masked words. PyTorch runs eagerly with Hugging Face's BertForMaskedLM and
TimesformerModel, whose divided attention is the same.
"""

import argparse
import json
import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np
import torch
import torch.nn.functional as F
import transformers

from ymplug_jax.core import sharding
from ymplug_jax.core import state as state_lib
from ymplug_jax.core.config import Data, Experiment, Optim, Train
from ymplug_jax.models.alpro import ALPRO
from ymplug_jax.models.bert import Fusion, Text
from ymplug_jax.models.timesformer import TimeSformer
from ymplug_jax.training import setup
from ymplug_jax.training import step as step_lib

SIDE, PATCH, FRAMES, LENGTH = 112, 16, 4, 30
WIDTH, HEADS, HIDDEN, DEPTH, VOCAB, E = 256, 4, 1024, 6, 8192, 256


class Ours:
    """The step that training runs, on one device."""

    def __init__(self, batch: dict[str, np.ndarray]):
        model = ALPRO(
            vision=TimeSformer(
                image_size=SIDE, patch_size=PATCH, depth=DEPTH, width=WIDTH, heads=HEADS, frames=FRAMES, clip=False
            ),
            text=Text(vocab=VOCAB, width=WIDTH, depth=DEPTH // 2, heads=HEADS, hidden=HIDDEN, dropout=0.0),
            fusion=Fusion(depth=DEPTH // 2, heads=HEADS, hidden=HIDDEN, dropout=0.0),
            contrastive_width=E,
        )
        size = len(batch["ids"])
        experiment = Experiment(
            task="alpro_pretrain",
            model=model,
            data=Data(frames=FRAMES, image_size=SIDE, max_tokens=LENGTH, examples=8000),
            optim=Optim(warmup="0 steps"),
            train=Train(batch_size=size, duration="1000 steps", keep_logits=True),
        )
        run = setup.prepare(experiment, jax.devices()[:1])
        self.step = step_lib.compile_step(run)
        params, _ = setup.fresh_params(run)
        self.parameters = state_lib.count(params)
        self.state = state_lib.TrainState(jnp.int32(0), params, run.tx.init(params))
        self.state = jax.device_put(self.state, jax.tree.map(lambda leaf: leaf.sharding, run.state))
        self.key = sharding.on_all_hosts(lambda: jax.random.key(0), sharding.replicated(run.mesh))
        self.batch = sharding.put_batch(batch, np.arange(size), size, run.mesh)

    def __call__(self) -> None:
        self.state, metrics = self.step(self.state, {}, self.batch, self.key)
        jax.block_until_ready((self.state, metrics))


class Theirs(torch.nn.Module):
    """The step in eager PyTorch."""

    def __init__(self, batch: dict[str, np.ndarray]):
        super().__init__()
        vision = transformers.TimesformerConfig(
            image_size=SIDE, patch_size=PATCH, num_frames=FRAMES, hidden_size=WIDTH, num_hidden_layers=DEPTH,
            num_attention_heads=HEADS, intermediate_size=4 * WIDTH, attn_implementation="eager",
        )  # fmt: skip
        words = transformers.BertConfig(
            vocab_size=VOCAB, hidden_size=WIDTH, num_hidden_layers=DEPTH, num_attention_heads=HEADS,
            intermediate_size=HIDDEN, attn_implementation="sdpa", hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
        )  # fmt: skip
        self.vision, self.bert = transformers.TimesformerModel(vision), transformers.BertForMaskedLM(words)
        self.vision_proj, self.text_proj = torch.nn.Linear(WIDTH, E), torch.nn.Linear(WIDTH, E)
        self.match = torch.nn.Linear(WIDTH, 2)
        self.temperature = torch.nn.Parameter(torch.tensor(0.07))
        self.video = torch.from_numpy(batch["video"])
        self.ids, self.mask = (torch.from_numpy(batch[name].astype(np.int64)) for name in ("ids", "mask"))
        self.optimizer = torch.optim.AdamW(self.parameters(), lr=1e-4, weight_decay=0.05)
        mean, std = (
            torch.tensor([0.48145466, 0.4578275, 0.40821073]),
            torch.tensor([0.26862954, 0.26130258, 0.27577711]),
        )
        self.mean, self.std = mean, std

    def layers(self, x: torch.Tensor, mask: torch.Tensor, first: int, last: int) -> torch.Tensor:
        bias = (1 - mask[:, None, None].float()) * -10000
        for layer in self.bert.bert.encoder.layer[first:last]:
            out = layer(x, attention_mask=bias)
            x = out[0] if isinstance(out, tuple) else out
        return x

    def text(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return self.layers(self.bert.bert.embeddings(ids), mask, 0, DEPTH // 2)

    def fuse(self, states: torch.Tensor, mask: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        seen = torch.cat([mask, torch.ones(tokens.shape[:2], dtype=mask.dtype)], 1)
        return self.layers(torch.cat([states, tokens], 1), seen, DEPTH // 2, DEPTH)

    def loss(self) -> torch.Tensor:
        b = len(self.ids)
        pixels = ((self.video / 255.0 - self.mean) / self.std).permute(0, 1, 4, 2, 3)
        tokens = self.vision(pixels).last_hidden_state
        # Patch-major in this class: [B, 1 + P * T, D].
        patches = tokens[:, 1:].unflatten(1, (-1, FRAMES)).mean(2)
        tokens = torch.cat([tokens[:, :1], patches], 1)
        states = self.text(self.ids, self.mask)
        video, words = (F.normalize(x, dim=-1) for x in (self.vision_proj(tokens[:, 0]), self.text_proj(states[:, 0])))
        scores = video @ words.T / self.temperature
        own = torch.arange(b)
        contrastive = (F.cross_entropy(scores, own) + F.cross_entropy(scores.T, own)) / 2
        with torch.no_grad():
            free = scores.masked_fill(torch.eye(b, dtype=torch.bool), -torch.inf)
            wrong_video = torch.multinomial(free.T.softmax(1), 1)[:, 0]
            wrong_text = torch.multinomial(free.softmax(1), 1)[:, 0]
            told = (torch.rand(self.ids.shape) < 0.15) & self.mask.bool() & (self.ids > 4)
            shown = torch.where(told & (torch.rand(self.ids.shape) < 0.8), 4, self.ids)
        masked = self.text(shown, self.mask)
        fused = self.fuse(
            torch.cat([states, states, states[wrong_text], masked]),
            torch.cat([self.mask, self.mask, self.mask[wrong_text], self.mask]),
            torch.cat([tokens, tokens[wrong_video], tokens, tokens]),
        )
        logits = self.match(fused[: 3 * b, 0])
        matching = F.cross_entropy(logits, torch.cat([torch.ones(b), torch.zeros(2 * b)]).long())
        guesses = self.bert.cls(fused[3 * b :, : self.ids.shape[1]])
        labels = self.ids.masked_fill(~told, -100)
        return contrastive + matching + F.cross_entropy(guesses.flatten(0, 1), labels.flatten(), ignore_index=-100)

    def __call__(self) -> None:
        self.optimizer.zero_grad()
        self.loss().backward()
        torch.nn.utils.clip_grad_norm_(self.parameters(), 3.0)
        self.optimizer.step()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--batch", type=int, default=8)
    args = parser.parse_args()
    rng, size = np.random.default_rng(0), args.batch
    batch = {
        "video": rng.integers(0, 256, (size, FRAMES, SIDE, SIDE, 3), dtype=np.uint8),
        "ids": rng.integers(5, VOCAB, (size, LENGTH), dtype=np.int32),
        "mask": np.ones((size, LENGTH), np.int32),
        "clip": np.arange(2 * size, dtype=np.int32).reshape(size, 2),
        "valid": np.ones(size, bool),
    }
    ours, theirs = Ours(batch), Theirs(batch)
    sides = {"ymplug_jax": ours, "PyTorch": theirs}
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for number in range(args.rounds + 1):
        for name, step in sides.items():
            began = time.perf_counter()
            step()
            if number:  # the first round is a warm-up
                seconds[name].append(time.perf_counter() - began)
    result = {name: statistics.median(times) for name, times in seconds.items()}
    result["ratio"] = result["PyTorch"] / result["ymplug_jax"]
    result["parameters"] = {
        "ymplug_jax": ours.parameters,
        "PyTorch": sum(p.numel() for p in torch.nn.Module.parameters(theirs)),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
