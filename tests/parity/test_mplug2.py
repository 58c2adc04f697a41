"""The parts of mPLUG-2 equal stored outputs of the PyTorch reference; one test for each fixture file."""

import re
from collections.abc import Callable, Container, Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import trees
from ymplug_jax.convert import clip_video, plan, rules
from ymplug_jax.convert import mplug2 as tables
from ymplug_jax.core import optim, state
from ymplug_jax.core.config import Optim
from ymplug_jax.models import (
    clip_vit,
    decode,
    decode_answers,
    decode_past_end,
    mplug2,
    position_tables,
    temporal,
)
from ymplug_jax.models.bert import Text
from ymplug_jax.models.bert_decoder import Decoder
from ymplug_jax.models.clip_vit import VideoClipViT
from ymplug_jax.models.language_model import Memory
from ymplug_jax.models.mplug2 import MPLUG2
from ymplug_jax.models.universal import Fusion, Universal
from ymplug_jax.tasks.common import distillation, losses, momentum
from ymplug_jax.tasks.common.pair_losses import Negatives
from ymplug_jax.tasks.mplug2 import answer, caption, joint

OUTPUT, GRADIENT, FLOOR = 1e-5, 1e-4, 1e-5
KEPT: dict[str, Any] = {"capture_intermediates": True, "mutable": "intermediates"}


@pytest.fixture(autouse=True)
def exact_products() -> Iterator[None]:
    with jax.default_matmul_precision("highest"):
        yield


# Reading of fixtures: modules of the stored sizes, and parameters through the converter.


def sizes_of(bert: dict) -> dict:
    return {
        "heads": bert["num_attention_heads"],
        "hidden": bert["intermediate_size"],
        "width": bert["hidden_size"],
        "ln_eps": bert["layer_norm_eps"],
    }


def table_sizes(bert: dict) -> dict:
    return {
        "vocab": bert["vocab_size"],
        "max_positions": bert["max_position_embeddings"],
        "types": bert["type_vocab_size"],
    }


def weights_of(file, layout, used: Container[str] = ()) -> dict[str, np.ndarray]:
    """Live parameters; tied copies must equal their originals, and everything else must be known to be without a use.

    `used` holds the names that the model has although the layout can do without them.
    """
    weights = file.group("param")
    dead = (name for name in weights if any(re.fullmatch(pattern, name) for pattern in layout.drop))
    names = {name for name in dead if name not in used}
    for copy, original in layout.tied:
        if copy in weights:
            np.testing.assert_array_equal(weights[copy], weights[original])
            names.add(copy)
    return {name: value for name, value in weights.items() if name not in names}


def planned(file) -> plan.Plan:
    """Module, abstract parameters and layout of a file."""
    shapes = {
        name.removeprefix("param/"): value.shape for name, value in file.arrays.items() if name.startswith("param/")
    }
    bert = file.config["bert_config"]
    heads = {"text": bert["num_attention_heads"]}
    heads["vision"] = (file.config.get("visual_cfg") or {}).get("num_heads") or file.config["tiny_clip"]["heads"]
    found = tables.plan(shapes, heads, bert["fusion_layers"], bert["stride_layer"])
    if file.config.get("temporal_downsampling"):  # no tensor tells the stride
        vision = found.model.vision.clone(temporal_stride=file.config["temporal_stride"])
        found = found._replace(model=found.model.clone(vision=vision))
    return found


def loaded(file) -> tuple[MPLUG2, dict, Callable[[dict], dict[str, np.ndarray]]]:
    """Model and parameters of a file, and the function that gives gradients the names of the file."""
    found = planned(file)
    layout = tables.LAYOUTS[found.layout]
    kept = rules.expand(layout.rules, found.like)
    weights = {name: value for name, value in weights_of(file, layout, kept).items() if name in kept}
    return (
        found.model,
        trees.to_tree(layout.rules, weights, found.like),
        lambda grads: rules.to_torch(layout.rules, grads),
    )


def encoded(model: MPLUG2, params: dict, video: np.ndarray) -> tuple[jax.Array, dict]:
    """Tokens of a video, and what its modules return by name."""
    kept = {"capture_intermediates": True, "mutable": "intermediates"}
    tokens, found = model.apply({"params": params}, video, method="encode_video", **kept)
    return tokens, found["intermediates"]


def channels_last(video: np.ndarray) -> np.ndarray:
    """[B, 3, T, S, S] -> [B, T, S, S, 3]."""
    return video.transpose(0, 2, 3, 4, 1)


def check_gradients(file, named: dict[str, np.ndarray], prefix: str = "grad") -> None:
    """Check every gradient stored below `prefix`, with a floor for those that are small in the whole file."""
    stored = [name for name in file.arrays if name.startswith("grad/")]
    floor = FLOOR * max(np.abs(file.arrays[name]).max() for name in stored)
    wanted = [name for name in stored if name.startswith(f"{prefix}/")]
    assert wanted, f"the file has no {prefix}/*"
    for name in wanted:
        expected, value = file[name], np.asarray(named[name.removeprefix(f"{prefix}/")])
        assert value.shape == expected.shape, name
        error = np.abs(value - expected).max() / max(np.abs(expected).max(), floor)
        print(f"{error:.1e}  {name}")
        assert error <= GRADIENT, f"{name}: relative error {error:.1e}"


# Vision towers.


def tower_of(config: dict, **fields) -> VideoClipViT:
    assert config["layer_norm_eps"] == clip_vit.VIDEO_EPS == temporal.ADAPTER_EPS
    return VideoClipViT(
        image_size=config["input_resolution"],
        patch_size=config["patch_size"],
        depth=config["layers"],
        width=config["width"],
        heads=config["heads"],
        mlp=4 * config["width"],
        temporal_stride=config["temporal_stride"] if config["temporal_downsampling"] else 0,
        **fields,
    )


def channels_first(tokens: jax.Array) -> jax.Array:
    """Patches [B, T, P, D] -> [B, D, T, h, w]."""
    b, t, p, d = tokens.shape
    side = round(p**0.5)
    return tokens.transpose(0, 3, 1, 2).reshape(b, d, t, side, side)


def check_tower(
    file, model: VideoClipViT, table: tuple[rules.Rule, ...], prefix: str, output: str, merged: bool
) -> None:
    """Compare what a tower returns and computes inside, its loss and the loss's gradients; `prefix` is that of the names."""
    video = channels_last(file["in/video"])
    weights = {name.removeprefix(prefix): value for name, value in file.group("param").items()}
    dead = [name for name in weights if any(re.fullmatch(pattern, name) for pattern in clip_video.DROP)]
    assert dead == ["visual.proj"]
    live = {name: value for name, value in weights.items() if name not in dead}
    like = jax.eval_shape(lambda: model.init(jax.random.key(0), video)["params"])
    params = trees.to_tree(table, live, like)
    cotangent = file["in/cotangent"]

    def run(params: dict, video: np.ndarray) -> tuple[jax.Array, tuple]:
        tokens, kept = model.apply(
            {"params": params}, video, merged=merged, capture_intermediates=True, mutable="intermediates"
        )
        return jnp.sum(tokens.reshape(cotangent.shape) * cotangent), (tokens, kept["intermediates"])

    gradient = jax.jit(jax.value_and_grad(run, argnums=(0, 1), has_aux=True))
    (loss, (tokens, kept)), (grads, pixels) = gradient(params, video)
    b, t = len(video), file.config["out_frames"]
    assert model.frames_out(video.shape[1]) == t == kept["patch"]["__call__"][0].shape[1]

    def sequence_first(states: jax.Array) -> jax.Array:  # [B, T, N, D] -> [N, B * T, D]
        return states.reshape(b * t, *states.shape[-2:]).swapaxes(0, 1)

    blocks = kept["blocks"]
    before = kept["norm_pre"]["__call__"][0]
    file.check("out/conv1", channels_first(kept["patch"]["__call__"][0]), OUTPUT)
    file.check("out/ln_pre", before.reshape(b * t, -1, model.width), OUTPUT)
    for i in range(1, model.adapters + 1):
        added = channels_first(blocks[f"temporal_{i}"]["__call__"][0][0])
        file.check(f"out/block0_lmhra{i}", added, OUTPUT)
    file.check("out/block0_attn", sequence_first(blocks["attn"]["o"]["__call__"][0][0]), OUTPUT)
    file.check("out/block0_mlp", sequence_first(blocks["mlp"]["__call__"][0][0]), OUTPUT)
    for i in range(model.depth):
        file.check(f"out/block{i}", sequence_first(blocks["__call__"][0][0][i]), OUTPUT)
    file.check(f"out/{output}", tokens.reshape(cotangent.shape), OUTPUT)
    file.check("out/loss", loss, OUTPUT)
    named = {prefix + name: value for name, value in rules.to_torch(table, grads).items()}
    file.check_all("grad", named | {"in/video": np.asarray(pixels).transpose(0, 4, 1, 2, 3)}, GRADIENT)


def test_vision(read) -> None:
    file = read("vision.npz")
    check_tower(file, tower_of(file.config), clip_video.VISION, "visual_encoder.", "vision_embeds", merged=True)
    for name in ("up", "down"):
        wanted = file[f"out/pos_embed_{name}"]
        file.check(
            f"out/pos_embed_{name}", position_tables.resize_pos_embed(file["in/pos_embed"], len(wanted) - 1), OUTPUT
        )
    still = file["in/conv2d_weight"].transpose(2, 3, 1, 0)[None]  # [1, p, p, 3, D]
    for name in [name for name in file.arrays if name.startswith("out/inflate_")]:
        kind, taps = re.fullmatch(r"out/inflate_(center|mean)_k(\d+)", name).groups()
        clip = temporal.inflate(still, int(taps), spread=kind == "mean")
        file.check(name, clip.transpose(4, 3, 0, 1, 2), OUTPUT)
    file.done()


def test_vision_tds(read) -> None:
    file = read("vision_tds.npz")
    check_tower(file, tower_of(file.config), clip_video.VISION, "visual_encoder.", "vision_embeds", merged=True)
    file.done()


def test_vision_mhra(read) -> None:
    file = read("vision_mhra.npz")
    model = tower_of(
        file.config,
        adapters=1 + file.config["double_lmhra"],
        reduction=file.config["dw_reduction"],
        activation=False,
    )
    check_tower(file, model, clip_video.LINEAR_ADAPTERS, "", "frame_embeds", merged=False)
    file.done()


# Text side and both models.


def test_text(read) -> None:
    """The text path, the vision path, and the fusion encoder without and with a connected layer."""
    file = read("text.npz")
    bert = file.config["bert_config"]
    ids, mask, tokens = file["in/input_ids"], file["in/attention_mask"], file["in/image_embeds"]
    above, common = bert["num_uni_layer"], sizes_of(bert)
    text = Text(depth=bert["text_encoder_layers"] - above, **common, **table_sizes(bert))
    shared = Universal(depth=above, queries=file.config["num_latents"], **common)
    strides = {"fusion": bert["stride_layer"], "fusion_stride": file.config["fusion_stride_variant"]}
    fusions = {name: Fusion(depth=bert["fusion_layers"], stride=stride, **common) for name, stride in strides.items()}
    first = bert["num_hidden_layers"] - bert["fusion_layers"]
    layouts = {
        name: tables.LAYOUTS[
            tables.name_of(
                tables.Form("mplug2", text.depth + above, above, first + fusion.depth, fusion.depth, stride, False)
            )
        ]
        for (name, fusion), stride in zip(fusions.items(), strides.values(), strict=True)
    }

    def init(fusion: Fusion) -> dict:
        key, x, one = jax.random.key(0), jnp.zeros((1, 1, text.width)), jnp.ones((1, 1), jnp.int32)
        of_shared = shared.init(key, x, method="read_video")["params"]
        of_text, of_fusion = text.init(key, one, one)["params"], fusion.init(key, x, one, x)["params"]
        return {"text": of_text, "universal": of_shared, "fusion": of_fusion}

    likes = {name: jax.eval_shape(partial(init, fusion)) for name, fusion in fusions.items()}
    params = {
        name: trees.to_tree(layouts[name].rules, weights_of(file, layouts[name]), like) for name, like in likes.items()
    }
    both = {"text": params["fusion"]["text"], "universal": params["fusion"]["universal"]}
    both |= {name: one["fusion"] for name, one in params.items()}

    def run(params: dict, tokens: np.ndarray) -> tuple[jax.Array, dict]:
        kept = {"capture_intermediates": True, "mutable": "intermediates"}
        below, of_text = text.apply({"params": params["text"]}, ids, mask, **kept)
        of = {"params": params["universal"]}
        states, of_shared = shared.apply(of, below, mask, method="read_text", **kept)
        back, of_video = shared.apply(of, tokens, method="read_video", mutable="intermediates")
        out = {"below": below, "states": states, "back": back, "of": (of_text, of_shared, of_video)}
        total = []
        for name, fusion in fusions.items():
            (video, last), of_fusion = fusion.apply({"params": params[name]}, states, mask, tokens + back, **kept)
            loss = jnp.sum(video * file["in/cotangent_image"])
            total.append(loss + jnp.sum(last * file["in/cotangent_text"] * mask[..., None]))
            out[name] = {"image": video, "text": last, "of": of_fusion["intermediates"]}
        return jnp.stack(total), out

    @jax.jit
    def gradients(params: dict, tokens: np.ndarray) -> tuple:
        total, back, out = jax.vjp(run, params, tokens, has_aux=True)
        return total, out, jax.vmap(back)(jnp.eye(len(fusions)))

    total, out, (grads, of_tokens) = gradients(both, tokens)
    of_text, of_shared, of_video = (part["intermediates"] for part in out["of"])
    file.check("out/text/hidden0", text.apply({"params": both["text"]}, ids, method="embed"), OUTPUT)
    layers = jnp.concatenate([of_text["blocks"]["__call__"][0][0], of_shared["blocks"]["__call__"][0][0]])
    for i, states in enumerate(layers):
        file.check(f"out/text/hidden{i + 1}", states, OUTPUT)
    file.check("out/text/last", out["states"], OUTPUT)
    file.check("out/text_mode_text/last", out["below"], OUTPUT)
    for i, states in enumerate(of_video["video"]):
        file.check(f"out/v_module/layer{text.depth + i}", states, OUTPUT)
    file.check("out/v_module/last", out["back"], OUTPUT)
    file.check("out/fusion_in_image", tokens + out["back"], OUTPUT)
    for number, name in enumerate(fusions):
        of = out[name]["of"]
        for i, states in enumerate(of["layer"] if "layer" in of else of["blocks"]["__call__"][0][0]):
            file.check(f"out/{name}/layer{first + i}", states, OUTPUT)
        file.check(f"out/{name}/image", out[name]["image"], OUTPUT)
        file.check(f"out/{name}/text", out[name]["text"], OUTPUT)
        file.check(f"out/loss_{name}", total[number], OUTPUT)
        own = {part: grads[part] for part in ("text", "universal")} | {"fusion": grads[name]}
        named = rules.to_torch(layouts[name].rules, jax.tree.map(lambda leaf, number=number: leaf[number], own))
        check_gradients(file, named | {"in/image_embeds": of_tokens[number]}, f"grad/{name}")
    file.done()


def test_decoder(read) -> None:
    file = read("decoder.npz")
    bert = file.config["bert_config"]
    decoder = Decoder(depth=bert["text_decode_layers"], **sizes_of(bert), **table_sizes(bert))
    layout = tables.LAYOUTS["mplug2_large"]  # the decoder's names are those of every form
    ids, mask, states = file["in/input_ids"], file["in/attention_mask"], file["in/encoder_hidden_states"]
    seen, alpha = file["in/encoder_attention_mask"].astype(bool), file.config["alpha"]
    init = lambda: decoder.init(jax.random.key(0), ids, states, method=whole)["params"]  # noqa: E731
    params = trees.to_tree(layout.rules, weights_of(file, layout), {"decoder": jax.eval_shape(init)})
    np.testing.assert_array_equal(file["in/labels"], np.where(mask, ids, -100))
    prompt = file.config["prompt_length"]
    masked = np.where(np.arange(ids.shape[1]) < prompt, -100, file["in/labels"])
    np.testing.assert_array_equal(file["in/labels_prompt_masked"], masked)

    def run(params: dict, states: np.ndarray) -> tuple[jax.Array, dict]:
        memory = Memory(states, seen)
        last, kept = decoder.apply(
            {"params": params["decoder"]},
            decoder.apply({"params": params["decoder"]}, ids, method="embed"),
            mask,
            memory=memory,
            capture_intermediates=True,
            mutable="intermediates",
        )
        return decoder.apply({"params": params["decoder"]}, last, method="logits"), kept["intermediates"]

    def mean(params: dict, states: np.ndarray) -> tuple[jax.Array, tuple]:
        logits, kept = run(params, states)
        total, count = losses.next_token(logits[:, :-1], ids, mask)
        return total / count, (logits, kept)

    (loss, (logits, kept)), (grads, of_states) = jax.jit(jax.value_and_grad(mean, argnums=(0, 1), has_aux=True))(
        params, states
    )
    file.check("out/hidden0", kept["embed_norm"]["__call__"][0], OUTPUT)
    for i, layer in enumerate(kept["blocks"]["__call__"][0][0][0]):
        file.check(f"out/hidden{i + 1}", layer, OUTPUT)
    file.check("out/logits", logits, OUTPUT)
    file.check("out/prefix_loss", loss, OUTPUT)
    # The first position is the start token, which is never a target.
    total, count = losses.next_token(logits[:, :-1], ids, mask, np.full(len(ids), prompt - 1))
    file.check("out/prefix_loss_prompt_masked", total / count, OUTPUT)
    targets = losses.target_mask(mask)

    def per_row(each: jax.Array) -> jax.Array:
        return jnp.sum(jnp.where(targets, each, 0), axis=1)

    file.check("out/lm_loss_per_sample", per_row(losses.token_losses(logits[:, :-1], ids[:, 1:])), OUTPUT)
    for name, over_positions in (("refbug", True), ("fixed", False)):
        each = distillation.token_losses(
            logits[:, :-1], ids[:, 1:], file["in/soft_labels"], alpha, over_positions=over_positions
        )
        file.check(f"out/prefix_loss_distill_{name}", jnp.sum(per_row(each)) / jnp.sum(targets), OUTPUT)
        file.check(f"out/lm_loss_distill_{name}", per_row(each), OUTPUT)
    short = file["out/logits_nomask"].shape[1]
    without = jax.jit(lambda params: decoder.apply({"params": params}, ids[:, :short], states, seen, method=whole))
    file.check("out/logits_nomask", without(params["decoder"]), OUTPUT)
    named = rules.to_torch(layout.rules, grads) | {"in/encoder_hidden_states": of_states}
    check_gradients(file, named, "grad/prefix_loss")
    summed = {
        name: value * jnp.sum(targets) for name, value in named.items()
    }  # the mean's, times the number of targets
    check_gradients(file, summed, "grad/lm_loss_sum")
    file.done()


def whole(decoder: Decoder, ids: jax.Array, states: jax.Array, seen: jax.Array | None = None) -> jax.Array:
    """Logits of a text without padding."""
    return decoder.logits(decoder(decoder.embed(ids), memory=Memory(states, seen)))


def hypotheses(file, model: MPLUG2, params: dict, memory: Memory, beams: int) -> decode_past_end.Hypotheses:
    """Search with the reference's rules, from the start token alone."""
    config, decoder, of_decoder = file.config, model.decoder, params["decoder"]

    @jax.jit
    def run(of_decoder: dict, memory: Memory) -> decode_past_end.Hypotheses:
        rows = len(memory.states)
        start = decoder.apply({"params": of_decoder}, np.full((rows, 1), config["start_token"]), method="embed")
        new = config["max_length"]
        state = decode.start(decoder, of_decoder, start, np.ones((rows, 1), bool), new, beams, memory=memory)
        return decode_past_end.search(
            decoder, of_decoder, state, new, config["end_token"], length_power=config["length_penalty_alpha"],
            length_offset=5, least_tokens=config["min_length"],
        )  # fmt: skip

    return run(of_decoder, memory)


def check_search(file, model: MPLUG2, params: dict, memory: Memory) -> None:
    """Ids and scores of all hypotheses, and of the search with one beam."""
    start, padding = file.config["start_token"], file.config["padding_in_ids"]

    def padded(found: decode_past_end.Hypotheses) -> np.ndarray:
        inside = np.arange(found.ids.shape[-1]) < found.lengths[..., None]
        ids = np.where(inside, found.ids, padding)
        return np.concatenate([np.where(found.lengths[..., None] > 0, start, padding), ids], axis=-1)

    def equal(ids: np.ndarray, wanted: np.ndarray) -> None:
        """Stored rows are cut where the longest of them ends."""
        np.testing.assert_array_equal(ids[..., : wanted.shape[-1]], wanted)
        assert (ids[..., wanted.shape[-1] :] == padding).all()

    found = jax.device_get(hypotheses(file, model, params, memory, file.config["beam_size"]))
    count, wanted = file["out/beam_nbest_count"], file["out/beam_nbest_ids"]
    np.testing.assert_array_equal(np.isfinite(found.values).sum(axis=1), count)
    equal(padded(found), wanted)
    there = np.arange(wanted.shape[1]) < count[:, None]
    stored = file["out/beam_nbest_scores"]
    np.testing.assert_allclose(found.values[there], stored[there], rtol=OUTPUT, atol=OUTPUT)
    if "out/beam_best_ids" in file.arrays:
        equal(padded(found)[:, 0], file["out/beam_best_ids"])
        file.check("out/beam_best_score", found.values[:, 0], OUTPUT)
    found, wanted = jax.device_get(hypotheses(file, model, params, memory, 1)), file["out/greedy_ids"]
    equal(padded(found)[:, 0], wanted)
    file.check("out/greedy_score", found.values[:, 0], OUTPUT)


def check_caption(file, prompt: int) -> dict:
    """Loss, gradients and generation of a captioning model; returns what the video encoder computes inside."""
    model, params, named_of = loaded(file)
    model = model.clone(reads=False)
    params = {name: part for name, part in params.items() if name not in ("text", "fusion")}
    like = jax.eval_shape(lambda: mplug2.init(model, jax.random.key(0)))
    assert jax.tree.structure(like) == jax.tree.structure(params), "the parts that captioning uses"
    ids, mask, video = file["in/caption_ids"], file["in/caption_mask"], channels_last(file["in/video"])

    def loss(params: dict) -> tuple[jax.Array, tuple]:
        tokens, kept = encoded(model, params, video)
        states = model.apply({"params": params}, ids, mask, Memory(tokens), method="decode")
        logits = model.apply({"params": params}, states, method="logits")
        mean = caption.caption_loss(model, params, video, ids, mask, prompt, None)
        return mean.total / mean.weight, (tokens, logits, kept)

    (total, (tokens, logits, kept)), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(params)
    file.check("out/logits", logits, OUTPUT)
    file.check("out/loss", total, OUTPUT)
    check_gradients(file, named_of(grads))
    check_search(file, model, params, Memory(tokens))
    return {"tokens": tokens, **kept}


def test_caption(read) -> None:
    file = read("caption.npz")
    kept = check_caption(file, int(file["out/prompt_length"]) - 1)
    file.check("out/clip_embeds", kept["vision"]["__call__"][0], OUTPUT)
    if "out/visn_projected" in file.arrays:
        file.check("out/visn_projected", kept["connector"]["__call__"][0], OUTPUT)
    file.check("out/visual_states", kept["tokens"], OUTPUT)
    file.done()


def test_youku_caption(read) -> None:
    file = read("youku_caption.npz")
    kept = check_caption(file, 0)
    file.check("out/image_embeds_raw", kept["vision"]["__call__"][0], OUTPUT)
    file.done()


def test_cls(read) -> None:
    file = read("cls.npz")
    model, params, named_of = loaded(file)
    ids, mask, video = file["in/text_ids"], file["in/text_mask"], channels_last(file["in/video"])

    def loss(params: dict) -> tuple[jax.Array, dict]:
        run = model.bind({"params": params})
        tokens, kept = encoded(model, params, video)
        states = run.encode_text(ids, mask)
        _, fused = run.fuse(states, mask, tokens)
        votes = run.classify(fused)
        total, count = losses.classification(votes, file["in/labels"], np.ones(len(ids), bool))
        return total / count, {"tokens": tokens, "states": states, "fused": fused, "votes": votes, **kept}

    (total, out), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(params)
    file.check("out/image_embeds_raw", out["vision"]["__call__"][0], OUTPUT)
    for name, ours in (("image_embeds", "tokens"), ("text_embeds", "states"), ("fusion_text", "fused")):
        if f"out/{name}" in file.arrays:
            file.check(f"out/{name}", out[ours], OUTPUT)
    file.check("out/logits", out["votes"], OUTPUT)
    file.check("out/loss", total, OUTPUT)
    check_gradients(file, named_of(grads))
    file.done()


def test_vqa(read) -> None:
    file = read("vqa.npz")
    model, params, named_of = loaded(file)
    questions, mask = jnp.asarray(file["in/question_ids"]), jnp.asarray(file["in/question_mask"])
    video = jnp.asarray(channels_last(file["in/video"]))
    answers, of_answers = file["in/answer_ids"], file["in/answer_mask"]
    each = np.repeat(np.arange(len(questions)), file["in/answers_per_question"])

    def loss(params: dict) -> tuple[jax.Array, dict]:
        run = model.bind({"params": params})
        tokens, kept = encoded(model, params, video)
        seen, fused = run.fuse(run.encode_text(questions, mask), mask, tokens)
        memory = mplug2.memory_of(seen, fused, mask)
        logits = run.logits(run.decode(answers, of_answers, jax.tree.map(lambda x: x[each], memory)))

        def one(question: jax.Array, words: jax.Array, told: jax.Array) -> jax.Array:
            row = {"ids": questions[question][None], "mask": mask[question][None], "answer": words[None]}
            return answer.answer_loss(model, params, video[question][None], row, told[None], None)[0]

        rows = jax.vmap(one)(jnp.asarray(each), jnp.asarray(answers), jnp.asarray(of_answers))
        total = jnp.sum(rows * file["in/answer_weights"]) / len(questions)
        return total, {"tokens": tokens, "seen": seen, "fused": fused, "memory": memory, "logits": logits, **kept}

    (total, out), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(params)
    file.check("out/clip_embeds", out["vision"]["__call__"][0], OUTPUT)
    for name, ours in (("visual_states", "tokens"), ("fusion_image", "seen"), ("fusion_text", "fused")):
        file.check(f"out/{name}", out[ours], OUTPUT)
    file.check("out/logits", out["logits"], OUTPUT)
    file.check("out/loss", total, OUTPUT)
    check_gradients(file, named_of(grads))
    check_search(file, model, params, out["memory"])
    candidates, of_candidates = file["in/candidate_ids"], file["in/candidate_mask"]
    rank = jax.jit(decode_answers.rank, static_argnums=(0, 5))
    ranked = rank(model.decoder, params["decoder"], out["memory"], candidates, of_candidates, file.config["k_test"])
    np.testing.assert_array_equal(ranked.answers, file["out/rank_ids"])
    file.check("out/rank_probs", ranked.probabilities, OUTPUT)
    file.done()


# Pre-training and retrieval: a momentum teacher, queues and one training step.


def teacher_of(file, params: dict, layout) -> dict:
    """The momentum weights of a file, as stored: before the step."""
    weights = {
        re.sub(r"^(\w+)_m\.", r"\1.", name): value
        for name, value in file.group("param").items()
        if re.match(r"\w+_m\.", name)
    }
    parts = {name.partition(".")[0] for name in weights}
    entries = rules.expand(layout.rules, params)
    used = {name for name in entries if name.partition(".")[0] in parts}
    paths = {path for name in used for path in entries[name].rule.targets if path}
    like = state.unflatten({path: leaf for path, leaf in state.flatten(params).items() if path in paths})
    return trees.to_tree(layout.rules, {name: weights[name] for name in used}, like)


def taken(file, clip: np.ndarray | None) -> dict:
    """The queue before the step."""
    slots = file.config["queue_size"]
    ids = file["in/idx_queue"].T if clip is not None else np.full((slots, 1), momentum.NOBODY, np.int32)
    return {
        "video": jnp.asarray(file["in/image_queue"].T),
        "text": jnp.asarray(file["in/text_queue"].T),
        "clip": jnp.asarray(ids),
        "next": jnp.asarray(file["in/queue_ptr"][0]),
    }


def check_step(file, more: Callable[..., tuple[jax.Array, dict]], shown: np.ndarray | None) -> dict[str, jax.Array]:
    """Teacher, queue, contrastive and matching loss and all gradients; `more` adds losses of the step and what they compute."""
    model, params, named_of = loaded(file)
    layout = tables.LAYOUTS[planned(file).layout]
    video, valid = channels_last(file["in/video"]), np.ones(len(file["in/video"]), bool)
    clip = file["in/idx"][:, None] if "in/idx" in file.arrays else None
    batch = {"ids": file["in/text_ids"], "mask": file["in/text_mask"], "valid": valid}
    batch["clip"] = np.arange(len(valid), dtype=np.int32)[:, None] if clip is None else clip
    queue, share = taken(file, clip), file["in/alpha"]
    # The reference forgets the fusion encoder of its teacher.
    old = teacher_of(file, params, layout)
    teacher = momentum.moved(old, params, joint.COEFFICIENT, fixed=joint.READS)
    everything = momentum.moved(old, params, joint.COEFFICIENT)
    assert not np.array_equal(
        everything["fusion"]["blocks"]["attn"]["q"]["kernel"], teacher["fusion"]["blocks"]["attn"]["q"]["kernel"]
    )
    after = {re.sub(r"^(\w+?)\.", r"\1_m.", name): value for name, value in named_of(teacher).items()}
    file.check_all("out/ema", after, OUTPUT)
    negatives = Negatives(file["in/neg_image_idx"], file["in/neg_text_idx"], valid)

    def loss(params: dict) -> tuple[jax.Array, dict]:
        whole = joint.completed(teacher, params)
        seen, of_teacher = model.apply({"params": whole}, video, batch, shown, method=joint.taught, **KEPT)
        out, inside = model.apply(
            {"params": params}, video, batch, seen, queue, share, key=None, group=len(valid), negatives=negatives,
            same_clip=clip is not None, shown=shown, method=joint.forward, **KEPT,
        )  # fmt: skip
        total, metrics = joint.pair_metrics(out, valid)
        added, rest = more(model, params, whole, batch, out, seen, share)
        found = {"out": out, "seen": seen, "metrics": metrics, "inside": inside["intermediates"], **rest}
        return total + added, {**found, "of_teacher": of_teacher["intermediates"]}

    (_, found), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(params)
    for suffix, states, inside in (("", found["out"], found["inside"]), ("_m", found["seen"], found["of_teacher"])):
        file.check(f"out/image_embeds_raw{suffix}", inside["vision"]["__call__"][0], OUTPUT)
        file.check(f"out/text_embeds{suffix}", states["states"], OUTPUT)
        if shown is not None:
            file.check(f"out/text_embeds{suffix}#1", inside["text"]["__call__"][1], OUTPUT)
        for part in ("vision_proj", "text_proj"):
            file.check(f"out/{part}{suffix}", inside[part]["__call__"][0], OUTPUT)
    if "out/image_embeds" in file.arrays:
        file.check("out/image_embeds", found["out"]["tokens"], OUTPUT)
    file.check("out/temp_after_clamp", found["out"]["temperature"], OUTPUT)
    file.check("out/loss_vtc", losses.ratio(found["metrics"]["contrastive_loss"]), OUTPUT)
    file.check("out/loss_vtm", losses.ratio(found["metrics"]["matching_loss"]), OUTPUT)
    file.check("out/itm_logits", found["out"]["match"].swapaxes(0, 1).reshape(-1, 2), OUTPUT)
    full = momentum.enqueue(queue, found["seen"]["video"], found["seen"]["text"], batch["clip"], valid)
    file.check("out/image_queue_after", full["video"].T, OUTPUT)
    file.check("out/text_queue_after", full["text"].T, OUTPUT)
    np.testing.assert_array_equal(file["out/queue_ptr_after"][0], full["next"])
    if clip is not None:
        np.testing.assert_array_equal(file["out/idx_queue_after"], full["clip"].T)
    named = named_of(grads)
    # The reference gives padding no gradient. Only its logarithm over positions looks at padding.
    table = "text_encoder.embeddings.word_embeddings.weight"
    assert not file.arrays[f"grad/{table}"][0].any()
    check_gradients(file, named | {table: np.concatenate([np.zeros_like(named[table][:1]), named[table][1:]])})
    return found


def test_retrieval(read) -> None:
    file = read("retrieval.npz")
    check_step(file, lambda *_: (jnp.float32(0), {}), None)
    file.done()


def test_pretrain(read) -> None:
    file = read("pretrain.npz")
    shown, labels = file["in/mlm_input_ids"], file["in/mlm_labels"]
    told, ids = labels >= 0, np.maximum(labels, 0)
    np.testing.assert_array_equal(ids[told], file["in/text_ids"][told])
    continuing = {
        "prefix": "prefix_ids",
        "prefix_mask": "prefix_mask",
        "target": "target_ids",
        "target_mask": "target_mask",
    }
    pairs = {ours: file[f"in/{name}"] for ours, name in continuing.items()}

    def mean(each: jax.Array) -> jax.Array:
        return jnp.sum(jnp.where(told, each, 0)) / told.sum()

    def more(model: MPLUG2, params: dict, teacher: dict, batch: dict, out: dict, seen: dict, share: float) -> tuple:
        def run(params: dict, method: Callable, *arguments, **how) -> Any:
            return model.apply({"params": params}, *arguments, method=method, **how)

        logits, taught = (
            run(owner, MPLUG2.words, states) for owner, states in ((params, out["masked"]), (teacher, seen["masked"]))
        )
        soft = jax.nn.softmax(taught, axis=-1)
        # The reference takes the logarithm over positions, and its gradients are those of that loss.
        masked = mean(distillation.token_losses(logits, ids, soft, share, over_positions=True))
        fixed = joint.masked_words(model, params, teacher, out["masked"], seen["masked"], ids, told, share)[0]
        hard = joint.masked_words(model, params, None, out["masked"], None, ids, told, share)[0]
        (states, inside), (of_teacher, inside_teacher) = (
            run(owner, joint.continued, part["tokens"], batch | pairs, **KEPT)
            for owner, part in ((params, out), (teacher, seen))
        )
        prefix, _ = joint.prefix_words(model, params, states, batch | pairs)
        return masked + prefix, {
            "loss_mlm": masked, "loss_mlm_distill_fixed": fixed, "loss_mlm_hard": hard, "loss_prefix": prefix,
            "mlm_logits": logits, "mlm_logits_m": taught,
            "prefix_logits": run(params, MPLUG2.logits, states),
            "prefix_logits_m": run(teacher, MPLUG2.logits, of_teacher),
            "text_embeds#2": inside["intermediates"]["text"]["__call__"][0],
            "text_embeds_m#2": inside_teacher["intermediates"]["text"]["__call__"][0],
        }  # fmt: skip

    found = check_step(file, more, shown)
    names = [name.removeprefix("out/") for name in sorted(file.unused) if name.startswith("out/")]
    for name in names:
        file.check(f"out/{name}", found[name], OUTPUT)
    file.done()


def test_schedule(read) -> None:
    """The reference sets the rate of an iteration from the count before it, so the rate lags by one iteration."""
    file = read("schedule.npz")
    config = file.config
    total = config["epochs"] * config["per"]
    for group, peak in (("text", config["lr1"]), ("visual", config["lr2"])):
        settings = Optim(lr=peak, min_lr=config["minlr"], warmup_lr=config["wlr"], schedule="mplug2")
        rate = optim.schedule(settings, warmup=config["warm"], total=total)
        # Captioning rewinds the schedule at every hundredth iteration of the first epoch, which a run here does not.
        rewound = [i // 100 if i % 100 == 0 and i < config["per"] else i for i in range(total)]
        for name, counts in (("qa_step1", range(total)), ("caption_step100", rewound)):
            rates = 1e6 * rate(jnp.array([0, *counts][:-1]))
            file.check(f"out/{name}/lr_{group}", rates, OUTPUT)
    file.done()
