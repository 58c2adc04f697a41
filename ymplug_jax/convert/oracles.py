"""Reference computations in PyTorch for `--check`: Hugging Face's classes where they exist, plain torch elsewhere.

Each function takes a reader of the source's tensors and random inputs, and returns the state after every module by name. It shares
no code with the conversion rules or the JAX models that are checked against it.
"""

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import numpy as np
import torch
import torch.nn.functional as F
import transformers

Read = Callable[[str], torch.Tensor]  # tensor name -> float32 tensor
Outputs = dict[str, np.ndarray]
M = TypeVar("M", bound=torch.nn.Module)
EAGER: dict[str, Any] = {
    "attn_implementation": "eager"
}  # every config accepts it, but its type annotations do not say so


def filled(model: M, read: Read) -> M:
    """The model in eval mode, with its parameters replaced by `read`."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(False)
        value = read(name)
        if value.shape != parameter.shape:
            raise AssertionError(f"{name}: {tuple(value.shape)} for {tuple(parameter.shape)}")
        parameter.data = value
    return model.eval()


def _states(states: tuple[torch.Tensor, ...], last: str) -> Outputs:
    names = ["embeddings", *(f"block {i}" for i in range(len(states) - 2)), last]
    return {name: state.numpy() for name, state in zip(names, states, strict=True)}


@torch.inference_mode()
def bloom(read: Read, sizes: Any, ids: np.ndarray, mask: np.ndarray) -> Outputs:
    """States and logits of BloomForCausalLM."""
    config = transformers.BloomConfig(
        vocab_size=sizes.vocab,
        hidden_size=sizes.width,
        n_layer=sizes.depth,
        n_head=sizes.heads,
        layer_norm_epsilon=sizes.ln_eps,
        **EAGER,
    )
    return _causal(filled(transformers.BloomForCausalLM(config), read), ids, mask)


@torch.inference_mode()
def qwen(read: Read, config: Mapping[str, Any], ids: np.ndarray, mask: np.ndarray) -> Outputs:
    """States and logits of Qwen2ForCausalLM or Qwen3ForCausalLM with the settings of a config.json."""
    classes: dict[str, tuple[type[transformers.PretrainedConfig], type[transformers.PreTrainedModel]]] = {
        "qwen2": (transformers.Qwen2Config, transformers.Qwen2ForCausalLM),
        "qwen3": (transformers.Qwen3Config, transformers.Qwen3ForCausalLM),
    }
    settings, model = classes[config["model_type"]]
    known = {name: value for name, value in config.items() if name not in ("dtype", "torch_dtype")}
    made = settings.from_dict(known, **EAGER)
    return _causal(filled(model(made).float(), read), ids, mask)


def _causal(model: torch.nn.Module, ids: np.ndarray, mask: np.ndarray) -> Outputs:
    """States and logits of a decoder, set to zero at padding."""
    out = model(torch.from_numpy(ids), attention_mask=torch.from_numpy(mask), output_hidden_states=True)
    found = _states(out.hidden_states, "norm") | {"logits": out.logits.numpy()}
    return {name: value * mask[..., None] for name, value in found.items()}


@torch.inference_mode()
def gpt3(read: Read, sizes: Any, embeds: np.ndarray, prefix: str = "language_model") -> Outputs:
    """States and logits of GPT2Model, which computes what Megatron's GPT-3 does; q, k and v are de-interleaved."""
    config = transformers.GPT2Config(
        vocab_size=1,
        n_positions=sizes.max_positions,
        n_embd=sizes.width,
        n_layer=sizes.depth,
        n_head=sizes.heads,
        **EAGER,
    )

    def fused(name: str) -> torch.Tensor:
        value = read(name)
        heads = value.reshape(sizes.heads, 3, sizes.width // sizes.heads, -1)
        return heads.transpose(0, 1).reshape(3 * sizes.width, -1).squeeze(-1)

    def weight(name: str) -> torch.Tensor:
        if name == "wte.weight":
            return torch.zeros(1, sizes.width)
        if name == "wpe.weight":
            return read(f"{prefix}.embedding.position_embeddings.weight")
        if name.startswith("ln_f."):
            return read(f"{prefix}.encoder.final_layernorm.{name.removeprefix('ln_f.')}")
        _, layer, *parts, kind = name.split(".")
        there = {
            "ln_1": "input_layernorm",
            "ln_2": "post_attention_layernorm",
            "attn.c_attn": "self_attention.query_key_value",
            "attn.c_proj": "self_attention.dense",
            "mlp.c_fc": "mlp.dense_h_to_4h",
            "mlp.c_proj": "mlp.dense_4h_to_h",
        }[".".join(parts)]
        source = f"{prefix}.encoder.layers.{layer}.{there}.{kind}"
        value = fused(source) if there.endswith("query_key_value") else read(source)
        return value.T.contiguous() if value.ndim == 2 else value

    model = filled(transformers.GPT2Model(config), weight)
    hidden = model(inputs_embeds=torch.from_numpy(embeds), output_hidden_states=True).hidden_states
    table = read(f"{prefix}.embedding.word_embeddings.weight")
    return _states(hidden, "norm") | {"logits": (hidden[-1] @ table.T).numpy()}


@torch.inference_mode()
def bert(read: Read, sizes: Any, ids: np.ndarray, mask: np.ndarray, depth: int) -> Outputs:
    """States and logits of BertForMaskedLM; `sizes` is the text encoder."""
    config = transformers.BertConfig(
        vocab_size=sizes.vocab,
        hidden_size=sizes.width,
        num_hidden_layers=depth,
        num_attention_heads=sizes.heads,
        intermediate_size=sizes.hidden,
        max_position_embeddings=sizes.max_positions,
        type_vocab_size=sizes.types,
        **EAGER,
    )
    model = filled(transformers.BertForMaskedLM(config), read)
    out = model(torch.from_numpy(ids), attention_mask=torch.from_numpy(mask), output_hidden_states=True)
    names = ["embeddings", *(f"block {i}" for i in range(depth))]
    states = {name: state.numpy() for name, state in zip(names, out.hidden_states, strict=True)}
    return states | {"logits": out.logits.numpy()}


@torch.inference_mode()
def image_tower(read: Read, sizes: Any, video: np.ndarray, layout: str) -> Outputs:
    """States of CLIPVisionModel, also for a plain ViT, with the GELU, heads and epsilon of the video encoder.

    `video` is f32[B, 1, S, S, 3]; `layout` is "hugging_face", "openai" or "timm".
    """
    common: dict[str, Any] = {
        "hidden_size": sizes.width,
        "intermediate_size": int(sizes.width * sizes.mlp_ratio),
        "num_hidden_layers": sizes.depth,
        "num_attention_heads": sizes.heads,
        "image_size": sizes.image_size,
        "patch_size": sizes.patch_size,
        "hidden_act": "gelu",
        "layer_norm_eps": 1e-6,
        **EAGER,
    }
    pixels = torch.from_numpy(video[:, 0].transpose(0, 3, 1, 2).copy())
    clip = {"hugging_face": lambda name: read(f"vision_model.{name}"), "openai": openai(read), "timm": _timm(read)}[
        layout
    ]
    model = transformers.CLIPVisionModel(transformers.CLIPVisionConfig(**common))
    tower = getattr(model, "vision_model", model)
    if not sizes.clip:  # a bias at the patches and no norm before the blocks
        tower.pre_layrnorm = torch.nn.Identity()
        tower.embeddings.patch_embedding = torch.nn.Conv2d(3, sizes.width, sizes.patch_size, sizes.patch_size)
    filled(tower, clip)
    states = tower(pixel_values=pixels, output_hidden_states=True).hidden_states
    names = ["embeddings", *(f"block {i}" for i in range(sizes.depth))]
    outputs = {name: state.numpy() for name, state in zip(names, states, strict=True)}
    return outputs | {"norm": tower.post_layernorm(states[-1]).numpy()}


_PARTS = ("q_proj", "k_proj", "v_proj")


def openai(read: Read) -> Read:
    """Read the tensors of CLIPVisionModel from OpenAI's names."""

    def one(name: str) -> torch.Tensor:
        whole = {
            "embeddings.class_embedding": "visual.class_embedding",
            "embeddings.patch_embedding.weight": "visual.conv1.weight",
            "embeddings.position_embedding.weight": "visual.positional_embedding",
        }
        if name in whole:
            return read(whole[name])
        name = name.replace("pre_layrnorm", "ln_pre").replace("post_layernorm", "ln_post")
        name = name.replace("encoder.layers.", "transformer.resblocks.").replace("self_attn.", "attn.")
        name = name.replace("layer_norm", "ln_").replace("mlp.fc1", "mlp.c_fc").replace("mlp.fc2", "mlp.c_proj")
        for i, part in enumerate(_PARTS):
            if f"attn.{part}." in name:
                return read("visual." + name.replace(f"{part}.", "in_proj_")).chunk(3)[i]
        return read(f"visual.{name}")

    return one


def _timm(read: Read) -> Read:
    """Read the tensors of CLIPVisionModel from timm's names."""

    def one(name: str) -> torch.Tensor:
        if name == "embeddings.class_embedding":
            return read("cls_token")[0, 0]
        if name == "embeddings.position_embedding.weight":
            return read("pos_embed")[0]
        name = name.replace("embeddings.patch_embedding", "patch_embed.proj").replace("self_attn.", "attn.")
        name = name.replace("pre_layrnorm", "norm_pre").replace("post_layernorm", "norm").replace("out_proj", "proj")
        name = name.replace("encoder.layers.", "blocks.").replace("layer_norm", "norm")
        for i, part in enumerate(_PARTS):
            if f"attn.{part}." in name:
                return read(name.replace(part, "qkv")).chunk(3)[i]
        return read(name)

    return one


@torch.inference_mode()
def timesformer(read: Read, sizes: Any, video: np.ndarray, prefix: str) -> Outputs:
    """States of divided space-time attention, of video f32[B, T, S, S, 3]. See `docs/models/mplug_video.md`, Video encoder."""
    b, t, d, heads = *video.shape[:2], sizes.width, sizes.heads

    def get(name: str) -> torch.Tensor:
        return read(prefix + name)

    def norm(x: torch.Tensor, name: str) -> torch.Tensor:
        return F.layer_norm(x, (d,), get(f"{name}.weight"), get(f"{name}.bias"), 1e-6)

    def linear(x: torch.Tensor, name: str) -> torch.Tensor:
        return F.linear(x, get(f"{name}.weight"), get(f"{name}.bias"))

    def attend(x: torch.Tensor, name: str) -> torch.Tensor:
        bias = torch.cat([get(f"{name}.q_bias"), torch.zeros(d), get(f"{name}.v_bias")])
        q, k, v = F.linear(x, get(f"{name}.qkv.weight"), bias).unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return linear(y, f"{name}.proj")

    pixels = torch.from_numpy(video.transpose(0, 1, 4, 2, 3).copy()).flatten(0, 1)
    bias = None if sizes.clip else get("patch_embed.proj.bias")
    x = F.conv2d(pixels, get("patch_embed.proj.weight"), bias, stride=sizes.patch_size)
    x = x.flatten(2).transpose(1, 2).unflatten(0, (b, t))  # [B, T, P, D]
    table = get("pos_embed")[0]
    x = x + table[1:] + get("temporal_embed")[0][:, None]
    cls = (get("cls_token")[0, 0] + table[0]).expand(b, d)
    if sizes.clip:
        x, cls = norm(x, "norm_pre"), norm(cls, "norm_pre")
    outputs = {}
    p = x.shape[2]
    for i in range(sizes.depth):
        block = f"blocks.{i}"
        over_time = norm(x, f"{block}.temporal_ln").transpose(1, 2).reshape(b * p, t, d)
        y = linear(attend(over_time, f"{block}.temporal_attn"), f"{block}.temporal_fc")
        x = x + y.unflatten(0, (b, p)).transpose(1, 2)
        frames = torch.cat([cls[:, None, None].expand(b, t, 1, d), x], 2).flatten(0, 1)
        y = attend(norm(frames, f"{block}.norm1"), f"{block}.attn").unflatten(0, (b, t))
        x, cls = x + y[:, :, 1:], cls + y[:, :, 0].mean(1)
        both = torch.cat([cls[:, None], x.flatten(1, 2)], 1)
        both = both + linear(F.gelu(linear(norm(both, f"{block}.norm2"), f"{block}.mlp.fc1")), f"{block}.mlp.fc2")
        cls, x = both[:, 0], both[:, 1:].unflatten(1, (t, p))
        outputs[f"vision block {i}"] = both.numpy()
    return outputs | {"vision norm": norm(both, "norm").numpy()}


@torch.inference_mode()
def pool(read: Read, heads: int, tokens: np.ndarray) -> Outputs:
    """Outputs of mPLUG-video's abstractor and connector, with torch's attention module; tokens f32[B, S, D]."""
    d = tokens.shape[-1]
    attention = torch.nn.MultiheadAttention(d, heads, add_bias_kv=True, batch_first=True)
    filled(attention, lambda name: read(f"attn_pool.attn.{name}"))

    def norm(x: torch.Tensor, name: str) -> torch.Tensor:
        return F.layer_norm(x, (x.shape[-1],), read(f"{name}.weight"), read(f"{name}.bias"), 1e-6)

    queries = norm(read("learnable_queries").expand(len(tokens), -1, -1), "attn_pool.norm1")
    context = norm(torch.from_numpy(tokens), "attn_pool.normk")
    x = queries + attention(queries, context, context, need_weights=False)[0]
    hidden = F.gelu(
        F.linear(norm(x, "attn_pool.norm2"), read("attn_pool.mlp.fc1.weight"), read("attn_pool.mlp.fc1.bias"))
    )
    x = x + F.linear(hidden, read("attn_pool.mlp.fc2.weight"), read("attn_pool.mlp.fc2.bias"))
    prefix = F.linear(x, read("visual_fc.weight"), read("visual_fc.bias"))
    return {"abstractor": x.numpy(), "connector": prefix.numpy()}


def _youku(read: Read) -> Read:
    """Read the video encoder's tensors in Youku-mPLUG's names from Salesforce's, which has one bias for q, k and v."""

    def one(name: str) -> torch.Tensor:
        for i, bias in ((0, "q_bias"), (2, "v_bias")):
            if name.endswith(bias):
                return read(name.replace(bias, "qkv.bias")).chunk(3)[i]
        return read(name.replace("temporal_embed", "time_embed").replace("temporal_ln", "temporal_norm1"))

    return one


@torch.inference_mode()
def alpro(read: Read, sizes: Any, layout: str, video: np.ndarray, ids: np.ndarray, mask: np.ndarray) -> Outputs:
    """Outputs of ALPRO with the layers of Hugging Face's BERT; video f32[B, T, S, S, 3]."""
    ours = layout == "youku"
    towers = timesformer(
        read if ours else _youku(read), sizes.vision, video, "visual_encoder." if ours else "visual_encoder.model."
    )
    tokens = torch.from_numpy(towers.pop("vision norm"))
    b, _, d = tokens.shape
    tokens = torch.cat([tokens[:, :1], tokens[:, 1:].reshape(b, sizes.vision.frames, -1, d).mean(1)], 1)
    if d != sizes.text.width:
        tokens = F.linear(tokens, read("visn_fc.weight"), read("visn_fc.bias"))
        norm = read("visn_layer_norm.weight"), read("visn_layer_norm.bias")
        tokens = F.layer_norm(tokens, tokens.shape[-1:], *norm, 1e-12)
    depth = sizes.text.depth + sizes.fusion.depth
    config = transformers.BertConfig(
        vocab_size=sizes.text.vocab,
        hidden_size=sizes.text.width,
        num_hidden_layers=depth,
        num_attention_heads=sizes.text.heads,
        intermediate_size=sizes.text.hidden,
        max_position_embeddings=sizes.text.max_positions,
        type_vocab_size=sizes.text.types,
        **EAGER,
    )
    prefix = "" if layout == "salesforce_qa" else "bert."
    bert = transformers.BertModel(config, add_pooling_layer=False)
    bert = filled(bert, lambda name: read(f"text_encoder.{prefix}{name}"))

    def through(x: torch.Tensor, seen: torch.Tensor, first: int, last: int) -> torch.Tensor:
        for layer in bert.encoder.layer[first:last]:
            out = layer(x, attention_mask=(1 - seen[:, None, None].float()) * -10000)
            x = out[0] if isinstance(out, tuple) else out
        return x

    seen = torch.from_numpy(mask)
    states = through(bert.embeddings(torch.from_numpy(ids)), seen, 0, sizes.text.depth)
    seen = torch.cat([seen, torch.ones(tokens.shape[:2], dtype=seen.dtype)], 1)
    fused = through(torch.cat([states, tokens], 1), seen, sizes.text.depth, depth)

    def linear(x: torch.Tensor, name: str) -> torch.Tensor:
        return F.linear(x, read(f"{name}.weight"), read(f"{name}.bias"))

    out = {"video tokens": tokens, "text states": states, "fused states": fused}
    if sizes.contrastive_width:
        out["video vector"] = F.normalize(linear(tokens[:, 0], "vision_proj"), dim=-1)
        out["text vector"] = F.normalize(linear(states[:, 0], "text_proj"), dim=-1)
    if sizes.matching:
        out["match logits"] = linear(fused[:, 0], "itm_head")
    if sizes.masked:
        head = "text_encoder.cls.predictions.transform"
        x = F.gelu(linear(fused[:, : ids.shape[1]], f"{head}.dense"))
        x = F.layer_norm(x, x.shape[-1:], read(f"{head}.LayerNorm.weight"), read(f"{head}.LayerNorm.bias"), 1e-12)
        words = read("text_encoder.bert.embeddings.word_embeddings.weight")
        out["word logits"] = F.linear(x, words, read("text_encoder.cls.predictions.bias"))
    if sizes.classes:
        head = "cls_head" if ours else "classifier"
        out["class logits"] = linear(F.relu(linear(fused[:, 0], f"{head}.0")), f"{head}.2")
    return towers | {name: value.numpy() for name, value in out.items()}
