"""`--check` of the chat model: plain torch for the tower and the abstractor, Hugging Face's BLOOM behind them."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
import torch.nn.functional as F
import transformers

from ymplug_jax.convert.oracles import EAGER, Read, filled, openai
from ymplug_jax.models.clip_vit import EPS, ClipViT, VideoClipViT
from ymplug_jax.models.mplug_chat import MPLUGChat

FRAMES = 2


def _linear(read: Read, name: str, x: torch.Tensor) -> torch.Tensor:
    return F.linear(x, read(f"{name}.weight"), read(f"{name}.bias"))


def _norm(read: Read, name: str, x: torch.Tensor, eps: float) -> torch.Tensor:
    return F.layer_norm(x, x.shape[-1:], read(f"{name}.weight"), read(f"{name}.bias"), eps)


def _attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """[B, L, N, H], [B, S, N, H] twice -> [B, L, N * H]."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


def _quick_gelu(x: torch.Tensor) -> torch.Tensor:
    return x * torch.sigmoid(1.702 * x)


def _adapted(read: Read, name: str, x: torch.Tensor) -> torch.Tensor:
    """What the temporal adapter adds to the patches: [M, T, P, D] -> [M, T, P, D]."""
    y = _norm(read, f"{name}.ln", x, 1e-5).permute(0, 3, 1, 2)[..., None]  # [M, D, T, P, 1]
    y = F.conv3d(y, read(f"{name}.down_proj.weight"), read(f"{name}.down_proj.bias"))
    kernel = read(f"{name}.conv.weight")
    y = F.conv3d(y, kernel, read(f"{name}.conv.bias"), padding=(1, 0, 0), groups=len(kernel))
    y = F.conv3d(_quick_gelu(y), read(f"{name}.up_proj.weight"), read(f"{name}.up_proj.bias"))
    return y[..., 0].permute(0, 2, 3, 1)


def _vision(read: Read, model: MPLUGChat, media: np.ndarray) -> torch.Tensor:
    """[M, T, S, S, 3] -> [M, T, 1 + P, D]."""
    sizes, eps = model.vision, 1e-6
    m, t = media.shape[:2]
    frames = torch.from_numpy(media).flatten(0, 1).permute(0, 3, 1, 2)
    patches = F.conv2d(frames, read("vision_model.embeddings.patch_embed.weight"), stride=sizes.patch_size)
    patches = patches.flatten(2).transpose(1, 2)  # [M * T, P, D]
    cls = read("vision_model.embeddings.cls_token").expand(m * t, 1, -1)
    x = torch.cat([cls, patches], 1) + read("vision_model.embeddings.position_embedding")
    x = _norm(read, "vision_model.embeddings.pre_layernorm", x, eps).unflatten(0, (m, t))
    for i in range(sizes.depth):
        name = f"vision_model.encoder.layers.{i}"
        if t > 1:
            x = x + torch.cat([x[:, :, :1], _adapted(read, f"{name}.temporal", x[:, :, 1:])], 2)
        y = _linear(read, f"{name}.self_attn.query_key_value", _norm(read, f"{name}.input_layernorm", x, eps))
        y = y.flatten(0, 1).unflatten(-1, (sizes.heads, 3, -1))  # [M * T, 1 + P, N, 3, H]
        x = x + _linear(read, f"{name}.self_attn.dense", _attend(*y.unbind(3))).unflatten(0, (m, t))
        y = _linear(read, f"{name}.mlp.fc1", _norm(read, f"{name}.post_attention_layernorm", x, eps))
        x = x + _linear(read, f"{name}.mlp.fc2", _quick_gelu(y))
    return _norm(read, "vision_model.post_layernorm", x, eps)


def _abstract(read: Read, model: MPLUGChat, tokens: torch.Tensor) -> torch.Tensor:
    """[M, T, N, D] -> [M, Q + 1, H]."""
    sizes, eps = model.abstractor, 1e-5
    m, t = tokens.shape[:2]
    x = read("query_tokens")
    if t > 1:
        x = torch.cat([x, read("temporal_query_tokens")], 1)
    x = x.expand(m, -1, -1)
    for i in range(sizes.depth):
        name = f"abstractor.encoder.layers.{i}.crossattention"
        x = _norm(read, f"{name}.norm1", x, eps)
        keys = torch.cat([x, _norm(read, f"{name}.normk", tokens.flatten(1, 2), eps)], 1)
        q, k, v = (
            _linear(read, f"{name}.attention.{part}", given).unflatten(-1, (sizes.heads, -1))
            for part, given in (("query", x), ("key", keys), ("value", keys))
        )
        x = x + _linear(read, f"{name}.output.out_proj", _attend(q, k, v))
        y, mlp = _norm(read, f"{name}.output.norm2", x, eps), f"{name}.output.mlp"
        y = F.silu(_linear(read, f"{mlp}.w1", y)) * _linear(read, f"{mlp}.w3", y)
        x = x + _linear(read, f"{mlp}.w2", _norm(read, f"{mlp}.ffn_ln", y, 1e-6))
    y = _linear(read, "abstractor.visual_fc", x[:, : sizes.queries])
    if t > 1:
        y = y + _linear(read, "abstractor.temporal_visual_fc", x[:, sizes.queries :])
    return torch.cat([y, read("abstractor.vit_eos").expand(m, -1, -1)], 1)


def _logits(read: Read, model: MPLUGChat, slots: torch.Tensor, ids: np.ndarray) -> torch.Tensor:
    """Logits of rows that begin with the slots of a clip: [B, Q + 1, H], [B, L] -> [B, Q + 1 + L, V]."""
    sizes = model.llm
    config = transformers.BloomConfig(
        vocab_size=sizes.vocab,
        hidden_size=sizes.width,
        n_layer=sizes.depth,
        n_head=sizes.heads,  # type: ignore[attr-defined]  # the release's decoder is a BLOOM
        layer_norm_epsilon=sizes.ln_eps,  # type: ignore[attr-defined]
        **EAGER,
    )
    llm = transformers.BloomForCausalLM(config)
    for name, parameter in llm.named_parameters():
        parameter.data = read(f"language_model.{name}")
    words = llm.transformer.word_embeddings_layernorm(llm.transformer.word_embeddings(torch.from_numpy(ids)))
    # Media vectors pass without the norm.
    setattr(llm.transformer, "word_embeddings_layernorm", torch.nn.Identity())  # noqa: B010  # another type
    return llm.eval()(inputs_embeds=torch.cat([slots, words], 1)).logits


@torch.inference_mode()
def clip_tower(
    read: Read, sizes: ClipViT | VideoClipViT, media: np.ndarray, layout: str, eps: float = EPS
) -> dict[str, np.ndarray]:
    """States of Hugging Face's CLIPVisionModel with the epsilon of our tower, for media f32[M, 1, S, S, 3]."""
    config = transformers.CLIPVisionConfig(
        hidden_size=sizes.width,
        intermediate_size=sizes.mlp,
        num_hidden_layers=sizes.depth,
        num_attention_heads=sizes.heads,
        image_size=sizes.image_size,
        patch_size=sizes.patch_size,
        hidden_act="quick_gelu",
        layer_norm_eps=eps,
        **EAGER,
    )
    model = transformers.CLIPVisionModel(config)
    tower = getattr(model, "vision_model", model)
    filled(tower, openai(read) if layout == "openai" else lambda name: read(f"vision_model.{name}"))
    pixels = torch.from_numpy(media[:, 0].transpose(0, 3, 1, 2).copy())
    states = tower(pixel_values=pixels, output_hidden_states=True).hidden_states[1:]
    found = {f"block {i}": state.numpy() for i, state in enumerate(states)}
    return found | {"norm": tower.post_layernorm(states[-1]).numpy()}


def sides(model: MPLUGChat, read: Read, rng: np.random.Generator) -> tuple[Any, Any]:
    """Two functions that give the outputs of every part by name: PyTorch's, and ours from the converted parameters."""
    size = model.vision.image_size
    inputs = {
        kind: rng.normal(size=(2, frames, size, size, 3)).astype(np.float32)
        for kind, frames in (("image", 1), ("clip", FRAMES))
    }
    ids = rng.integers(1, model.llm.vocab, (2, 5))

    @torch.inference_mode()
    def theirs() -> dict[str, np.ndarray]:
        found: dict[str, torch.Tensor] = {}
        for kind, media in inputs.items():
            tokens = _vision(read, model, media)
            slots = _abstract(read, model, tokens)
            found |= {f"{kind} tokens": tokens, f"{kind} slots": slots}
        found["logits"] = _logits(read, model, slots, ids)
        return {name: value.numpy() for name, value in found.items()}

    def ours(params: dict) -> dict[str, np.ndarray]:
        def run(whole: MPLUGChat) -> dict[str, jax.Array]:
            found: dict[str, jax.Array] = {}
            for kind, media in inputs.items():
                tokens = whole.vision(jnp.asarray(media))
                slots = whole.abstractor(tokens, whole.llm.width)
                found |= {f"{kind} tokens": tokens, f"{kind} slots": slots}
            row = jnp.concatenate([slots, whole.llm.embed(jnp.asarray(ids))], axis=1)
            return found | {"logits": whole.logits(whole.hidden(row))}

        with jax.default_matmul_precision("highest"):
            found = jax.jit(lambda p: model.apply({"params": p}, method=run))(params)
        return {name: np.asarray(value) for name, value in found.items()}

    return theirs, ours
