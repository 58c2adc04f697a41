"""Our train step against the same computation in PyTorch with Hugging Face's classes, in turn: `python -m benchmarks.torch_step`.

TimesformerModel, a layer of cross-attention with learned queries (nn.MultiheadAttention), a linear connector and a frozen
GPT2LMHeadModel, AdamW on what is trained; against `step.compile_step` of a model of the same sizes. Both sides start from
the same weights and see the same batch; their first losses are compared before anything is timed. No dropout.

Two forms of the PyTorch side: "classes" takes the classes as they are (logits over the whole row, the video encoder's own
attention), "tuned" takes fused attention everywhere and logits at text positions only. Each runs eagerly and, with
`--compile`, through torch.compile. On a GPU: `--device cuda --dtype bfloat16` (autocast there, bfloat16 here), `--size base`.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import torch
from torch import nn
from torch.nn import functional as F
from transformers import GPT2Config, GPT2LMHeadModel, TimesformerConfig, TimesformerModel
from transformers.models.timesformer import modeling_timesformer

from ymplug_jax.core import sharding
from ymplug_jax.core import state as state_lib
from ymplug_jax.core.config import Data, Experiment, Optim, Train
from ymplug_jax.models.abstractor import Abstractor
from ymplug_jax.models.gpt3 import GPT3
from ymplug_jax.models.mplug_video import MPLUGVideo
from ymplug_jax.models.timesformer import TimeSformer
from ymplug_jax.tasks.common import preprocess
from ymplug_jax.training import setup
from ymplug_jax.training import step as step_lib

MODELS = {
    "small": MPLUGVideo(
        vision=TimeSformer(image_size=112, patch_size=16, depth=6, width=384, heads=6, frames=4, clip=False),
        abstractor=Abstractor(queries=128, heads=6),
        llm=GPT3(vocab=32768, width=512, depth=8, heads=8, max_positions=256),
    ),
    "base": MPLUGVideo(
        vision=TimeSformer(image_size=224, patch_size=16, depth=12, width=768, heads=8, frames=4, clip=False),
        abstractor=Abstractor(queries=128, heads=8),
        llm=GPT3(vocab=51200, width=2048, depth=24, heads=32, max_positions=2048),
    ),
}
LENGTH = 80  # tokens of a title


class Pool(nn.Module):
    """The abstractor: f[B, S, D] -> f[B, Q, D]."""

    def __init__(self, queries: int, width: int, heads: int):
        super().__init__()
        self.queries = nn.Parameter(torch.randn(1, queries, width) * 0.015)
        self.query_norm, self.context_norm, self.mlp_norm = (nn.LayerNorm(width, eps=1e-6) for _ in range(3))
        self.attn = nn.MultiheadAttention(width, heads, add_bias_kv=True, batch_first=True)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, context: torch.Tensor) -> torch.Tensor:
        x = self.query_norm(self.queries).expand(context.shape[0], -1, -1)
        context = self.context_norm(context)
        x = x + self.attn(x, context, context, need_weights=False)[0]
        return x + self.down(F.gelu(self.up(self.mlp_norm(x))))


class Captioner(nn.Module):
    """The whole model; its forward pass is the loss."""

    def __init__(self, model: MPLUGVideo, tuned: bool):
        super().__init__()
        vision, llm = model.vision, model.llm
        self.tuned = tuned
        self.vision = TimesformerModel(
            TimesformerConfig(
                image_size=vision.image_size, patch_size=vision.patch_size, num_frames=vision.frames,
                hidden_size=vision.width, num_hidden_layers=vision.depth, num_attention_heads=vision.heads,
                intermediate_size=4 * vision.width, layer_norm_eps=1e-6,
            )
        )  # fmt: skip
        if tuned:
            for layer in self.vision.encoder.layer:
                for attention in (layer.attention, layer.temporal_attention):
                    attention.attention.__class__ = _FusedAttention
        self.pool = Pool(model.abstractor.queries, vision.width, model.abstractor.heads)
        self.connector = nn.Linear(vision.width, llm.width)
        self.llm = GPT2LMHeadModel(
            GPT2Config(
                vocab_size=llm.vocab, n_positions=llm.max_positions, n_embd=llm.width, n_layer=llm.depth,
                n_head=llm.heads, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, attn_implementation="sdpa",
            )
        )  # fmt: skip
        self.llm.requires_grad_(False)
        for name, values in (("mean", preprocess.MEAN), ("std", preprocess.STD)):
            self.register_buffer(name, torch.tensor(values), persistent=False)

    def forward(self, video: torch.Tensor, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """uint8[B, T, S, S, 3], int64[B, L], int64[B, L] -> scalar loss."""
        pixels = ((video.float() / 255 - self.mean) / self.std).permute(0, 1, 4, 2, 3)  # [B, T, 3, S, S]
        prefix = self.connector(self.pool(self.vision(pixels).last_hidden_state))  # [B, Q, H]
        embeds = torch.cat([prefix, self.llm.transformer.wte(ids)], dim=1)  # [B, Q + L, H]
        labels = ids.masked_fill(mask == 0, -100)
        labels = torch.cat([torch.full_like(labels[:, :1], -100), labels[:, 1:]], dim=1)  # the start token is given
        if self.tuned:
            return self.llm(inputs_embeds=embeds, labels=labels, logits_to_keep=ids.shape[1], use_cache=False).loss
        none = torch.full(prefix.shape[:2], -100, dtype=labels.dtype, device=labels.device)
        return self.llm(inputs_embeds=embeds, labels=torch.cat([none, labels], dim=1), use_cache=False).loss


class _FusedAttention(modeling_timesformer.TimesformerSelfAttention):
    """The encoder's attention through PyTorch's fused function, which the class does not take by itself."""

    def forward(self, hidden_states: torch.Tensor, output_attentions: bool = False) -> tuple[torch.Tensor]:
        b, s, d = hidden_states.shape
        q, k, v = self.qkv(hidden_states).view(b, s, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)  # [B, N, S, H]
        return (F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, s, d),)


def to_jax(torch_model: Captioner, model: MPLUGVideo) -> dict:
    """The parameters of `torch_model` as those of `model`, float32. Key biases of the video encoder are zero on both sides."""
    flat = {name: value.detach().cpu().numpy() for name, value in torch_model.named_parameters()}

    def linear(name: str) -> dict:
        return {"kernel": flat[f"{name}.weight"].T, "bias": flat[f"{name}.bias"]}

    def norm(name: str) -> dict:
        return {"scale": flat[f"{name}.weight"], "bias": flat[f"{name}.bias"]}

    def heads(weight: np.ndarray, bias: np.ndarray, out: dict, count: int, key_bias: bool) -> dict:
        """[3D, D], [3D] and a linear layer -> q, k, v, o."""
        d = weight.shape[1]
        parts = zip("qkv", weight.reshape(3, d, d), bias.reshape(3, d), strict=True)
        attn = {n: {"kernel": w.T.reshape(d, count, -1), "bias": b.reshape(count, -1)} for n, w, b in parts}
        if not key_bias:
            del attn["k"]["bias"]
        return attn | {"o": {"kernel": out["kernel"].reshape(count, -1, d), "bias": out["bias"]}}

    def stacked(layers: list[dict]) -> dict:
        return jax.tree.map(lambda *leaves: np.stack(leaves), *layers)

    def video_block(i: int) -> dict:
        at, n = f"vision.encoder.layer.{i}", model.vision.heads

        def attn(name: str) -> dict:
            qkv = f"{at}.{name}.attention.qkv"
            return heads(flat[f"{qkv}.weight"], flat[f"{qkv}.bias"], linear(f"{at}.{name}.output.dense"), n, False)

        return {
            "temporal_norm": norm(f"{at}.temporal_layernorm"),
            "temporal_attn": attn("temporal_attention"),
            "temporal_fc": linear(f"{at}.temporal_dense"),
            "attn_norm": norm(f"{at}.layernorm_before"),
            "attn": attn("attention"),
            "mlp_norm": norm(f"{at}.layernorm_after"),
            "mlp": {"up": linear(f"{at}.intermediate.dense"), "down": linear(f"{at}.output.dense")},
        }

    embed = "vision.embeddings."
    return {
        "vision": {
            "patch": {
                "kernel": flat[embed + "patch_embeddings.projection.weight"].transpose(2, 3, 1, 0),
                "bias": flat[embed + "patch_embeddings.projection.bias"],
            },
            "cls": flat[embed + "cls_token"][0, 0],
            "pos_embed": flat[embed + "position_embeddings"][0],
            "temporal_embed": flat[embed + "time_embeddings"][0],
            "blocks": stacked([video_block(i) for i in range(model.vision.depth)]),
            "norm": norm("vision.layernorm"),
        },
        "abstractor": {
            "queries": flat["pool.queries"][0],
            **{name: norm(f"pool.{name}") for name in ("query_norm", "context_norm", "mlp_norm")},
            "attn": heads(
                flat["pool.attn.in_proj_weight"], flat["pool.attn.in_proj_bias"], linear("pool.attn.out_proj"),
                model.abstractor.heads, True,
            ),
            "extra_key": flat["pool.attn.bias_k"].reshape(model.abstractor.heads, -1),
            "extra_value": flat["pool.attn.bias_v"].reshape(model.abstractor.heads, -1),
            "mlp": {"up": linear("pool.up"), "down": linear("pool.down")},
        },
        "connector": {"proj": linear("connector")},
        "llm": decoder_to_jax(torch_model.llm, model.llm),
    }  # fmt: skip


def decoder_to_jax(decoder: GPT2LMHeadModel, lm: GPT3) -> dict:
    """The parameters of a GPT-2 as those of `lm`, float32."""
    flat = {name: value.detach().cpu().numpy() for name, value in decoder.transformer.named_parameters()}

    def pair(name: str, weight: str) -> dict:
        return {weight: flat[f"{name}.weight"], "bias": flat[f"{name}.bias"]}

    def block(i: int) -> dict:
        weight, bias = flat[f"h.{i}.attn.c_attn.weight"], flat[f"h.{i}.attn.c_attn.bias"]  # [D, 3D], [3D]
        parts = zip("qkv", np.split(weight, 3, axis=1), np.split(bias, 3), strict=True)
        attn = {n: {"kernel": w.reshape(lm.width, lm.heads, -1), "bias": b.reshape(lm.heads, -1)} for n, w, b in parts}
        out = pair(f"h.{i}.attn.c_proj", "kernel")
        attn["o"] = {"kernel": out["kernel"].reshape(lm.heads, -1, lm.width), "bias": out["bias"]}
        return {
            "attn_norm": pair(f"h.{i}.ln_1", "scale"),
            "attn": attn,
            "mlp_norm": pair(f"h.{i}.ln_2", "scale"),
            "mlp": {"up": pair(f"h.{i}.mlp.c_fc", "kernel"), "down": pair(f"h.{i}.mlp.c_proj", "kernel")},
        }

    blocks = jax.tree.map(lambda *leaves: np.stack(leaves), *[block(i) for i in range(lm.depth)])
    return {
        "token_embed": flat["wte.weight"],
        "pos_embed": flat["wpe.weight"],
        "blocks": blocks,
        "norm": pair("ln_f", "scale"),
    }


class Ours:
    """The compiled train step with its state."""

    def __init__(self, model: MPLUGVideo, params: dict, batch: dict[str, np.ndarray], dtype: str, keep_logits: bool):
        size = len(batch["ids"])
        experiment = Experiment(
            task="pretrain",
            model=model.clone(
                vision=model.vision.clone(dtype=dtype),
                abstractor=model.abstractor.clone(dtype=dtype),
                llm=model.llm.clone(dtype=dtype),
            ),
            data=Data(
                frames=model.vision.frames, image_size=model.vision.image_size, max_tokens=LENGTH, examples=1000 * size
            ),
            optim=Optim(warmup="0 steps"),
            train=Train(batch_size=size, duration="1000 steps", frozen_dtype=dtype, keep_logits=keep_logits),
        )
        run = setup.prepare(experiment, jax.devices()[:1])
        self.compiled = step_lib.compile_step(run)
        trainable, frozen = state_lib.split(params, run.frozen_patterns)
        state = state_lib.TrainState(jnp.int32(0), trainable, run.tx.init(trainable))

        def put(tree: dict, like: dict) -> dict:
            return jax.tree.map(lambda x, to: jax.device_put(np.asarray(x, to.dtype), to.sharding), tree, like)

        self.state, self.frozen = put(state, run.state), put(frozen, run.frozen)
        self.key = sharding.on_all_hosts(lambda: jax.random.key(0), sharding.replicated(run.mesh))
        self.batch = sharding.put_batch(batch, np.arange(size), size, run.mesh)
        self.trained = state_lib.count(run.state.trainable)

    def step(self) -> float:
        self.state, metrics = self.compiled(self.state, self.frozen, self.batch, self.key)
        jax.block_until_ready(self.state)
        return metrics["caption_loss"].value()


class Theirs:
    """The PyTorch step with its state."""

    def __init__(self, torch_model: Captioner, batch: dict[str, np.ndarray], device: str, dtype: str, compiled: bool):
        self.model = torch_model.to(device).train()
        self.loss = torch.compile(self.model) if compiled else self.model
        self.weights = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.weights, lr=1e-4, eps=1e-6, weight_decay=0.05, fused=True)
        self.batch = [torch.from_numpy(batch["video"]), *(torch.from_numpy(batch[k]).long() for k in ("ids", "mask"))]
        self.batch = [x.to(device) for x in self.batch]
        self.device, self.half = device, dtype == "bfloat16"
        self.trained = sum(p.numel() for p in self.weights)

    def step(self) -> float:
        with torch.autocast(self.device, torch.bfloat16, enabled=self.half):
            loss = self.loss(*self.batch)
        loss.backward()
        nn.utils.clip_grad_norm_(self.weights, 3.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return float(loss.detach())  # waits for the device


def timed(step: Callable[[], float]) -> tuple[float, float]:
    """(seconds, CPU seconds of all threads): the latter hardly change on a core shared with other work."""
    began, cpu = time.perf_counter(), time.process_time()
    step()
    return time.perf_counter() - began, time.process_time() - cpu


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", choices=sorted(MODELS), default="small")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--device", default="cpu", help="of PyTorch: cpu or cuda; JAX takes its first device")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--compile", action="store_true", help="torch.compile beside eager PyTorch")
    args = parser.parse_args()
    torch.manual_seed(0)
    model = MODELS[args.size]
    rng = np.random.default_rng(0)
    size, frames, edge = args.batch, model.vision.frames, model.vision.image_size
    batch = {
        "video": rng.integers(0, 256, (size, frames, edge, edge, 3), dtype=np.uint8),
        "ids": rng.integers(3, model.llm.vocab, (size, LENGTH), dtype=np.int32),
        "mask": (np.arange(LENGTH) < rng.integers(LENGTH // 2, LENGTH + 1, (size, 1))).astype(np.int32),
        "valid": np.ones(size, bool),
    }
    first = Captioner(model, tuned=False)
    with torch.no_grad():  # the tables start as zeros, which would hide a wrong place
        for name, value in first.vision.named_parameters():
            if "embeddings" in name or name.endswith("bias"):
                value.normal_(0, 0.02)
            if name.endswith("qkv.bias"):
                value.view(3, -1)[1] = 0
    weights, params = first.state_dict(), to_jax(first, model)

    def theirs(tuned: bool, compiled: bool) -> Theirs:
        copy = Captioner(model, tuned)
        copy.load_state_dict(weights)
        return Theirs(copy, batch, args.device, args.dtype, compiled)

    sides = {
        "ours": Ours(model, params, batch, args.dtype, keep_logits=False),
        "ours, logits kept": Ours(model, params, batch, args.dtype, keep_logits=True),
        "PyTorch, classes": theirs(False, False),
        "PyTorch, tuned": theirs(True, False),
    }
    if args.compile:
        sides |= {
            "PyTorch, classes, compiled": theirs(False, True),
            "PyTorch, tuned, compiled": theirs(True, True),
        }
    losses = {name: [side.step() for _ in range(3)] for name, side in sides.items()}  # compiles and warms up, too
    for name, values in losses.items():
        print(f"{name:<28} losses " + " ".join(f"{value:.5f}" for value in values))
        np.testing.assert_allclose(values, losses["ours"], rtol=1e-4 if args.dtype == "float32" else 1e-2)
    times: dict[str, list[float]] = {name: [] for name in sides}
    cpu: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(args.steps):
        for name, side in sides.items():
            seconds, used = timed(side.step)
            times[name].append(seconds)
            cpu[name].append(used)
    for name, values in times.items():
        low, median, high = np.quantile(values, [0.1, 0.5, 0.9])
        ratio = statistics.median(t / o for t, o in zip(values, times["ours"], strict=True))
        print(
            f"{name:<28} {1000 * median:8.0f} ms ({1000 * low:.0f} to {1000 * high:.0f}), {ratio:.2f} x ours, {min(cpu[name]):.2f} CPU s"
        )
    medians = {name: statistics.median(values) for name, values in times.items()}
    counts = {"trained": sides["ours"].trained, "whole": state_lib.count(params)}
    print(json.dumps({"device": args.device, "dtype": args.dtype, "batch": size, **counts, "seconds": medians}))


if __name__ == "__main__":
    main()
