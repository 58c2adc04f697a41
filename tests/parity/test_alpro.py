"""The parts of ALPRO equal stored outputs of the PyTorch reference; one test for each fixture file."""

import json
import re
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import trees
from configs.alpro import recipe
from ymplug_jax.convert import alpro as alpro_tables
from ymplug_jax.convert import bert as tables
from ymplug_jax.convert import mplug_video as vision_tables
from ymplug_jax.convert import plan as plans
from ymplug_jax.convert import rules
from ymplug_jax.core import optim, state
from ymplug_jax.core.config import Optim
from ymplug_jax.data import frames, text
from ymplug_jax.models import alpro, attention, bert, position_tables
from ymplug_jax.models.alpro import ALPRO
from ymplug_jax.models.bert import Fusion, MaskedHead, Text
from ymplug_jax.models.timesformer import TimeSformer
from ymplug_jax.tasks.alpro import encode_pairs, pretrain, prompter, retrieve
from ymplug_jax.tasks.common import losses, matching, pair_losses, preprocess, task_metrics

OUTPUT, GRADIENT = 1e-5, 1e-4


@pytest.fixture(autouse=True)
def exact_products() -> Iterator[None]:
    with jax.default_matmul_precision("highest"):
        yield


def halves(config: dict) -> tuple[Text, Fusion]:
    common = {
        "heads": config["num_attention_heads"],
        "hidden": config["intermediate_size"],
        "ln_eps": config["layer_norm_eps"],
    }
    text = Text(
        vocab=config["vocab_size"],
        width=config["hidden_size"],
        depth=config["fusion_layer"],
        max_positions=config["max_position_embeddings"],
        types=config["type_vocab_size"],
        **common,
    )
    return text, Fusion(depth=config["num_hidden_layers"] - text.depth, **common)


def test_text_encoder(read) -> None:
    file = read("text_encoder.npz")
    text, fusion = halves(file.config["bert_config"])
    weights = file.group("param")
    for copy, original in tables.TIED:
        np.testing.assert_array_equal(weights.pop(copy), weights[original])
    params = trees.to_tree(tables.BERT, weights, tables.like_of(text, fusion, head=True))
    ids, mask, both = file["in/input_ids"], file["in/attention_mask"], file["in/fusion_mask"]
    length = ids.shape[1]

    def run(params: dict) -> tuple[jax.Array, dict]:
        kept = {"capture_intermediates": True, "mutable": "intermediates"}
        states, of_text = text.apply({"params": params["text"]}, ids, mask, **kept)
        joint = jnp.concatenate([states, file["in/video_embeds"]], axis=1)
        last, of_fusion = fusion.apply({"params": params["fusion"]}, joint, both, **kept)
        logits = MaskedHead(text.ln_eps).apply(
            {"params": params["mlm"]}, last[:, :length], params["text"]["token_embed"]
        )
        out = {"text": states, "fusion": last, "logits": logits}
        out |= {"of_text": of_text["intermediates"]["blocks"], "of_fusion": of_fusion["intermediates"]["blocks"]}
        return jnp.mean(logits * file["in/grad_probe"]), out

    (loss, out), grads = jax.jit(jax.value_and_grad(run, has_aux=True))(params)
    file.check("out/embeddings", text.apply({"params": params["text"]}, ids, method="embed"), OUTPUT)
    for name in ("text", "fusion"):
        states = jax.tree.leaves(out[f"of_{name}"]["__call__"])[0]
        for i in range(len(states)):
            file.check(f"out/{name}_layer{i}", states[i], OUTPUT)
        file.check(f"out/{name}_last", out[name], OUTPUT)
    q, k = (out["of_text"]["attn"][part]["__call__"][0][0] for part in "qk")
    one_hot = jnp.broadcast_to(jnp.eye(length)[:, None], (*k.shape[:3], length))
    bias = (1 - mask[:, None, None]) * bert.HIDDEN
    file.check("out/text_attn0", attention.attend(q, k, one_hot, bias=bias).transpose(0, 2, 1, 3), OUTPUT)
    file.check("out/extended_mask", (1 - both[:, None, None]) * bert.HIDDEN, OUTPUT)
    file.check("out/mlm_logits", out["logits"], OUTPUT)
    alone = fusion.apply({"params": params["fusion"]}, out["text"], mask)
    file.check("out/all_layers_text_only_last", alone, OUTPUT)
    file.check("loss/probe", loss, OUTPUT)
    named = rules.to_torch(tables.BERT, grads)
    file.check(
        "grad_norm/global", np.sqrt(sum(np.sum(np.square(v, dtype=np.float64)) for v in named.values())), GRADIENT
    )
    key_bias = "bert.encoder.layer.0.attention.self.key.bias"  # its gradient is 0 up to rounding
    noise = max(np.abs(named[key_bias]).max(), np.abs(file.arrays.pop(f"grad/{key_bias}")).max())
    assert noise < 1e-6 * file["grad_norm/global"]
    file.unused.discard(f"grad/{key_bias}")
    file.check_all("grad", named, GRADIENT)
    np.testing.assert_array_equal(file["buffer/bert.embeddings.position_ids"][0], np.arange(text.max_positions))
    file.done()


def pooled(tokens: jax.Array, frames: int) -> jax.Array:
    """Average over the frames as ALPRO does, [B, 1 + T * P, D] -> [B, 1 + P, D]."""
    b, _, d = tokens.shape
    return jnp.concatenate([tokens[:, :1], tokens[:, 1:].reshape(b, frames, -1, d).mean(axis=1)], axis=1)


def patch_major(tokens: jax.Array, frames: int) -> jax.Array:
    """Reorder tokens from frame-major to patch-major, the order of two files."""
    b, _, d = tokens.shape
    moved = tokens[:, 1:].reshape(b, frames, -1, d).swapaxes(1, 2).reshape(b, -1, d)
    return jnp.concatenate([tokens[:, :1], moved], axis=1)


def check_video_encoder(file, table: tuple, video: np.ndarray, *, salesforce: bool = False) -> None:
    visual = file.config["visual_cfg"]
    t = visual["num_frames"]
    model = TimeSformer(
        image_size=visual["img_size"],
        patch_size=visual["patch_size"],
        depth=visual["depth"],
        width=visual["embed_dim"],
        heads=visual["num_heads"],
        mlp_ratio=visual["mlp_ratio"],
        frames=t,
        clip=visual.get("clip_model", False),
    )
    like = jax.eval_shape(lambda key: model.init(key, video), jax.random.key(0))["params"]
    weights = {name: value for name, value in file.group("param").items() if not name.startswith("model.head.")}
    params = trees.to_tree(table, weights, like)

    def run(params: dict) -> tuple[jax.Array, dict]:
        tokens, kept = model.apply({"params": params}, video, capture_intermediates=True, mutable="intermediates")
        pool = pooled(tokens, t)
        return jnp.sum(pool * file["in/grad_probe"]), {"tokens": tokens, "pooled": pool, **kept["intermediates"]}

    (loss, out), grads = jax.jit(jax.value_and_grad(run, has_aux=True))(params)
    file.check("loss/probe", loss, OUTPUT)
    file.check("out/pooled_tokens", out["pooled"], OUTPUT)
    x, cls = out["blocks"]["__call__"][0][0]  # [layers, B, T, P, D], [layers, B, D]
    attended = {name: out["blocks"][f"{name}attn"] for name in ("temporal_", "")}
    b, _, p, d = x.shape[1:]
    if salesforce:
        file.check("out/tokens_patch_major", patch_major(out["tokens"], t), OUTPUT)
        spatial = out["tokens"][:, 1:].reshape(b, t, p, d).mean(axis=2)
        file.check("out/spatial_pooled_tokens", jnp.concatenate([out["tokens"][:, :1], spatial], axis=1), OUTPUT)
        for i in range(model.depth):
            block = jnp.concatenate([cls[i][:, None], x[i].reshape(b, -1, d)], axis=1)
            file.check(f"out/block{i}", patch_major(block, t), OUTPUT)
        # The reference resizes tables by nearest neighbour; ours resizes converted tables bilinearly, so they differ.
        for name in list(file.unused):
            if "embed_" in name or "other_size" in name:
                file.unused.discard(name)
    else:
        file.check("out/tokens", out["tokens"], OUTPUT)
        file.check("out/cls", out["tokens"][:, 0], OUTPUT)
        file.check("out/patch_embed", out["patch"]["__call__"][0], OUTPUT)
        if model.clip:
            norm_x, norm_cls = out["norm_pre"]["__call__"]
            file.check("out/norm_pre", jnp.concatenate([norm_cls[:, None], norm_x.reshape(b, -1, d)], axis=1), OUTPUT)
        for i in range(model.depth):
            file.check(f"out/block{i}_patches", x[i], OUTPUT)
            file.check(f"out/block{i}_cls", cls[i], OUTPUT)
        temporal = attended["temporal_"]["o"]["__call__"][0][0]  # [B, T, P, D] or [B, P, T, D]
        temporal = temporal.swapaxes(1, 2) if temporal.shape[1:3] == (t, p) else temporal
        file.check("out/block0_temporal_attn", temporal.reshape(b * p, t, d), OUTPUT)
        file.check("out/block0_spatial_attn", attended[""]["o"]["__call__"][0][0], OUTPUT)
        mlp_x, mlp_cls = (y[0] for y in out["blocks"]["mlp"]["__call__"])
        whole = jnp.concatenate([mlp_cls[:, None], mlp_x.reshape(b, -1, d)], axis=1)
        file.check("out/block0_mlp", patch_major(whole, t), OUTPUT)
        for way in ("up", "down"):
            if f"in/pos_embed_{way}" in file.arrays:
                expected = file[f"out/pos_embed_{way}"].shape[1] - 1
                found = position_tables.resize_pos_embed(jnp.asarray(file[f"in/pos_embed_{way}"][0]), expected)
                file.check(f"out/pos_embed_{way}", found[None], OUTPUT)
                expected = file[f"out/temporal_embed_{way}"].shape[1]
                found = position_tables.resize_temporal_embed(
                    jnp.asarray(file[f"in/temporal_embed_{way}"][0]), expected
                )
                file.check(f"out/temporal_embed_{way}", found[None], OUTPUT)
    named = rules.to_torch(table, grads)
    check_gradients(file, named)
    file.done()


def check_gradients(file, named: dict[str, np.ndarray]) -> None:
    """Check stored gradients and their global norm. Key biases, which this package does not have, get none."""
    squares = sum(np.sum(np.square(value, dtype=np.float64)) for value in named.values())
    file.check("grad_norm/global", np.sqrt(squares), GRADIENT)
    for name in [name for name in file.arrays if name.endswith("qkv.bias") and name.startswith("grad/")]:
        third = len(file.arrays[name]) // 3
        noise = np.abs(file.arrays[name][third : 2 * third]).max()
        assert noise < 1e-6 * file["grad_norm/global"], name
        file.arrays[name] = np.where(np.arange(3 * third) // third == 1, 0, file.arrays[name])
    file.check_all("grad", named, GRADIENT)


def test_video_encoder(read) -> None:
    file = read("video_encoder.npz")
    check_video_encoder(file, vision_tables.TIMESFORMER, channels_last(file["in/video"]))


def test_video_encoder_clip(read) -> None:
    file = read("video_encoder_clip.npz")
    check_video_encoder(file, vision_tables.TIMESFORMER, channels_last(file["in/video"]))


def test_video_encoder_sf(read) -> None:
    file = read("video_encoder_sf.npz")
    table = rules.under("model.", "", alpro_tables.SALESFORCE_TIMESFORMER)
    check_video_encoder(file, table, channels_last(file["in/video"]), salesforce=True)


def channels_last(video: np.ndarray) -> np.ndarray:
    """[B, 3, T, S, S] -> [B, T, S, S, 3]."""
    return video.transpose(0, 2, 3, 4, 1)


def frames_first(video: np.ndarray) -> np.ndarray:
    """[B, T, 3, S, S] -> [B, T, S, S, 3]."""
    return video.transpose(0, 1, 3, 4, 2)


def loaded(file, **more) -> tuple[ALPRO, dict, tuple]:
    """Model, parameters and name table of a file, through the converter."""
    weights = file.group("param")
    shapes = {name: value.shape for name, value in weights.items()}
    for name in ("video_prompt_feat", "prompter.video_prompt_feat"):
        if f"buffer/{name}" in file.arrays:
            shapes[name] = file[f"buffer/{name}"].shape
            weights[name] = file[f"buffer/{name}"]
    heads = {
        "text": file.config["bert_config"]["num_attention_heads"],
        "vision": file.config["visual_cfg"]["num_heads"],
    }
    found = alpro_tables.plan(shapes, heads, file.config["bert_config"]["fusion_layer"])
    layout = alpro_tables.LAYOUTS[found.layout]
    for copy, original in layout.tied:
        if copy in weights:
            np.testing.assert_array_equal(weights.pop(copy), weights[original])
    kept = {n: w for n, w in weights.items() if not any(re.fullmatch(pattern, n) for pattern in layout.drop)}
    for name in list(file.unused):
        if name.endswith("position_ids"):
            np.testing.assert_array_equal(
                file[name][0], np.arange(file.config["bert_config"]["max_position_embeddings"])
            )
    file.unused -= {f"buffer/{n}" for n in ("video_prompt_feat", "image_prompt_feat", "prompter.image_prompt_feat")}
    return found.model.clone(**more), trees.to_tree(layout.rules, kept, found.like), layout.rules


def named_gradients(table: tuple, grads: dict) -> dict[str, np.ndarray]:
    return rules.to_torch(table, grads)


def negatives_of(file) -> pair_losses.Negatives:
    videos, texts = file["in/neg_video_idx"], file["in/neg_text_idx"]
    return pair_losses.Negatives(videos, texts, jnp.ones(len(videos), bool))


def check_pairs(file, out: dict, labels_of_valid: np.ndarray) -> None:
    """Check all stored outputs of a pass: vectors, similarities, weights of the draw, fused states, match logits."""
    file.check("out/video_feat", out["video"], OUTPUT)
    file.check("out/text_feat", out["text"], OUTPUT)
    file.check("out/text_embeds", out["states"], OUTPUT)
    if "out/video_embeds" in file.arrays:
        file.check("out/video_embeds", out["tokens"], OUTPUT)
    scores = out["video"] @ out["text"].T / out["temperature"]
    file.check("out/sim_v2t", scores, OUTPUT)
    file.check("out/sim_t2v", scores.T, OUTPUT)
    b = len(scores)
    free = pair_losses.allowed(jnp.ones(b, bool), None, b)
    logits = pair_losses.negative_logits(out["video"], out["text"], out["temperature"], free)
    for way, found in zip(("t2v", "v2t"), logits, strict=True):
        expected = file[f"out/neg_weights_{way}"]
        np.testing.assert_array_equal(np.diagonal(expected), 0)
        np.testing.assert_allclose(
            jax.nn.softmax(found[0], axis=-1), expected / expected.sum(axis=1, keepdims=True), rtol=1e-4, atol=1e-6
        )
    fused = out["fused"]
    file.check("out/fusion_pos", fused[:, 0], OUTPUT)
    file.check("out/fusion_neg", jnp.concatenate([fused[:, 1], fused[:, 2]]), OUTPUT)
    file.check("out/vtm_logits", out["match"].swapaxes(0, 1).reshape(3 * b, 2), OUTPUT)
    np.testing.assert_array_equal(file["out/vtm_labels"], np.repeat(labels_of_valid, b))


def batch_of(file) -> dict[str, np.ndarray]:
    ids = file["in/input_ids"]
    return {"ids": ids, "mask": file["in/attention_mask"], "valid": np.ones(len(ids), bool)}


def check_masking(file, never: tuple[int, ...]) -> tuple[jax.Array, jax.Array]:
    """Shown ids and selected positions from the recorded draws."""
    draws = pair_losses.Masking(
        *(file[f"in/mlm_draw_{name}"].astype(bool) for name in ("mask", "replace", "random")),
        file["in/mlm_random_words"],
    )
    shown, told = pair_losses.mask_words(file["in/input_ids"], draws, never, file.config["special_ids"]["mask"])
    np.testing.assert_array_equal(shown, file["out/mlm_input_ids"])
    np.testing.assert_array_equal(jnp.where(told, file["in/input_ids"], -100), file["out/mlm_labels"])
    return shown, told


def pass_of(file, model: ALPRO, params: dict, video: np.ndarray, told_shown: tuple | None = None) -> dict:
    run, batch = model.bind({"params": params}), batch_of(file)
    shown = None if told_shown is None else told_shown[0]
    return encode_pairs.forward(
        run, video, batch, key=None, group=len(video), negatives=negatives_of(file), shown=shown
    )


def test_pretrain(read) -> None:
    file = read("pretrain.npz")
    model, params, table = loaded(file)
    video, special = channels_last(file["in/video"]), file.config["special_ids"]
    told_shown = check_masking(file, (special["pad"], special["cls"]))

    def loss(params: dict) -> tuple[jax.Array, tuple]:
        out = pass_of(file, model, params, video, told_shown)
        total, found = pretrain.total(
            model, params, batch_of(file), out, told_shown[1], None, keep_logits=False, reference_entities=False
        )
        return total, (out, found)

    (total, (out, found)), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(params)
    check_pairs(file, out, np.array([1, 0, 0]))
    run, length = model.bind({"params": params}), file["in/input_ids"].shape[1]
    file.check("out/video_tokens", run.vision(video), OUTPUT)
    file.check("out/mlm_text_embeds", run.encode_text(told_shown[0], file["in/attention_mask"]), OUTPUT)
    file.check("out/mlm_fusion", out["fused"][:, 3], OUTPUT)
    file.check("out/mlm_logits", run.words(out["fused"][:, 3, :length]), OUTPUT)
    for name, ours in (("vtc", "contrastive"), ("vtm", "matching"), ("mlm", "masked")):
        file.check(f"loss/{name}", found[f"{ours}_loss"].value(), OUTPUT)
    file.check("loss/total", total, OUTPUT)
    check_gradients(file, named_gradients(table, grads))
    file.done()


def test_pretrain_sf(read) -> None:
    file = read("pretrain_sf.npz")
    model, params, table = loaded(file)
    config, special = file.config, tuple(file.config["special_ids"].values())
    video, pixels = frames_first(file["in/visual_inputs"]), frames_first(file["in/frames_uint8"])
    file.check("in/visual_inputs", preprocess.normalize(pixels, "float32").transpose(0, 1, 4, 2, 3), OUTPUT)
    patch, side = model.vision.patch_size, model.vision.image_size // model.vision.patch_size
    box = file["in/erase_box_top_left_h_w"] // patch
    assert (box * patch == file["in/erase_box_top_left_h_w"]).all()
    np.testing.assert_array_equal(1 - pair_losses.inside_of(box, side), file["in/mpm_mask"])
    seen = pair_losses.inside_of(box * patch, side * patch)[:, None, :, :, None]
    crop = preprocess.normalize(jnp.where(seen, pixels, 0), "float32")
    file.check("in/crop_visual_inputs", crop.transpose(0, 1, 4, 2, 3), OUTPUT)

    teacher, of_teacher = alpro.prompter_of(model), params["prompter"]
    for kind in ("video", "image"):
        features = prompter.entity_features(
            teacher, of_teacher, file[f"in/{kind}_prompt_ids"], file[f"in/{kind}_prompt_mask"], config["num_entities"]
        )
        file.check(f"out/{kind}_prompt_feat", features, OUTPUT)
        file.unused.discard(f"buffer/prompter.{kind}_prompt_feat")
    file.check("out/video_prompt_feat", of_teacher["entities"], OUTPUT)
    run = teacher.bind({"params": of_teacher})
    file.check("out/prompter_video_feat", run.embed_video(run.encode_video(crop)), OUTPUT)
    assert float(of_teacher["temperature"]) == pytest.approx(config["prompter_temp"])
    targets = pretrain.teach(model, of_teacher, pixels, box)
    file.check("out/mpm_soft_labels", targets, OUTPUT)
    np.testing.assert_array_equal(jnp.argmax(targets, axis=-1) == 0, file["out/mpm_ignore"])
    # Batches of still images are compared with the features of the image prompts; the flag decides row by row.
    with_stills = of_teacher | {"image_entities": file["out/image_prompt_feat"]}
    units = jax.nn.softmax(
        file["out/prompter_video_feat"] @ file["out/image_prompt_feat"].T / config["prompter_temp"], axis=-1
    )
    for still in (np.ones(len(box), bool), np.arange(len(box)) % 2 == 0, np.zeros(len(box), bool)):
        found = pretrain.teach(model, with_stills, pixels, box, still)
        np.testing.assert_allclose(found, np.where(still[:, None], units, targets), rtol=OUTPUT, atol=OUTPUT)
    assert np.abs(units - targets).max() > 100 * OUTPUT, "the two sets of prompts differ"

    told_shown = check_masking(file, special)
    select = np.where(np.isin(file["in/input_ids"], special), 0, config["mlm_probability"])
    file.check("out/mlm_probability_matrix", select, OUTPUT)
    student = {name: part for name, part in params.items() if name != "prompter"}

    def loss(student: dict) -> tuple[jax.Array, tuple]:
        whole, batch = student | {"prompter": of_teacher}, batch_of(file) | {"box": box}
        out = pass_of(file, model, whole, video, told_shown)
        total, found = pretrain.total(
            model, whole, batch, out, told_shown[1], targets, keep_logits=False, reference_entities=True
        )
        return total, (out, found)

    (total, (out, found)), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(student)
    check_pairs(file, out, np.array([1, 0, 0]))
    run, length = model.bind({"params": params}), file["in/input_ids"].shape[1]
    file.check("out/mlm_fusion", out["fused"][:, 3], OUTPUT)
    file.check("out/mlm_logits", run.words(out["fused"][:, 3, :length]), OUTPUT)
    file.check("out/mpm_logits", run.entity_logits(out["fused"][:, 0], pretrain.inside(model, box)), OUTPUT)
    for name, ours in (("vtc", "contrastive"), ("vtm", "matching"), ("mlm", "masked"), ("mpm", "entity")):
        file.check(f"loss/{name}", found[f"{ours}_loss"].value(), OUTPUT)
    file.check("loss/total", total, OUTPUT)
    zeros = jax.tree.map(np.zeros_like, of_teacher)
    check_gradients(file, named_gradients(table, grads | {"prompter": zeros}))
    file.done()


def test_prompter_sf(read) -> None:
    file = read("prompter_sf.npz")
    model, params, table = loaded(file)
    video, batch = frames_first(file["in/visual_inputs"]), batch_of(file)

    def loss(params: dict) -> tuple[jax.Array, dict]:
        return prompter.contrastive(model, params, video, batch, None)

    (total, out), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(params)
    scores = out["video"] @ out["text"].T / out["temperature"]
    file.check("out/log_prob_v2t", jax.nn.log_softmax(scores), OUTPUT)
    file.check("out/log_prob_t2v", jax.nn.log_softmax(scores.T), OUTPUT)
    np.testing.assert_array_equal(file["out/labels"], np.arange(len(scores)))
    file.check("loss/vtc", total, OUTPUT)
    check_gradients(file, named_gradients(table, grads))
    file.done()


def check_retrieval(file, video: np.ndarray, ids: np.ndarray) -> tuple[ALPRO, dict]:
    """Check losses and gradients of fine-tuning."""
    model, params, table = loaded(file)

    def loss(params: dict) -> tuple[jax.Array, tuple]:
        out = pass_of(file, model, params, video)
        total, found = encode_pairs.pair_metrics(out, np.ones(len(video), bool), ids)
        return total, (out, found)

    (total, (out, found)), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(params)
    check_pairs(file, out, np.array([1, 0, 0]))
    file.check("loss/vtc", found["contrastive_loss"].value(), OUTPUT)
    file.check("loss/vtm", found["matching_loss"].value(), OUTPUT)
    file.check("loss/total", total, OUTPUT)
    check_gradients(file, named_gradients(table, grads))
    if "out/temp_clamped" in file.arrays:
        file.check("out/temp_clamped", out["temperature"], OUTPUT)
        file.check("out/video_tokens", model.bind({"params": params}).vision(video), OUTPUT)
        same = (ids == ids.T).astype(np.float32)
        file.check("out/sim_targets", same / same.sum(axis=1, keepdims=True), OUTPUT)
    return model, params


def pair_logits(model: ALPRO, params: dict, tokens: jax.Array, states: jax.Array, mask: np.ndarray) -> jax.Array:
    """Match logits of every video with every text by the evaluation's step, [videos, texts, 2]."""
    texts = {"states": states, "mask": mask}
    tiled = {name: jnp.broadcast_to(value, (len(tokens), *value.shape)) for name, value in texts.items()}
    return matching.pair_logits(partial(retrieve.logits_of, model), params, tokens, tiled)


def test_retrieval(read) -> None:
    file = read("retrieval.npz")
    model, params = check_retrieval(file, channels_last(file["in/video"]), file["in/idx"][:, None])
    assert file.config["temp_before_clamp"] == pytest.approx(float(params["temperature"]))
    run, mask = model.bind({"params": params}), file["in/eval_attention_mask"]
    tokens = run.encode_video(channels_last(file["in/eval_video"]))
    states = run.encode_text(file["in/eval_input_ids"], mask)
    video, text_units = run.embed_video(tokens), run.embed_text(states)
    file.check("out/eval_video_feat", video, OUTPUT)
    file.check("out/eval_text_feat", text_units, OUTPUT)
    file.check("out/eval_sim_v2t", video @ text_units.T, OUTPUT)
    logits = pair_logits(model, params, tokens, states, mask)
    file.check("out/eval_vtm_logits", logits, OUTPUT)
    probability = np.asarray(jax.nn.softmax(logits, axis=-1)[..., 1])
    file.check("out/eval_vtm_prob", probability, OUTPUT)
    right = np.arange(len(video))[:, None] == file["in/eval_txt2vid"]
    ours = np.asarray(matching.match_score(logits))
    for name, scores in (
        ("sim", np.asarray(video @ text_units.T)),
        ("vtm", np.asarray(logits[..., 1])),
        ("vtm_prob", ours),
    ):
        found = task_metrics.recalls(task_metrics.ranks_in(scores, right), task_metrics.ranks_in(scores.T, right.T))
        for theirs, way in (("txt", "v2t"), ("vid", "t2v")):
            for key in ("r1", "r5", "r10", "r_mean"):
                file.check(f"out/metric_{name}_{theirs}_{key}", np.float32(found[f"{way}_{key}"]), OUTPUT)
        file.check(f"out/metric_{name}_r_mean", np.float32(found["r_mean"]), OUTPUT)
    file.done()


def test_retrieval_sf(read) -> None:
    file = read("retrieval_sf.npz")
    size = len(file["in/input_ids"])
    model, params = check_retrieval(file, frames_first(file["in/visual_inputs"]), np.arange(size)[:, None])
    run, mask = model.bind({"params": params}), file["in/eval_attention_mask"]
    tokens = run.encode_video(frames_first(file["in/eval_visual_inputs"]))
    states = run.encode_text(file["in/eval_input_ids"], mask)
    out = encode_pairs.contrast(run, tokens, states)
    file.check("out/eval_itc_scores", out["video"] @ out["text"].T / out["temperature"], OUTPUT)
    logits = pair_logits(model, params, tokens, states, mask)
    file.check("out/eval_vtm_logits", logits, OUTPUT)
    probability = np.asarray(jax.nn.softmax(logits, axis=-1)[..., 1])
    np.testing.assert_allclose(
        probability, file["out/eval_scores_rounded"], atol=6e-5
    )  # the reference keeps 4 decimals
    rounded, right = file["out/eval_scores_rounded"], np.eye(len(tokens), dtype=bool)
    found = task_metrics.recalls(task_metrics.ranks_in(rounded, right), task_metrics.ranks_in(rounded.T, right.T))
    for theirs, way in (("video2text", "v2t"), ("text2video", "t2v")):
        names = ("r1", "r5", "r10"), ("medianR", "median_rank"), ("meanR", "mean_rank")
        for key in names[0]:
            file.check(f"out/metric_{theirs}_{key}", np.float32(found[f"{way}_{key}"]), OUTPUT)
        for key, name in names[1:]:
            file.check(f"out/metric_{theirs}_{key}", np.float32(found[f"{way}_{name}"]), OUTPUT)
    file.done()


def check_classifier(file, video: np.ndarray, name: str) -> None:
    model, params, table = loaded(file)
    labels, batch = file["in/labels"], batch_of(file)

    def loss(params: dict) -> tuple[jax.Array, dict]:
        run = model.bind({"params": params})
        tokens, states = run.encode_video(video), run.encode_text(batch["ids"], batch["mask"])
        fused = run.fuse(states, batch["mask"], tokens)
        votes = run.classify(fused)
        total, count = losses.classification(votes, labels, batch["valid"])
        return total / count, {"tokens": tokens, "states": states, "fused": fused, "votes": votes}

    (total, out), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(params)
    file.check(f"loss/{name}", total, OUTPUT)
    file.check("out/logits", out["votes"], OUTPUT)
    if "out/fusion" in file.arrays:
        file.check("out/fusion", out["fused"], OUTPUT)
        file.check("out/text_embeds", out["states"], OUTPUT)
        file.check("out/video_embeds", out["tokens"], OUTPUT)
        file.check("out/video_tokens", model.bind({"params": params}).vision(video), OUTPUT)
        for k in [int(key.removeprefix("out/top")) for key in file.arrays if key.startswith("out/top")]:
            file.check(f"out/top{k}", np.float32(task_metrics.top_k(np.asarray(out["votes"]), labels, k)), OUTPUT)
    check_gradients(file, named_gradients(table, grads))
    file.done()


def test_classification(read) -> None:
    file = read("classification.npz")
    check_classifier(file, channels_last(file["in/video"]), "cls")


def test_qa_sf(read) -> None:
    file = read("qa_sf.npz")
    check_classifier(file, frames_first(file["in/visual_inputs"]), "ce")


def check_tokenizer(case: dict, folder: Path) -> None:
    vocab = folder / "vocab.txt"
    vocab.write_text("\n".join(case["vocab"]) + "\n", encoding="utf-8")
    for one in case["cases"]:
        known = text.load_tokenizer(str(vocab), lower_case=one["do_lower_case"])
        found = known.encode(one["text"])
        assert [case["vocab"][i] for i in found] == one["tokens"], one
        for name, end in (("youku", None), ("hf", known.eos)):
            ids, mask = text.encode_words(found, case["max_length"], bos=known.bos, eos=end, pad=known.pad)
            assert (ids.tolist(), mask.tolist()) == (one[f"ids_{name}"], one[f"mask_{name}"]), one


def check_schedules(salesforce: dict, youku: list[dict] | dict) -> None:
    settings = Optim(lr=salesforce["lr"], min_lr=1e-8, schedule="bert")
    total = salesforce["steps"]
    rate = optim.schedule(settings, warmup=round(total * salesforce["warm"]), total=total)
    np.testing.assert_allclose(jax.vmap(rate)(jnp.arange(total)), salesforce["values"], rtol=1e-5, atol=1e-9)
    for case in youku if isinstance(youku, list) else [youku]:
        total = case["epochs"] * case["niter"]
        warmup = case["warmup_steps"] if case.get("warmup_steps", 0) > 0 else case["warmup_epochs"] * case["niter"]
        rate = optim.schedule(Optim(lr=case["base"], min_lr=case["final"]), warmup=warmup, total=total)
        np.testing.assert_allclose(jax.vmap(rate)(jnp.arange(total)), case["values"], rtol=1e-5, atol=1e-10)


def check_groups(cases: list[dict]) -> None:
    """Check learning rate factors and weight decay by name. The temperature does not decay here, unlike in the reference."""
    for case in cases:
        expected = {
            name: optim.Group(group["lr_scale"], group["weight_decay"])
            for group in case["groups"]
            for name in group["names"]
        }

        def depth(pattern: str, names: dict = expected) -> int:
            return plans.layers({name: () for name in names}, pattern)

        clip, scaled = "visual_encoder.norm_pre.weight" in expected, case["visual_backbone_scale"]
        layers_of_text = depth(r"text_encoder\.bert\.encoder\.layer\.(\d+)\.")
        model = alpro.sized("tiny", "tiny")
        model = model.clone(
            vision=model.vision.clone(
                depth=depth(r"visual_encoder\.blocks\.(\d+)\."),
                clip=clip,
                width=32 if "visn_fc.weight" in expected else 64,
            ),
            text=model.text.clone(depth=layers_of_text // 2),
            fusion=model.fusion.clone(depth=layers_of_text - layers_of_text // 2),
        )
        like = jax.eval_shape(lambda key, model=model: alpro.init(model, key), jax.random.key(0))
        settings = recipe.optim(1e-4, 1e-6, "0 steps", clip=scaled)
        found = optim.param_groups(state.flatten(like), settings)
        entries = rules.expand(alpro_tables.YOUKU, like)
        named = {name: {found[path] for path in entry.rule.targets if path} for name, entry in entries.items()}
        assert named.pop("temp") == {optim.Group(1.0, 0.0)}
        del expected["temp"]
        assert named == {name: {group} for name, group in expected.items()}


def test_misc(golden, tmp_path: Path) -> None:
    cases = json.loads(golden("misc.json").read_text(encoding="utf-8"))
    check_tokenizer(cases["tokenizer"], tmp_path)
    for case in cases["pre_caption"]["cases"]:
        assert text.clean_text(case["text"], cases["pre_caption"]["max_words"]) == case["out"], case
    check_schedules(cases["lr_linear_salesforce"], cases["lr_cosine_youku"])
    for case in cases["frame_indices"]:
        assert frames.choose_frames(case["num_frames"], case["vlen"], None).tolist() == case["youku_middle"]
    check_groups(cases["param_groups_youku"])


def test_every_fixture_has_a_test(golden_folder: Path) -> None:
    files = {path.stem for path in golden_folder.iterdir() if path.suffix in (".npz", ".json")}
    assert files <= {name.removeprefix("test_") for name in globals() if name.startswith("test_")}
