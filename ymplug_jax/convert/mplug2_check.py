"""`--check` of mPLUG-2 against plain torch, which reads the source by its own names and shares no code with the rules.

The model is described in `docs/models/mplug2.md`.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
import torch
import torch.nn.functional as F

from ymplug_jax.convert import oracles
from ymplug_jax.convert.mplug2 import Form
from ymplug_jax.models import mplug2
from ymplug_jax.models.bert import Fusion as BertFusion
from ymplug_jax.models.bert import MaskedHead, Text
from ymplug_jax.models.language_model import Memory
from ymplug_jax.models.mplug2 import MPLUG2
from ymplug_jax.models.timesformer import TimeSformer

Outputs = dict[str, np.ndarray]
LENGTH = 7  # of the texts


class Reader(NamedTuple):
    """The layers of BERT in torch, with weights that are read by name."""

    read: oracles.Read
    heads: int
    eps: float

    def linear(self, x: torch.Tensor, name: str) -> torch.Tensor:
        """A linear layer with a bias."""
        return F.linear(x, self.read(f"{name}.weight"), self.read(f"{name}.bias"))

    def norm(self, x: torch.Tensor, name: str) -> torch.Tensor:
        """LayerNorm."""
        return F.layer_norm(x, x.shape[-1:], self.read(f"{name}.weight"), self.read(f"{name}.bias"), self.eps)

    def attend(
        self, x: torch.Tensor, of: torch.Tensor, name: str, seen: torch.Tensor | None, causal: bool = False
    ) -> torch.Tensor:
        """Attention, residual sum and norm; `seen` is [B, S], None: all keys."""
        q, k, v = (
            self.linear(y, f"{name}.self.{part}").unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for y, part in ((x, "query"), (of, "key"), (of, "value"))
        )
        scores = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5
        if causal:
            scores = scores + torch.full(scores.shape[-2:], -1e4).triu(1)
        if seen is not None:
            scores = scores + (1 - seen[:, None, None].float()) * -1e4
        y = (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)
        return self.norm(x + self.linear(y, f"{name}.output.dense"), f"{name}.output.LayerNorm")

    def layer(
        self,
        x: torch.Tensor,
        name: str,
        seen: torch.Tensor | None,
        memory: tuple[torch.Tensor, torch.Tensor | None] | None = None,
        causal: bool = False,
    ) -> torch.Tensor:
        """One layer; `memory` is read by cross-attention."""
        x = self.attend(x, x, f"{name}.attention", seen, causal)
        if memory is not None:
            x = self.attend(x, memory[0], f"{name}.crossattention", memory[1])
        y = self.linear(F.gelu(self.linear(x, f"{name}.intermediate.dense")), f"{name}.output.dense")
        return self.norm(x + y, f"{name}.output.LayerNorm")

    def embed(self, ids: torch.Tensor, name: str) -> torch.Tensor:
        """Sum of the three embeddings, normalised."""
        word, place, kind = (self.read(f"{name}.{one}_embeddings.weight") for one in ("word", "position", "token_type"))
        return self.norm(word[ids] + place[: ids.shape[1]] + kind[0], f"{name}.LayerNorm")

    def words(self, x: torch.Tensor, name: str) -> torch.Tensor:
        """Logits of a masked-word head with the word embeddings of the module that it belongs to."""
        head = f"{name}.cls.predictions"
        x = self.norm(F.gelu(self.linear(x, f"{head}.transform.dense")), f"{head}.transform.LayerNorm")
        return F.linear(x, self.read(f"{name}.bert.embeddings.word_embeddings.weight"), self.read(f"{head}.bias"))


def clip_tower(read: oracles.Read, sizes: Any, video: np.ndarray) -> torch.Tensor:
    """Tokens of CLIP's image tower with local temporal modules, video f32[B, T, S, S, 3] -> [B, 1 + T' * P, D]."""
    run, base = Reader(lambda name: read(f"visual_encoder.visual.{name}"), sizes.heads, 1e-5), "transformer.resblocks"
    kernel, stride = run.read("conv1.weight"), sizes.temporal_stride
    pixels = torch.from_numpy(video.transpose(0, 4, 1, 2, 3).copy())
    side = (stride or 1, sizes.patch_size, sizes.patch_size)
    x = F.conv3d(pixels, kernel, stride=side, padding=(kernel.shape[2] // 2, 0, 0)).flatten(3).permute(0, 2, 3, 1)
    b, t, p, d = x.shape
    x = torch.cat([run.read("class_embedding").expand(b, t, 1, d), x], 2) + run.read("positional_embedding")
    x = run.norm(x, "ln_pre")

    def over_time(x: torch.Tensor, name: str) -> torch.Tensor:
        y = F.linear(run.norm(x[:, :, 1:], f"{name}.ln"), run.read(f"{name}.down_proj.weight").flatten(1))
        y = (y + run.read(f"{name}.down_proj.bias")).permute(0, 2, 3, 1).flatten(0, 1)  # [B * P, C, T]
        y = F.conv1d(
            y, run.read(f"{name}.conv.weight")[..., 0, 0], run.read(f"{name}.conv.bias"), padding=1, groups=y.shape[1]
        )
        y = (y * torch.sigmoid(1.702 * y)).unflatten(0, (b, p)).permute(0, 3, 1, 2)
        y = F.linear(y, run.read(f"{name}.up_proj.weight").flatten(1), run.read(f"{name}.up_proj.bias"))
        return torch.cat([x[:, :, :1], x[:, :, 1:] + y], 2)

    for i in range(sizes.depth):
        name = f"{base}.{i}"
        x = over_time(x, f"{name}.lmhra1")
        y = F.linear(
            run.norm(x, f"{name}.ln_1").flatten(0, 1),
            run.read(f"{name}.attn.in_proj_weight"),
            run.read(f"{name}.attn.in_proj_bias"),
        )
        q, k, v = y.unflatten(-1, (3, sizes.heads, -1)).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        x = x + run.linear(y, f"{name}.attn.out_proj").unflatten(0, (b, t))
        x = over_time(x, f"{name}.lmhra2") if sizes.adapters == 2 else x
        y = run.linear(run.norm(x, f"{name}.ln_2"), f"{name}.mlp.c_fc")
        x = x + run.linear(y * torch.sigmoid(1.702 * y), f"{name}.mlp.c_proj")
    joined = torch.cat([x[:, :, 0].mean(1, keepdim=True), x[:, :, 1:].flatten(1, 2)], 1)
    return run.norm(joined, "ln_post")


@torch.inference_mode()
def theirs(
    read: oracles.Read, model: MPLUG2, form: Form, video: np.ndarray, ids: np.ndarray, mask: np.ndarray
) -> Outputs:
    """Outputs of every part by name."""
    run = Reader(read, model.text.heads, model.text.ln_eps)
    if isinstance(model.vision, TimeSformer):
        tokens = torch.from_numpy(oracles.timesformer(read, model.vision, video, "visual_encoder.")["vision norm"])
    else:
        tokens = clip_tower(read, model.vision, video)
    out = {"vision": tokens}
    if model.vision.width != model.text.width:
        tokens = run.norm(run.linear(tokens, "visn_fc"), "visn_layer_norm")
    inner = "text_encoder.bert" if form.inner and form.variant == "mplug2" else "text_encoder"
    shared = [f"{inner}.encoder.layer.{i}" for i in range(form.text - form.universal, form.text)]
    if form.variant == "mplug2":
        x = read(f"{shared[0]}.latents").expand(len(tokens), -1, -1)
        for name in shared[:-1]:
            x = run.layer(x, name, None, (tokens, None))
        tokens = run.norm(tokens + run.layer(tokens, shared[-1], None, (x, None)), "visn_emb_norm")
    out["video tokens"] = tokens
    seen, words = torch.from_numpy(mask), torch.from_numpy(ids)
    x = run.embed(words, f"{inner}.embeddings")
    for i in range(form.text):
        x = run.layer(x, f"{inner}.encoder.layer.{i}", seen)
    out["text states"] = states = x
    both, video_states = torch.cat([torch.ones(tokens.shape[:2]), seen], 1), tokens
    fusion = "fusion_encoder.bert" if form.inner else "fusion_encoder"
    for j in range(form.fusion):
        name = f"{fusion}.encoder.layer.{form.stored - form.fusion + j}"
        if j and form.stride and j % form.stride == 0:
            y = run.layer(torch.cat([video_states, x], 1), name, both)
            video_states, x = video_states + y[:, : tokens.shape[1]], y[:, tokens.shape[1] :]
        else:
            x = run.layer(x, name, seen, (video_states, None))
    out |= {"fused video": video_states, "fused text": x}
    out |= _heads(run, model, tokens, states, x)
    if model.generates:
        memory = (torch.cat([video_states, x], 1), both)
        y = run.embed(words, "text_decoder.bert.embeddings")
        for i in range(model.decoder.depth):
            y = run.layer(y, f"text_decoder.bert.encoder.layer.{i}", seen, memory, causal=True)
        out["decoder logits"] = run.words(y, "text_decoder")
    return {name: value.numpy() for name, value in out.items()}


def _heads(
    run: Reader, model: MPLUG2, tokens: torch.Tensor, states: torch.Tensor, fused: torch.Tensor
) -> dict[str, torch.Tensor]:
    out = {}
    if model.contrastive_width:
        out["video vector"] = F.normalize(run.linear(tokens[:, 0], "vision_proj"), dim=-1)
        out["text vector"] = F.normalize(run.linear(states[:, 0], "text_proj"), dim=-1)
    if model.matching:
        out["match logits"] = run.linear(fused[:, 0], "itm_head")
    if model.masked:
        out["word logits"] = run.words(fused, "fusion_encoder")
    if model.classes:
        out["class logits"] = run.linear(F.relu(run.linear(fused[:, 0], "cls_head.0")), "cls_head.2")
    return out


def ours(model: MPLUG2, params: dict, video: np.ndarray, ids: np.ndarray, mask: np.ndarray) -> Outputs:
    """The same outputs of the converted parameters."""
    pixels, words, seen = (jnp.asarray(x) for x in (video, ids, mask))

    def run(own: MPLUG2) -> dict[str, jax.Array]:
        tokens, states = own.encode_video(pixels), own.encode_text(words, seen)
        video_states, fused = own.fuse(states, seen, tokens)
        out = {"vision": own.vision(pixels), "video tokens": tokens, "text states": states}
        out |= {"fused video": video_states, "fused text": fused}
        if model.contrastive_width:
            out |= {"video vector": own.embed_video(tokens), "text vector": own.embed_text(states)}
        if model.matching:
            out["match logits"] = own.match_logits(fused)
        if model.masked:
            out["word logits"] = own.words(fused)
        if model.classes:
            out["class logits"] = own.classify(fused)
        if model.generates:
            memory: Memory = mplug2.memory_of(video_states, fused, seen)
            out["decoder logits"] = own.logits(own.decode(words, seen, memory))
        return out

    with jax.default_matmul_precision("highest"):
        found = cast(dict[str, jax.Array], jax.jit(lambda p: model.apply({"params": p}, method=run))(params))
    return {name: np.asarray(value) for name, value in found.items()}


def sides(
    model: MPLUG2, form: Form, read: oracles.Read, rng: np.random.Generator
) -> tuple[Callable[[], Outputs], Callable[[dict], Outputs]]:
    """Two functions that give the outputs of every part by name: PyTorch's, and ours from the converted parameters."""
    vision = model.vision
    frames = vision.frames if isinstance(vision, TimeSformer) else 3
    video = rng.normal(size=(2, frames, vision.image_size, vision.image_size, 3)).astype(np.float32)
    length = min(LENGTH, model.text.max_positions)
    ids = rng.integers(1, model.text.vocab, (2, length)).astype(np.int32)
    mask = (np.arange(length) < np.array([[length], [length - 2]])).astype(np.int32)
    return (
        lambda: theirs(read, model, form, video, ids, mask),
        lambda params: ours(model, params, video, ids, mask),
    )


def bert_sides(
    text: Text, layout: str, like: Mapping[str, Any], read: oracles.Read, inputs: tuple[np.ndarray, np.ndarray]
) -> tuple[Callable[[], Outputs], Callable[[dict], Outputs]]:
    """`sides` of a BERT that starts several parts: every stack of layers runs without cross-attention on the states below it."""
    ids, mask = inputs
    depth, universal, fusion = map(int, layout.split(":"))
    decoder = jax.tree.leaves(like["decoder"]["blocks"])[0].shape[0]

    def ours(params: dict) -> Outputs:
        def through(x: np.ndarray, stack: dict, first: int, name: str) -> Outputs:
            layers = len(jax.tree.leaves(stack)[0])
            run = BertFusion(depth=layers, heads=text.heads, hidden=text.hidden, ln_eps=text.ln_eps)
            kept: dict[str, Any] = {"capture_intermediates": True, "mutable": "intermediates"}
            out = jax.jit(lambda p: run.apply({"params": {"blocks": p}}, x, mask, **kept)[1])(stack)
            states = jax.tree.leaves(out["intermediates"]["blocks"]["__call__"])[0]
            return {f"{name} block {first + i}": np.asarray(state) for i, state in enumerate(states)}

        def words(x: np.ndarray, head: dict, table: jax.Array) -> np.ndarray:
            own = {name: part for name, part in head.items() if name != "token_embed"}
            return np.asarray(MaskedHead(text.ln_eps).apply({"params": own}, x, table))

        with jax.default_matmul_precision("highest"):
            tables = {name: part for name, part in params["text"].items() if name != "blocks"}
            tables_of_decoder = {name: params["decoder"][name] for name in tables}
            start, other = (
                np.asarray(text.apply({"params": one}, ids, method="embed")) for one in (tables, tables_of_decoder)
            )
            found: Outputs = {"text embeddings": start, "decoder embeddings": other}
            found |= through(start, params["text"]["blocks"], 0, "text")
            if "universal" in params:
                found |= through(
                    found[f"text block {text.depth - 1}"], params["universal"]["blocks"], text.depth, "text"
                )
            found |= through(
                found[f"text block {depth - fusion - 1}"], params["fusion"]["blocks"], depth - fusion, "fusion"
            )
            last = found[f"fusion block {depth - 1}"]
            found |= through(other, params["decoder"]["blocks"], 0, "decoder")
            found["masked words"] = words(last, params["mlm"], params["mlm"]["token_embed"])
            found["decoder words"] = words(last, params["decoder"]["head"], params["decoder"]["token_embed"])
        return found

    def theirs() -> Outputs:
        found = oracles.bert(read, text, ids, mask, depth)
        parts = {
            "text": range(text.depth + universal),
            "fusion": range(depth - fusion, depth),
            "decoder": range(decoder),
        }
        out = {f"{part} block {i}": found[f"block {i}"] for part, own in parts.items() for i in own}
        both = {"text embeddings": found["embeddings"], "decoder embeddings": found["embeddings"]}
        return both | out | {"masked words": found["logits"], "decoder words": found["logits"]}

    return theirs, ours
