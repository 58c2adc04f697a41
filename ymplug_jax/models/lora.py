"""LoRA adapters: trained low-rank updates of the linear layers in a frozen decoder.

Hu et al., "LoRA: low-rank adaptation of large language models", 2021. Described in docs/models/language_models.md, "LoRA".
"""

import math
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.traverse_util import flatten_dict, unflatten_dict

from ymplug_jax.core import quantize
from ymplug_jax.models import layers

PARAMETERS = "llm/blocks/lora/.*"  # Path regex of the adapters in a model with a language model.
QKV = ("attn/q", "attn/k", "attn/v")

_COMMON = (
    ("blocks/lora/o/a", "layers heads head_dim rank"),
    ("blocks/lora/down/a", "layers mlp rank"),
    ("blocks/lora/(o|down)/b", "layers rank embed"),
)
# Axis words of the adapters, with q, k and v in one matrix or in matrices of their own.
FUSED_AXES = (
    ("blocks/lora/(qkv|up)/a", "layers embed rank"),
    ("blocks/lora/qkv/[qkv]", "layers rank heads head_dim"),
    ("blocks/lora/up/b", "layers rank mlp"),
    *_COMMON,
)
AXES = (
    ("blocks/lora/(q|k|v|gate|up)/a", "layers embed rank"),
    ("blocks/lora/q/b", "layers rank heads head_dim"),
    ("blocks/lora/[kv]/b", "layers rank kv_heads head_dim"),
    ("blocks/lora/(gate|up)/b", "layers rank mlp"),
    *_COMMON,
)


class Settings(NamedTuple):
    """The adapters of a decoder."""

    rank: int  # Rank R; 0 leaves the adapters out.
    scale: float  # Factor of the update, alpha / R.
    dropout: float  # Dropout rate on the input of the adapters in training.
    targets: tuple[str, ...]  # Path regexes of the linear layers below a block, full match.


def targets_of(settings: Settings, linears: tuple[str, ...], fused: bool) -> tuple[str, ...]:
    """Names of the adapters of a block.

    Args:
      settings: of the decoder.
      linears: paths of the linear layers of a block, such as "attn/q" and "mlp/up".
      fused: the checkpoint keeps q, k and v in one matrix, so their adapters share the factor A.

    Raises:
      ValueError: a target is not a regex, matches no layer, or a part of a fused matrix only.
    """
    if not settings.rank:
        return ()
    chosen: set[str] = set()
    for target in settings.targets:
        try:
            found = {path for path in linears if re.fullmatch(target, path)}
        except re.error as error:
            raise ValueError(
                f"config.model.llm.lora_targets: {target!r} is not a regex ({error}); choose one of {', '.join(linears)}"
            ) from None
        if not found:
            raise ValueError(
                f"config.model.llm.lora_targets: {target!r} matches no linear layer; choose one of {', '.join(linears)}"
            )
        chosen |= found
    if not chosen:
        raise ValueError(f"config.model.llm.lora_targets: empty; choose one of {', '.join(linears)}")
    if fused and 0 < len(chosen & set(QKV)) < len(QKV):
        raise ValueError(
            "config.model.llm.lora_targets: this decoder keeps q, k and v in one matrix; write 'attn/[qkv]' for all three"
        )
    names = [path.rpartition("/")[2] for path in linears if path in chosen]
    return tuple(dict.fromkeys("qkv" if fused and name in "qkv" else name for name in names))


class LowRank(nn.Module):
    """Update of one linear layer, or of several that share the factor A; it starts at zero."""

    settings: Settings  # Rank, scale and dropout.
    parts: tuple[str, ...]  # Names of the factors B, one for each updated output.
    deterministic: bool  # Leaves the dropout out.
    dtype: str  # Type of the computation.

    @nn.compact
    def __call__(self, x: jax.Array, outputs: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        """Add the updates to the outputs.

        Args:
          x: input of the layer, f[..., *I].
          outputs: of the layer without adapters, f[..., *O] each.

        Returns:
          The updated outputs, in the same shapes.
        """
        dtype = jnp.dtype(self.dtype)
        inner = x.shape[min(x.ndim, outputs[0].ndim) - 1 :]  # one side of a layer has one axis
        size = math.prod(inner)
        a = quantize.matrix(self.param("a", layers.torch_linear(size), (*inner, self.settings.rank))).astype(dtype)
        x = nn.Dropout(self.settings.dropout, deterministic=self.deterministic)(x)
        low = jnp.tensordot(x, a, axes=len(inner)) * self.settings.scale  # [..., R]
        updated = []
        for name, y in zip(self.parts, outputs, strict=True):
            b = self.param(name, nn.initializers.zeros, (self.settings.rank, *y.shape[low.ndim - 1 :]))
            b = quantize.matrix(b).astype(dtype)
            updated.append(y + jnp.tensordot(low, b, axes=1).astype(y.dtype))
        return tuple(updated)


class Lora(nn.Module):
    """The adapters of one block, {name: LowRank}. Give its `update` to the layers of the block."""

    settings: Settings  # Rank, scale, dropout and targets.
    linears: tuple[str, ...]  # Paths of the linear layers of the block.
    fused: bool  # q, k and v share the factor A.
    deterministic: bool  # Leaves the dropout out.
    dtype: str  # Type of the computation.

    def setup(self) -> None:
        """Create the adapters of the targets."""
        for name in targets_of(self.settings, self.linears, self.fused):
            parts = tuple("qkv") if name == "qkv" else ("b",)
            setattr(self, name, LowRank(self.settings, parts, self.deterministic, self.dtype))

    def update(self, names: tuple[str, ...], x: jax.Array, outputs: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        """See `layers.Update`."""
        chosen = targets_of(self.settings, self.linears, self.fused)
        if "qkv" in chosen and names == tuple("qkv"):
            return self.qkv(x, outputs)
        return tuple(
            getattr(self, name)(x, (y,))[0] if name in chosen else y for name, y in zip(names, outputs, strict=True)
        )


def update_of(
    settings: Settings, linears: tuple[str, ...], *, fused: bool, deterministic: bool, dtype: str
) -> layers.Update:
    """What the layers of a block do with their outputs; call it within the block's `nn.compact` method."""
    if not settings.rank:
        return layers.unchanged
    return Lora(settings, linears, fused, deterministic, dtype, name="lora").update


def merge(params: Mapping[str, Any], scale: float) -> tuple[dict[str, Any], dict[str, Any]]:
    """Add the adapters of a decoder to its weights: W + scale * A B, computed in float32 and cast to the type of W.

    Args:
      params: nested parameters of the decoder.
      scale: `lora_scale` of the decoder.

    Returns:
      The parameters of the decoder with `lora_rank=0`, and what `unmerge` needs: the changed weights as they were, and the adapters.
      A sum in floating point cannot be undone exactly, so the weights themselves are kept.

    Raises:
      ValueError: the weights are quantised.
    """
    flat, changed = flatten_dict(dict(params), sep="/"), {}
    kept = {path: leaf for path, leaf in flat.items() if "blocks/lora/" in path}
    for path, b in kept.items():
        name, part = path.removeprefix("blocks/lora/").split("/")
        if part == "a":
            continue
        a, layer = kept[f"blocks/lora/{name}/a"], part if name == "qkv" else name
        target = f"blocks/{'attn' if layer in 'qkvo' else 'mlp'}/{layer}/kernel"
        weight = flat[target]
        if isinstance(weight, quantize.Quantized):
            raise ValueError("config.train.frozen_dtype: adapters cannot be merged into int8 weights; use bfloat16")
        a, b = (jnp.asarray(x, jnp.float32) for x in (a, b))
        added = jnp.einsum("lir,lro->lio", a.reshape(len(a), -1, a.shape[-1]), b.reshape(len(b), b.shape[1], -1))
        changed[target] = (weight.astype(jnp.float32) + scale * added.reshape(weight.shape)).astype(weight.dtype)
        kept = kept | {target: weight}
    merged = {path: leaf for path, leaf in (flat | changed).items() if "blocks/lora/" not in path}
    return unflatten_dict(merged, sep="/"), unflatten_dict(kept, sep="/")


def unmerge(params: Mapping[str, Any], kept: Mapping[str, Any]) -> dict[str, Any]:
    """Return the parameters that `merge` was given, bit for bit, from its two results."""
    return unflatten_dict(flatten_dict(dict(params), sep="/") | flatten_dict(dict(kept), sep="/"), sep="/")
