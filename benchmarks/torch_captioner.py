"""The PyTorch side of the comparisons: the captioner from Hugging Face's classes, and the conversion of its weights.

TimesformerModel, a layer of cross-attention with learned queries (nn.MultiheadAttention), a linear connector and a frozen
GPT2LMHeadModel. `benchmarks.torch_step`, `benchmarks.torch_generate` and `benchmarks.device` share it.
"""

import jax
import ml_dtypes
import numpy as np
import torch
from torch import nn
from torch.nn import functional as F
from transformers import GPT2Config, GPT2LMHeadModel, TimesformerConfig, TimesformerModel
from transformers.models.timesformer import modeling_timesformer

from ymplug_jax.data import transforms
from ymplug_jax.models.abstractor import Abstractor
from ymplug_jax.models.gpt3 import GPT3
from ymplug_jax.models.mplug_video import MPLUGVideo
from ymplug_jax.models.timesformer import TimeSformer

MODELS = {
    "small": MPLUGVideo(
        vision=TimeSformer(image_size=112, patch_size=16, depth=6, width=384, heads=6, frames=4, clip=False),
        abstractor=Abstractor(queries=128, heads=6),
        llm=GPT3(vocab=32768, width=512, depth=8, heads=8, max_positions=256),
    ),
    "1.3b": MPLUGVideo(
        vision=TimeSformer(image_size=224, patch_size=16, depth=12, width=768, heads=8, frames=4, clip=False),
        abstractor=Abstractor(queries=128, heads=8),
        llm=GPT3(vocab=51200, width=2048, depth=24, heads=32, max_positions=2048),
    ),
}
LENGTH = 80  # tokens of a title


def batch_of(model: MPLUGVideo, size: int, length: int = LENGTH) -> dict[str, np.ndarray]:
    """A batch of noise: uint8 videos, random ids, titles of half to full length."""
    rng = np.random.default_rng(0)
    frames, edge = model.vision.frames, model.vision.image_size
    return {
        "video": rng.integers(0, 256, (size, frames, edge, edge, 3), dtype=np.uint8),
        "ids": rng.integers(3, model.llm.vocab, (size, length), dtype=np.int32),
        "mask": (np.arange(length) < rng.integers(length // 2, length + 1, (size, 1))).astype(np.int32),
        "valid": np.ones(size, bool),
    }


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
    """The whole model with random weights; its forward pass is the loss."""

    def __init__(self, model: MPLUGVideo):
        super().__init__()
        vision, llm = model.vision, model.llm
        self.vision = TimesformerModel(
            TimesformerConfig(
                image_size=vision.image_size, patch_size=vision.patch_size, num_frames=vision.frames,
                hidden_size=vision.width, num_hidden_layers=vision.depth, num_attention_heads=vision.heads,
                intermediate_size=4 * vision.width, layer_norm_eps=1e-6,
            )
        )  # fmt: skip
        self.pool = Pool(model.abstractor.queries, vision.width, model.abstractor.heads)
        self.connector = nn.Linear(vision.width, llm.width)
        self.llm = GPT2LMHeadModel(
            GPT2Config(
                vocab_size=llm.vocab, n_positions=llm.max_positions, n_embd=llm.width, n_layer=llm.depth,
                n_head=llm.heads, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, attn_implementation="sdpa",
                bos_token_id=0, eos_token_id=0,
            )
        )  # fmt: skip
        self.llm.requires_grad_(False)
        for name, values in (("mean", transforms.CLIP_MEAN), ("std", transforms.CLIP_STD)):
            self.register_buffer(name, torch.tensor(values), persistent=False)
        self.tuned = False
        with torch.no_grad():  # embeddings start at zero, which would hide a wrong conversion
            for name, value in self.vision.named_parameters():
                if "embeddings" in name or name.endswith("bias"):
                    value.normal_(0, 0.02)
                if name.endswith("qkv.bias"):
                    value.view(3, -1)[1] = 0

    def tune(self) -> None:
        """Switch to fused attention in the video encoder and to logits at text positions only."""
        self.tuned = True
        for layer in self.vision.encoder.layer:
            for attention in (layer.attention, layer.temporal_attention):
                attention.attention.__class__ = _FusedAttention

    def forward(self, video: torch.Tensor, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """uint8[B, T, S, S, 3], int64[B, L], int64[B, L] -> scalar loss."""
        pixels = ((video.float() / 255 - self.mean) / self.std).permute(0, 1, 4, 2, 3)  # [B, T, 3, S, S]
        prefix = self.connector(self.pool(self.vision(pixels).last_hidden_state))  # [B, Q, H]
        embeds = torch.cat([prefix, self.llm.transformer.wte(ids)], dim=1)  # [B, Q + L, H]
        labels = ids.masked_fill(mask == 0, -100)
        labels = torch.cat(
            [torch.full_like(labels[:, :1], -100), labels[:, 1:]], dim=1
        )  # the start token is not predicted
        if self.tuned:
            return self.llm(inputs_embeds=embeds, labels=labels, logits_to_keep=ids.shape[1], use_cache=False).loss
        none = torch.full(prefix.shape[:2], -100, dtype=labels.dtype, device=labels.device)
        return self.llm(inputs_embeds=embeds, labels=torch.cat([none, labels], dim=1), use_cache=False).loss


def fresh(model: MPLUGVideo, device: str, dtype: str) -> Captioner:
    """A captioner on `device` with seed 0: float32, with its frozen decoder in `dtype` as in the JAX step."""
    torch.manual_seed(0)
    with torch.device(device):
        captioner = Captioner(model)
    captioner.llm.to(getattr(torch, dtype))
    return captioner


class _FusedAttention(modeling_timesformer.TimesformerSelfAttention):
    """The encoder's attention with PyTorch's fused function, which the class does not use."""

    def forward(self, hidden_states: torch.Tensor, output_attentions: bool = False) -> tuple[torch.Tensor]:
        b, s, d = hidden_states.shape
        q, k, v = self.qkv(hidden_states).view(b, s, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)  # [B, N, S, H]
        return (F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, s, d),)


def to_jax(torch_model: Captioner, model: MPLUGVideo) -> dict:
    """The parameters of `torch_model` in the layout and dtypes of `model`. Key biases of the video encoder are zero on both sides."""
    flat = {name: to_numpy(value) for name, value in torch_model.named_parameters()}

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


def to_numpy(tensor: torch.Tensor) -> np.ndarray:
    """The tensor as a NumPy array; bfloat16 uses ml_dtypes."""
    tensor = tensor.detach().cpu()
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    return tensor.numpy()


def decoder_to_jax(decoder: GPT2LMHeadModel, lm: GPT3) -> dict:
    """The parameters of a GPT-2 in the layout and dtype of `lm`."""
    flat = {name: to_numpy(value) for name, value in decoder.transformer.named_parameters()}

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
