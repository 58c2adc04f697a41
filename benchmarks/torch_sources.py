"""Checkpoints with random weights in their original formats: Hugging Face classes save themselves, the other
layouts are written by name. For the tests of the converter and its benchmark.
"""

import json
from collections.abc import Callable
from pathlib import Path

import torch
import transformers
from safetensors.torch import save_file

Tensors = dict[str, torch.Tensor]
STD = 0.05


def _draw(shapes: dict[str, tuple[int, ...]], dtype: torch.dtype, seed: int = 0) -> Tensors:
    generator = torch.Generator().manual_seed(seed)
    return {name: (torch.randn(shape, generator=generator) * STD).to(dtype) for name, shape in shapes.items()}


def _shaken(model: torch.nn.Module) -> torch.nn.Module:
    """Randomise every parameter, including norms and biases, so that swapped tensors are detected."""
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        parameter.data.add_(torch.randn(parameter.shape, generator=generator) * STD)
    return model


def bloom(
    folder: Path, *, width: int, depth: int, heads: int, vocab: int, dtype: torch.dtype, shard: str = "50GB"
) -> list[Path]:
    """BloomForCausalLM, saved by itself: one file, or shards with their index."""
    config = transformers.BloomConfig(vocab_size=vocab, hidden_size=width, n_layer=depth, n_head=heads)
    model = _shaken(transformers.BloomForCausalLM(config)).to(dtype)
    model.save_pretrained(folder, max_shard_size=shard)
    index = folder / "model.safetensors.index.json"
    return [index if index.exists() else folder / "model.safetensors"]


def qwen(
    folder: Path, *, kind: str, dtype: torch.dtype, shard: str = "50GB", **sizes: int | float | bool
) -> list[Path]:
    """Qwen2ForCausalLM or Qwen3ForCausalLM ("qwen2", "qwen3") of these settings, saved by itself: one file, or shards."""
    classes = {
        "qwen2": (transformers.Qwen2Config, transformers.Qwen2ForCausalLM),
        "qwen3": (transformers.Qwen3Config, transformers.Qwen3ForCausalLM),
    }
    settings, model = classes[kind]
    _shaken(model(settings(**sizes))).to(dtype).save_pretrained(folder, max_shard_size=shard)
    index = folder / "model.safetensors.index.json"
    return [index if index.exists() else folder / "model.safetensors"]


def bert(folder: Path, *, width: int, depth: int, heads: int, vocab: int, dtype: torch.dtype) -> list[Path]:
    """BertForPreTraining in a file of torch.save, with the copies of tied tensors and the names that came from TensorFlow."""
    config = transformers.BertConfig(
        vocab_size=vocab,
        hidden_size=width,
        num_hidden_layers=depth,
        num_attention_heads=heads,
        intermediate_size=4 * width,
        max_position_embeddings=64 if width < 768 else 512,
    )
    tensors = _shaken(transformers.BertForPreTraining(config)).to(dtype).state_dict()
    renamed = {
        name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): value
        for name, value in tensors.items()
    }
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(renamed, folder / "pytorch_model.bin")
    return [folder / "pytorch_model.bin"]


def clip(folder: Path, *, width: int, depth: int, heads: int, patch: int, image: int, dtype: torch.dtype) -> list[Path]:
    """CLIPModel, saved by itself."""
    vision = {
        "hidden_size": width,
        "intermediate_size": 4 * width,
        "num_hidden_layers": depth,
        "num_attention_heads": heads,
        "image_size": image,
        "patch_size": patch,
    }
    text = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "vocab_size": 50,
    }
    config = transformers.CLIPConfig(vision_config=vision, text_config=text)
    _shaken(transformers.CLIPModel(config)).to(dtype).save_pretrained(folder)
    return [folder / "model.safetensors"]


def openai_names(width: int, depth: int, patch: int, image: int) -> dict[str, tuple[int, ...]]:
    """Names and shapes of OpenAI's CLIP with a ViT, with a small text tower."""
    hidden = 4 * width
    shapes: dict[str, tuple[int, ...]] = {
        "visual.class_embedding": (width,),
        "visual.positional_embedding": (1 + (image // patch) ** 2, width),
        "visual.conv1.weight": (width, 3, patch, patch),
        "visual.proj": (width, 16),
        "positional_embedding": (8, 16),
        "text_projection": (16, 16),
        "token_embedding.weight": (50, 16),
        "ln_final.weight": (16,),
        "ln_final.bias": (16,),
        "logit_scale": (),
    }
    for name in ("ln_pre", "ln_post"):
        shapes |= {f"visual.{name}.weight": (width,), f"visual.{name}.bias": (width,)}
    for tower, d, layers in (("visual.transformer", width, depth), ("transformer", 16, 1)):
        for i in range(layers):
            block, m = f"{tower}.resblocks.{i}", hidden if d == width else 64
            shapes |= {f"{block}.attn.in_proj_weight": (3 * d, d), f"{block}.attn.in_proj_bias": (3 * d,)}
            shapes |= {f"{block}.attn.out_proj.weight": (d, d), f"{block}.attn.out_proj.bias": (d,)}
            shapes |= {f"{block}.ln_{n}.{kind}": (d,) for n in (1, 2) for kind in ("weight", "bias")}
            shapes |= {f"{block}.mlp.c_fc.weight": (m, d), f"{block}.mlp.c_fc.bias": (m,)}
            shapes |= {f"{block}.mlp.c_proj.weight": (d, m), f"{block}.mlp.c_proj.bias": (d,)}
    return shapes


class _Holder(torch.nn.Module):
    """A module that creates submodules for dotted parameter names."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x


def scripted(tensors: Tensors, file: Path) -> None:
    """Write the tensors as parameters of a TorchScript archive."""
    root = _Holder()
    for name, value in tensors.items():
        *path, last = name.split(".")
        module = root
        for part in path:
            if part not in module._modules:
                module.add_module(part, _Holder())
            module = module._modules[part]
        module.register_parameter(last, torch.nn.Parameter(value, requires_grad=False))
    torch.jit.script(root).save(str(file))


def openai(
    folder: Path,
    *,
    width: int,
    depth: int,
    heads: int,
    patch: int,
    image: int,
    dtype: torch.dtype,
    archive: bool = True,
) -> list[Path]:
    """OpenAI's CLIP: a TorchScript archive as it is downloaded, or its state dict."""
    tensors = _draw(openai_names(width, depth, patch, image), dtype)
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "ViT.pt"
    scripted(tensors, file) if archive else torch.save(tensors, file)
    return [file]


def timm(
    folder: Path, *, width: int, depth: int, heads: int, patch: int, image: int, dtype: torch.dtype, clip: bool = False
) -> list[Path]:
    """ViT of timm, plain or in CLIP's form (a norm before the blocks, no bias at the patches)."""
    shapes: dict[str, tuple[int, ...]] = {
        "cls_token": (1, 1, width),
        "pos_embed": (1, 1 + (image // patch) ** 2, width),
        "patch_embed.proj.weight": (width, 3, patch, patch),
        "norm.weight": (width,),
        "norm.bias": (width,),
        "head.weight": (10, width),
        "head.bias": (10,),
    }
    shapes |= {"norm_pre.weight": (width,), "norm_pre.bias": (width,)} if clip else {"patch_embed.proj.bias": (width,)}
    for i in range(depth):
        block = f"blocks.{i}"
        shapes |= {f"{block}.norm{n}.{kind}": (width,) for n in (1, 2) for kind in ("weight", "bias")}
        shapes |= {f"{block}.attn.qkv.weight": (3 * width, width), f"{block}.attn.qkv.bias": (3 * width,)}
        shapes |= {f"{block}.attn.proj.weight": (width, width), f"{block}.attn.proj.bias": (width,)}
        shapes |= {f"{block}.mlp.fc1.weight": (4 * width, width), f"{block}.mlp.fc1.bias": (4 * width,)}
        shapes |= {f"{block}.mlp.fc2.weight": (width, 4 * width), f"{block}.mlp.fc2.bias": (width,)}
    folder.mkdir(parents=True, exist_ok=True)
    save_file(_draw(shapes, dtype), folder / "model.safetensors")
    return [folder / "model.safetensors"]


def megatron_names(width: int, depth: int, vocab: int, positions: int) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a Megatron GPT-3."""
    lm = "language_model"
    shapes: dict[str, tuple[int, ...]] = {
        f"{lm}.embedding.word_embeddings.weight": (vocab, width),
        f"{lm}.embedding.position_embeddings.weight": (positions, width),
        f"{lm}.encoder.final_layernorm.weight": (width,),
        f"{lm}.encoder.final_layernorm.bias": (width,),
    }
    for i in range(depth):
        layer = f"{lm}.encoder.layers.{i}"
        for name in ("input_layernorm", "post_attention_layernorm"):
            shapes |= {f"{layer}.{name}.weight": (width,), f"{layer}.{name}.bias": (width,)}
        for name, out, inner in (
            ("self_attention.query_key_value", 3 * width, width),
            ("self_attention.dense", width, width),
            ("mlp.dense_h_to_4h", 4 * width, width),
            ("mlp.dense_4h_to_h", width, 4 * width),
        ):
            shapes |= {f"{layer}.{name}.weight": (out, inner), f"{layer}.{name}.bias": (out,)}
    return shapes


# Axis that tensor parallelism shards; norms, positions and the biases of row-parallel layers are replicated.
_CUT = {
    "word_embeddings.weight": 0,
    "query_key_value.weight": 0,
    "query_key_value.bias": 0,
    "dense_h_to_4h.weight": 0,
    "dense_h_to_4h.bias": 0,
    "self_attention.dense.weight": 1,
    "dense_4h_to_h.weight": 1,
}


def megatron(
    folder: Path,
    *,
    width: int,
    depth: int,
    vocab: int,
    positions: int,
    dtype: torch.dtype,
    pieces: int = 1,
    wrap: Callable[[Tensors], dict] = lambda tensors: {"module": tensors},
) -> list[Path]:
    """A GPT-3 in ModelScope's files, whole or cut for tensor parallelism."""
    tensors = _draw(megatron_names(width, depth, vocab, positions), dtype)
    folder.mkdir(parents=True, exist_ok=True)
    files = []
    for i in range(pieces):
        part = {}
        for name, value in tensors.items():
            axis = next((axis for end, axis in _CUT.items() if name.endswith(end)), None)
            part[name] = value if axis is None or pieces == 1 else value.chunk(pieces, axis)[i].clone()
        files.append(folder / f"mp_rank_{i:02d}_model_states.pt")
        torch.save(wrap(part), files[-1])
    return files


def adapter(folder: Path, *, width: int, depth: int, rank: int, alpha: int) -> Path:
    """A LoRA adapter of BLOOM's query_key_value as PEFT writes it."""
    shapes = {}
    for i in range(depth):
        name = f"base_model.model.transformer.h.{i}.self_attention.query_key_value"
        shapes |= {f"{name}.lora_A.weight": (rank, width), f"{name}.lora_B.weight": (3 * width, rank)}
    folder.mkdir(parents=True, exist_ok=True)
    save_file(_draw(shapes, torch.float32, seed=5), folder / "adapter_model.safetensors")
    config = {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": alpha,
        "bias": "none",
        "target_modules": ["query_key_value"],
    }
    (folder / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder
