"""mPLUG-video (GPT-3) equals stored outputs of the PyTorch reference; one test for each fixture file, all of its arrays.

Everything is float32 with the highest matmul precision. An error is relative to the largest value of its array. Sizes are
read from the files, and weights pass through the converter's tables. Images are compared by grey levels.
"""

import dataclasses
import itertools
import json
import re
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import cv2
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import trees
from configs.mplug_video import pretrain as pretrain_config
from ymplug_jax.convert import mplug_video as tables
from ymplug_jax.convert import rules
from ymplug_jax.core import optim, state
from ymplug_jax.core.config import Optim, from_config_dict
from ymplug_jax.data import frames, text, transforms
from ymplug_jax.models import decode, decode_beam, decode_sampling, mplug_video, position_tables
from ymplug_jax.models.abstractor import Abstractor
from ymplug_jax.models.gpt3 import GPT3
from ymplug_jax.models.mplug_video import MPLUGVideo
from ymplug_jax.models.timesformer import TimeSformer
from ymplug_jax.tasks.common import candidates, caption_metrics, losses, preprocess, task_metrics
from ymplug_jax.tasks.mplug_video import classify, match

OUTPUT, GRADIENT = 1e-5, 1e-4


@pytest.fixture(autouse=True)
def exact_products() -> Iterator[None]:
    with jax.default_matmul_precision("highest"):
        yield


def timesformer(visual: dict, frames: int) -> TimeSformer:
    return TimeSformer(
        image_size=visual["img_size"],
        patch_size=visual["patch_size"],
        depth=visual["depth"],
        width=visual["embed_dim"],
        heads=visual["num_heads"],
        mlp_ratio=visual["mlp_ratio"],
        frames=frames,
        clip=visual.get("clip_model", False),
    )


def gpt3(text: dict) -> GPT3:
    return GPT3(
        vocab=text["vocab_size"],
        width=text["hidden_size"],
        depth=text["num_hidden_layers"],
        heads=text["num_attention_heads"],
        max_positions=text["max_position_embeddings"],
        ln_eps=text["layernorm_epsilon"],
    )


def channels_last(video: np.ndarray) -> np.ndarray:
    """[B, 3, T, S, S] -> [B, T, S, S, 3]."""
    return video.transpose(0, 2, 3, 4, 1)


def shapes_of(model: object, *args: object) -> dict:
    return jax.eval_shape(lambda key: model.init(key, *args), jax.random.key(0))["params"]


def check_encoder(file) -> None:
    visual = file.config["visual"]
    model, video = timesformer(visual, visual["num_frames"]), channels_last(file["in/video"])
    like, weights = shapes_of(model, video), file.group("param")
    params = trees.to_tree(tables.TIMESFORMER, weights, like)

    def run(params: dict) -> tuple[jax.Array, dict]:
        tokens, kept = model.apply({"params": params}, video, capture_intermediates=True, mutable="intermediates")
        return jnp.sum(tokens * file["in/cotangent"]), {"tokens": tokens, **kept["intermediates"]}

    (_, out), grads = jax.jit(jax.value_and_grad(run, has_aux=True))(params)
    patches = out["patch"]["__call__"][0]
    file.check("out/patch_embed", patches.reshape(-1, *patches.shape[2:]), OUTPUT)
    x, cls = out["blocks"]["__call__"][0][0]
    for i in range(model.depth):
        file.check(f"out/block{i}_tokens", x[i], OUTPUT)
        file.check(f"out/block{i}_cls", cls[i], OUTPUT)
    file.check("out/tokens", out["tokens"], OUTPUT)
    file.check("out/cls", out["tokens"][:, 0], OUTPUT)
    file.check_all("grad", rules.to_torch(tables.TIMESFORMER, grads), GRADIENT)

    tables_and_patch = ("cls_token", "pos_embed", "temporal_embed", "patch_embed.proj.")
    scale = np.float32(file.config["small_scale"])
    small = {name: w * scale if name.startswith(tables_and_patch) else w for name, w in weights.items()}
    tokens = model.apply({"params": trees.to_tree(tables.TIMESFORMER, small, like)}, video)
    file.check("out/small_scale/tokens", tokens, OUTPUT)

    other = file.config["resize_to"]
    patches = (other["img_size"] // model.patch_size) ** 2
    file.check("out/pos_embed_resized", position_tables.resize_pos_embed(params["pos_embed"], patches)[None], OUTPUT)
    temporal = position_tables.resize_temporal_embed(params["temporal_embed"], other["num_frames"])
    file.check("out/temporal_embed_resized", temporal[None], OUTPUT)
    file.done()


def test_encoder(read) -> None:
    check_encoder(read("encoder.npz"))


def test_encoder_noclip(read) -> None:
    check_encoder(read("encoder_noclip.npz"))


def test_abstractor(read) -> None:
    file = read("abstractor.npz")
    config, context = file.config, file["in/context"]
    model = Abstractor(queries=config["num_queries"], heads=config["num_heads"], mlp_ratio=config["mlp_ratio"])
    like = {name: leaf for name, leaf in shapes_of(model, context).items() if name != "queries"}
    params = trees.to_tree(tables.ABSTRACTOR, file.group("param"), like)

    def run(params: dict, queries: jax.Array, context: jax.Array) -> tuple[jax.Array, jax.Array]:
        def one(queries: jax.Array, context: jax.Array) -> jax.Array:  # the file has different queries in each row
            return model.apply({"params": params | {"queries": queries}}, context[None])[0]

        out = jax.vmap(one)(queries, context)
        return jnp.sum(out * file["in/cotangent"]), out

    step = jax.jit(jax.value_and_grad(run, argnums=(0, 1, 2), has_aux=True))
    (_, out), (grads, of_queries, of_context) = step(params, file["in/queries"], context)
    file.check("out/output", out, OUTPUT)
    file.check_all("grad", rules.to_torch(tables.ABSTRACTOR, grads), GRADIENT)
    file.check("grad_in/queries", of_queries, GRADIENT)
    file.check("grad_in/context", of_context, GRADIENT)
    file.done()


def test_gpt3(read) -> None:
    file = read("gpt3.npz")
    model, ids, labels = gpt3(file.config["text"]), file["in/input_ids"], file["in/labels"]
    weights = file.group("param")
    like = shapes_of(model, jnp.zeros((1, 1, model.width)))
    params = trees.to_tree(tables.GPT3, weights, like)

    def run(params: dict, prefix: jax.Array, labels: jax.Array) -> tuple[jax.Array, dict]:
        embeds = jnp.concatenate([prefix, model.apply({"params": params}, ids, method="embed")], axis=1)
        hidden, kept = model.apply({"params": params}, embeds, capture_intermediates=True, mutable="intermediates")
        logits = model.apply({"params": params}, hidden, method="logits")
        out = {"logits": logits, "losses": losses.token_losses(logits, labels), "last_hidden_state": hidden}
        block_outputs = kept["intermediates"]["blocks"]["__call__"][0][0][0]
        out |= {f"layer{i}": block_outputs[i] for i in range(model.depth)}
        return jnp.mean(out["losses"][:, prefix.shape[1] :]), out

    query = file["in/query_embeds"]
    _, out = jax.jit(run)(params, query[:, :0], labels)
    file.check_all("out/tokens", out, OUTPUT)
    at_visual = np.full(query.shape[:2], 100, np.int32)
    step = jax.jit(jax.value_and_grad(run, argnums=1, has_aux=True))
    (_, out), of_query = step(params, query, np.concatenate([at_visual, labels], axis=1))
    file.check_all("out/visual_prefix", out, OUTPUT)
    file.check("grad_in/query_embeds", of_query, GRADIENT)

    scale = np.float32(file.config["small_scale"])
    small = {name: w * scale if ".embedding." in name else w for name, w in weights.items()}
    _, out = jax.jit(run)(trees.to_tree(tables.GPT3, small, like), query[:, :0], labels)
    file.check_all("out/small_scale", out, OUTPUT)
    file.done()


def check_language_pass(file, name: str, hidden: jax.Array, logits: jax.Array, visual: int, ids, mask) -> None:
    """Hidden states, logits of every position, token losses, targets and the loss of one pass over [visual, text]."""
    file.check(f"{name}/last_hidden_state", hidden, OUTPUT)
    file.check(f"{name}/logits", logits, OUTPUT)
    labels = file[f"{name}/labels"][:, :-1]  # the last position predicts nothing
    assert (labels[:, :visual] == 100).all() and (labels[:, visual:] == ids[:, 1:]).all()
    file.check(f"{name}/token_losses", losses.token_losses(logits[:, :-1], labels), OUTPUT)
    targets = np.pad(losses.target_mask(mask), ((0, 0), (visual, 0)))
    np.testing.assert_array_equal(targets, file[f"{name}/loss_mask"])
    total, weight = losses.next_token(logits[:, visual:-1], ids, mask)
    assert weight == targets.sum()
    file.check(f"{name}/loss", total / weight, OUTPUT)


def check_gradients(file, name: str, grads: dict, like: dict) -> None:
    """Check stored gradients, their global norm, and which trainable tensors get no gradient."""
    llm = jax.tree.map(lambda leaf: np.zeros(leaf.shape, np.float32), like["llm"])
    named = rules.to_torch(tables.MPLUG_VIDEO, grads | {"llm": llm})
    named = {k: v for k, v in named.items() if not k.startswith("text_decoder.")}
    without = {k for k, v in named.items() if not v.any()}
    named["global_norm"] = np.sqrt(sum(np.sum(np.square(v, dtype=np.float64)) for v in named.values()))
    assert without == set(file[f"{name}/no_grad_names"].tolist())
    del file.arrays[f"{name}/no_grad_names"]
    file.check_all(name, named, GRADIENT)


def whole(config: dict, **heads) -> MPLUGVideo:
    """The model of a task file."""
    visual, settings = config["visual"], config["model"]
    return MPLUGVideo(
        vision=timesformer(visual, settings["num_frames"]),
        abstractor=Abstractor(settings["num_learnable_token"], visual["num_heads"], visual["mlp_ratio"]),
        llm=gpt3(config["text"]),
        connector_norm=visual.get("connect_ln", False),
        **heads,
    )


def weights_of(file, model: MPLUGVideo) -> tuple[dict, dict, dict]:
    """(abstract tree, trainable, frozen language model) of a task file, through the converter's tables."""
    like = jax.eval_shape(lambda key: mplug_video.init(model, key), jax.random.key(0))
    params = trees.to_tree(tables.MPLUG_VIDEO, file.group("param"), like)
    return like, {k: v for k, v in params.items() if k != "llm"}, params["llm"]


def test_pretrain(read) -> None:
    file = read("pretrain.npz")
    settings = file.config["model"]
    model = whole(file.config, contrastive_width=settings["contrastive_embed_dim"])
    like, trainable, llm = weights_of(file, model)
    video, ids, mask = channels_last(file["in/video"]), file["in/text/input_ids"], file["in/text/attention_mask"]
    queries = settings["num_learnable_token"]

    def apply(trainable: dict, method: str, *args: object) -> dict | jax.Array:
        return model.apply({"params": trainable | {"llm": llm}}, *args, method=method)

    def caption_loss(trainable: dict) -> tuple[jax.Array, dict]:
        out = apply(trainable, "encode_video", video)
        hidden = apply(trainable, "hidden", out["prefix"], ids)
        total, weight = losses.next_token(apply(trainable, "logits", hidden[:, queries:-1]), ids, mask)
        return total / weight, out | {"hidden": hidden}

    def both_losses(trainable: dict) -> tuple[jax.Array, dict]:
        loss_caption, out = caption_loss(trainable)
        text_hidden = apply(trainable, "hidden", None, ids)
        feats = apply(trainable, "contrastive", out["image_query"], text_hidden, mask)
        total, weight = losses.contrastive(feats["video"], feats["text"], feats["temperature"])
        out |= {"loss_caption": loss_caption, "loss_contrastive": total / weight, "text_hidden": text_hidden, **feats}
        return loss_caption + total / weight, out

    @jax.jit
    def steps(trainable: dict) -> list[tuple]:
        return [jax.value_and_grad(loss, has_aux=True)(trainable) for loss in (caption_loss, both_losses)]

    plain, contrastive = steps(trainable)
    (loss, out), grads = plain
    file.check("out/plain/loss_caption", loss, OUTPUT)
    check_gradients(file, "grad/plain", grads, like)
    file.check("out/video_tokens", out["tokens"], OUTPUT)
    file.check("out/video_cls", out["tokens"][:, 0], OUTPUT)
    file.check("out/image_query", out["image_query"], OUTPUT)
    file.check("out/query_features", out["prefix"], OUTPUT)
    logits = apply(trainable, "logits", out["hidden"])
    check_language_pass(file, "out/caption", out["hidden"], logits, queries, ids, mask)

    (loss, out), grads = contrastive
    file.check("out/contrastive/loss_caption", out["loss_caption"], OUTPUT)
    file.check("out/contrastive/loss_contrastive", out["loss_contrastive"], OUTPUT)
    file.check("out/contrastive/loss_total", loss, OUTPUT)
    file.check("out/contrastive/vision_feats", out["video"], OUTPUT)
    file.check("out/contrastive/text_feats", out["text"], OUTPUT)
    scores = losses.similarity(out["video"], out["text"]) / out["temperature"]
    file.check("out/contrastive/sim_i2t", scores, OUTPUT)
    file.check("out/contrastive/sim_t2i", scores.T, OUTPUT)
    check_gradients(file, "grad/contrastive", grads, like)
    logits = apply(trainable, "logits", out["text_hidden"])
    check_language_pass(file, "out/text_only", out["text_hidden"], logits, 0, ids, mask)
    file.done()


def check_encoded(file, name: str, out: dict) -> None:
    """Check the outputs of the vision side for a video."""
    file.check(f"{name}/video_tokens", out["tokens"], OUTPUT)
    file.check(f"{name}/video_cls", out["tokens"][:, 0], OUTPUT)
    file.check(f"{name}/image_query", out["image_query"], OUTPUT)
    file.check(f"{name}/query_features", out["prefix"], OUTPUT)


def text_of(file, name: str) -> tuple[np.ndarray, ...]:
    """Ids, mask and prompt lengths (or None) stored below a name."""
    lengths = f"{name}/prompt_lengths"
    return file[f"{name}/input_ids"], file[f"{name}/attention_mask"], file[lengths] if lengths in file.arrays else None


def check_prompt_pass(file, name: str, hidden, logits, queries: int, ids, mask, lengths) -> None:
    """`check_language_pass` for texts with a prompt; some files store no logits or no loss."""
    file.check(f"{name}/last_hidden_state", hidden, OUTPUT)
    if f"{name}/logits" in file.arrays:
        file.check(f"{name}/logits", logits, OUTPUT)
    labels = file[f"{name}/labels"][:, :-1]
    assert (labels[:, :queries] == 100).all() and (labels[:, queries:] == ids[:, 1:]).all()
    file.check(f"{name}/token_losses", losses.token_losses(logits[:, :-1], labels), OUTPUT)
    targets = np.pad(losses.target_mask(mask, lengths), ((0, 0), (queries, 0)))
    np.testing.assert_array_equal(targets, file[f"{name}/loss_mask"])
    total, weight = losses.next_token(logits[:, queries:-1], ids, mask, lengths)
    file.check(f"{name}/loss", total / weight, OUTPUT)


def check_sequences(name: str, found: np.ndarray, expected: np.ndarray, prompt: np.ndarray, eos: int) -> None:
    """Compare generated ids with the reference's rows: prompt, generated tokens, end tokens (or -1 in shorter rows)."""
    for row, wanted, length in zip(np.asarray(found), expected, prompt, strict=True):
        wanted = wanted[wanted >= 0][length:]
        ours = np.full(max(len(row), len(wanted)), eos)
        ours[: len(row)] = row
        assert ours[: len(wanted)].tolist() == wanted.tolist(), name


def test_beam(read) -> None:
    file = read("beam.npz")
    config, model = file.config, gpt3(file.config["text"])
    like = shapes_of(model, jnp.zeros((1, 1, model.width)))
    params = trees.to_tree(rules.under("dist_model.", "", tables.GPT3), file.group("param"), like)
    prefix, eos = file["in/query_embeds"], config["generate"]["stop_token"]
    rows = np.repeat(file["in/input_ids"], len(prefix), axis=0)
    lengths = np.full(len(prefix), int(file["in/prompt_length"]))
    new = config["generate"]["tokens_to_generate"]
    width = rows.shape[1] + new
    for beams in config["generate"]["beam_sizes"]:
        search = partial(decode_beam.beam, model, new_tokens=width - 1, eos=eos, beams=beams)
        prompt = decode.prompt_of(model, params, prefix, rows, lengths)
        out = jax.jit(partial(search, row_length=width, visual=prefix.shape[1]))(params, *prompt)
        expected = file[f"out/beam{beams}_sequences"]
        assert (expected[:, : lengths[0]] == rows[:, : lengths[0]]).all()
        check_sequences(f"beam{beams}", out.ids, expected, lengths, eos)
        file.check(f"out/beam{beams}_scores", out.scores, OUTPUT)

    ids, lengths = file["in/batch_greedy/input_ids"], file["in/batch_greedy/prompt_lengths"]
    expected = file["out/batch_greedy_sequences"]
    new = expected.shape[1] - int(lengths.min())
    run = jax.jit(partial(decode.greedy, model, new_tokens=new, eos=-1))  # no row ends
    prompt = decode.prompt_of(model, params, prefix[: len(ids)], ids, lengths)
    check_sequences("greedy", run(params, *prompt).ids, expected, lengths, eos)

    logits = file["in/filter/logits"]
    for k in config["filter"]["top_k"]:
        np.testing.assert_array_equal(decode_sampling.keep_top_k(logits, k), file[f"out/filter/keep_top_k_{k}"])
    for p in config["filter"]["top_p"]:
        np.testing.assert_array_equal(decode_sampling.keep_top_p(logits, p), file[f"out/filter/keep_top_p_{p}"])
    file.done()


def test_caption(read) -> None:
    file = read("caption.npz")
    config, model = file.config, whole(file.config)
    like, trainable, llm = weights_of(file, model)
    video, queries = channels_last(file["in/train/video"]), model.abstractor.queries
    ids, mask, lengths = text_of(file, "in/train/text")

    def loss(trainable: dict) -> tuple[jax.Array, tuple]:
        run = model.bind({"params": trainable | {"llm": llm}})
        out = run.encode_video(video)
        hidden = run.hidden(out["prefix"], ids)
        logits = run.logits(hidden)
        total, weight = losses.next_token(logits[:, queries:-1], ids, mask, lengths)
        return total / weight, (out, hidden, logits)

    (value, (out, hidden, logits)), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(trainable)
    file.check("out/train/loss_caption", value, OUTPUT)
    check_encoded(file, "out/train", out)
    check_prompt_pass(file, "out/train/caption", hidden, logits, queries, ids, mask, lengths)
    check_gradients(file, "grad", grads, like)

    generate = config["generate"]
    video, (rows, mask, _) = channels_last(file["in/generate/video"]), text_of(file, "in/generate/text")
    lengths = mask.sum(axis=1) - 1
    assert (lengths == file["in/generate/prompt_length"]).all()
    prefix = model.apply({"params": trainable | {"llm": llm}}, video, method="encode_video")["prefix"]
    eos, width = generate["stop_token"], rows.shape[1] + generate["tokens_to_generate"]
    for beams in sorted({int(m[1]) for name in file.arrays if (m := re.match(r"out/generate/beam(\d+)_scores", name))}):
        search = partial(decode_beam.beam, model.llm, new_tokens=width - 1, eos=eos, beams=beams)
        prompt = decode.prompt_of(model.llm, llm, prefix, rows, lengths)
        out = jax.jit(partial(search, row_length=width, visual=prefix.shape[1]))(llm, *prompt)
        check_sequences(f"beam{beams}", out.ids, file[f"out/generate/beam{beams}_sequences"], lengths, eos)
        file.check(f"out/generate/beam{beams}_scores", out.scores, OUTPUT)
    expected, stored = file["out/generate/greedy_sequences"], file["out/generate/greedy_lengths"]
    assert ((expected >= 0).sum(axis=1) == stored).all()
    run = jax.jit(partial(decode.greedy, model.llm, new_tokens=expected.shape[1], eos=-1))
    for b in range(len(video)):  # the reference generates these rows one by one
        prompt = decode.prompt_of(model.llm, llm, *(x[b : b + 1] for x in (prefix, rows, lengths)))
        found = run(llm, *prompt).ids[0].tolist()
        found = found[: found.index(eos)] if eos in found else found
        wanted = expected[b, lengths[b] : stored[b]].tolist()
        assert (found + [eos] * len(wanted))[: len(wanted)] == wanted
    file.done()


def check_with_head(file, model: MPLUGVideo, rows_of) -> tuple[dict, dict]:
    """Check training with a generative loss and a head (cls, retrieval_itm). `rows_of` gives each text its video."""
    like, trainable, llm = weights_of(file, model)
    video, queries = channels_last(file["in/train/video"]), model.abstractor.queries
    ids, mask, lengths = text_of(file, "in/train/text")
    plain, plain_mask, _ = text_of(file, "in/train/prompt_text")
    labels = file["in/train/labels"]

    def loss(trainable: dict) -> tuple[jax.Array, dict]:
        run = model.bind({"params": trainable | {"llm": llm}})
        out = run.encode_video(video)
        prefix = rows_of(out["prefix"])
        hidden = run.hidden(prefix, ids)
        logits = run.logits(hidden)
        total, weight = losses.next_token(logits[:, queries:-1], ids, mask, lengths)
        cls_hidden = run.hidden(prefix, plain)
        classes = run.classify(cls_hidden, plain_mask)
        cls_total, cls_weight = losses.classification(classes, labels, np.ones(len(labels), bool))
        out |= {"hidden": hidden, "logits": logits, "cls_hidden": cls_hidden, "classes": classes}
        out |= {"generation": total / weight, "cls": cls_total / cls_weight}
        return out["generation"] + out["cls"], out

    (value, out), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(trainable)
    check_encoded(file, "out/train", out)
    check_prompt_pass(file, "out/train/caption", out["hidden"], out["logits"], queries, ids, mask, lengths)
    if "out/train/cls_last_hidden_state" in file.arrays:
        file.check("out/train/cls_last_hidden_state", out["cls_hidden"], OUTPUT)
    file.check("out/train/cls_logits", out["classes"], OUTPUT)
    file.check("out/train/loss_generation", out["generation"], OUTPUT)
    file.check("out/train/loss_cls", out["cls"], OUTPUT)
    file.check("out/train/loss_total", value, OUTPUT)
    check_gradients(file, "grad", grads, like)
    return trainable, llm


def test_cls(read) -> None:
    file = read("cls.npz")
    model = whole(file.config, classes=file.config["model"]["num_classes"])
    trainable, llm = check_with_head(file, model, lambda prefix: prefix)
    params, queries = trainable | {"llm": llm}, model.abstractor.queries
    run = model.bind({"params": params})
    prefix = run.encode_video(channels_last(file["in/eval/video"]))["prefix"]
    ids, mask, lengths = text_of(file, "in/eval/text")
    each = len(ids) // len(prefix)
    hidden = run.hidden(np.repeat(prefix, each, axis=0), ids)  # without branches: every video with every class
    check_prompt_pass(file, "out/eval/score", hidden, run.logits(hidden), queries, ids, mask, lengths)

    shape = (len(prefix), each, -1)
    rows, masks, prompts = ids.reshape(shape), mask.reshape(shape), lengths.reshape(shape[:2])
    width = int((masks.sum(-1) - prompts.min(axis=1, keepdims=True)).max()) - 1  # with branches
    parts = [candidates.split(*parts, width) for parts in zip(rows, masks, prompts, strict=True)]
    batch = {key: np.stack([part[key] for part in parts]) for key in parts[0]}
    likelihood = jax.jit(partial(candidates.scores, model.llm))(llm, prefix, batch)
    file.check("out/eval/label_log_likelihood", likelihood, OUTPUT)
    file.check("out/eval/generation_probs", candidates.probabilities(likelihood), OUTPUT)
    plain, plain_mask, _ = text_of(file, "in/eval/prompt_text")
    file.check("out/eval/cls_logits", run.classify(run.hidden(prefix, plain), plain_mask), OUTPUT)
    file.done()


def test_retrieval(read) -> None:
    file = read("retrieval.npz")
    model = whole(file.config, contrastive_width=file.config["model"]["contrastive_embed_dim"])
    like, trainable, llm = weights_of(file, model)
    video, (ids, mask, _) = channels_last(file["in/video"]), text_of(file, "in/text")
    clips = file["in/idx"][:, None]

    def loss(trainable: dict) -> tuple[jax.Array, dict]:
        run = model.bind({"params": trainable | {"llm": llm}})
        hidden = run.hidden(None, ids)
        out = {"hidden": hidden, "video": run.embed_video(video), "text": run.embed_text(hidden, mask)}
        total, weight = losses.retrieval(out["video"], out["text"], run.temperature, clips)
        return total / weight, out | {"cls": run.vision(video)[:, 0]}

    (value, out), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(trainable)
    file.check("out/loss", value, OUTPUT)
    file.check("out/video_cls", out["cls"], OUTPUT)
    file.check("out/text_last_hidden_state", out["hidden"], OUTPUT)
    file.check("out/vision_feats", out["video"], OUTPUT)
    file.check("out/text_feats", out["text"], OUTPUT)
    scores = np.asarray(out["video"]) @ np.asarray(out["text"]).T
    file.check("out/eval_sim_v2t", scores, OUTPUT)
    file.check("out/sim_i2t", scores / trainable["temperature"], OUTPUT)
    file.check("out/sim_t2i", scores.T / trainable["temperature"], OUTPUT)
    check_gradients(file, "grad", grads, like)
    file.done()


def test_retrieval_itm(read) -> None:
    file = read("retrieval_itm.npz")
    model = whole(file.config, classes=file.config["model"]["num_classes"])
    negatives = file["in/train/negative_indices"]
    trainable, llm = check_with_head(file, model, lambda prefix: jnp.concatenate([prefix, prefix[negatives]]))
    run = model.bind({"params": trainable | {"llm": llm}})
    prefix = run.encode_video(channels_last(file["in/eval/video"]))["prefix"]
    shape = (len(prefix), len(file["in/eval/text/input_ids"]) // len(prefix), -1)
    ids, mask, lengths = (x.reshape(shape) for x in text_of(file, "in/eval/text"))
    plain, plain_mask, _ = text_of(file, "in/eval/prompt_text")
    pairs = {"ids": ids, "mask": mask, "prompt_length": lengths[..., 0]}
    pairs |= {"plain": plain.reshape(shape), "plain_mask": plain_mask.reshape(shape)}
    scores = jax.jit(partial(match.pair_scores, model))(trainable | {"llm": llm}, prefix, pairs)
    file.check("out/eval/generation_log_likelihood", scores["generation"], OUTPUT)
    file.check("out/eval/cls_prob", scores["head"], OUTPUT)
    file.done()


def check_levels(name: str, value: np.ndarray, expected: np.ndarray, *, most: int, mean: float) -> None:
    """Check grey levels: no pixel differs by more than `most`, and the average by no more than `mean`."""
    assert value.shape == expected.shape, f"{name}: shape {value.shape}, expected {expected.shape}"
    error = np.abs(value.astype(np.int64) - expected.astype(np.int64))
    print(f"at most {error.max()}, mean {error.mean():.1e}  {name}")  # shown by `pytest -rP`
    assert error.max() <= most and error.mean() <= mean, f"{name}: off by {error.max()}, mean {error.mean():.2g}"


def check_input(name: str, clip: np.ndarray, expected: np.ndarray) -> None:
    """Check the normalised uint8[T, S, S, 3] against f32[3, T, S, S]."""
    value = np.asarray(preprocess.normalize(clip[None], "float32"))[0]
    np.testing.assert_allclose(value.transpose(3, 0, 1, 2), expected, rtol=1e-5, atol=1e-5, err_msg=name)


def test_augment(golden) -> None:
    with np.load(golden("augment.npz")) as arrays:
        file = dict(arrays)
    config = json.loads(str(file.pop("config")))
    size, clip = config["size"], file.pop("in/frames")
    resized = file.pop("out/test/resized")
    check_levels("test/resized", transforms.eval_transform(clip, size), resized, most=0, mean=0)
    check_input("test/input", resized.astype(np.uint8), file.pop("out/test/input"))

    crop = tuple(config["crop"][side] for side in ("top", "left", "height", "width"))
    cropped = np.stack([values.copy() for values in transforms.crop_resize(clip, crop, size)])
    expected = file.pop("out/train/crop_int")
    check_levels("train/crop_int", cropped, expected, most=1, mean=0.01)
    flipped = file.pop("out/train/flipped")
    np.testing.assert_array_equal(np.stack([cv2.flip(f, 1) for f in expected]) if config["flip"] else expected, flipped)
    start = file.pop("out/train/uint8")
    np.testing.assert_array_equal(transforms.to_uint8(flipped, wrap=True), start)

    def operate(clip: np.ndarray, *names: str) -> np.ndarray:
        for name in names:
            clip = np.stack([transforms.operate(frame, name, config["M"]) for frame in clip])
        return clip

    # The reference used OpenCV 4 for warps; version 5 is more exact.
    most, mean = (0, 0) if int(cv2.__version__.split(".")[0]) < 5 else (6, 0.8)
    for name in [key for key in file if key.startswith("out/train/op/")]:
        operation = name.removeprefix("out/train/op/")
        warp = operation in transforms.WARPS
        check_levels(name, operate(start, operation), file.pop(name), most=most * warp, mean=mean * warp)
    two = file.pop("out/train/two_ops")
    check_levels("train/two_ops", operate(start, *config["two_ops"]), two, most=2 * most, mean=2 * mean)
    check_input("train/input", two, file.pop("out/train/input"))
    assert not file, f"arrays that no check used: {sorted(file)}"


def check_param_groups(expected: dict) -> None:
    """Rate factor and weight decay of every trainable tensor under the pre-training recipe."""
    groups = expected["groups"]
    depth = 1 + max(int(m[1]) for name in groups if (m := re.match(r"visual_encoder\.blocks\.(\d+)\.", name)))
    clip = "visual_encoder.norm_pre.weight" in groups
    model = mplug_video.sized("tiny", "tiny", queries=4, contrastive_width=8 if "temp" in groups else 0)
    model = model.clone(
        vision=model.vision.clone(depth=depth, clip=clip), connector_norm="visual_norm.weight" in groups
    )
    like = jax.eval_shape(lambda key: mplug_video.init(model, key), jax.random.key(0))
    recipe = from_config_dict(pretrain_config.get_config("1.3b")).optim
    recipe = dataclasses.replace(
        recipe, weight_decay=expected["weight_decay"], lr_scales=recipe.lr_scales if clip else ()
    )
    trainable, _ = state.split(like, mplug_video.FROZEN)
    found = optim.param_groups(state.flatten(trainable), recipe)
    entries = rules.expand(tables.MPLUG_VIDEO, like)
    named = {
        name: {found[path] for path in e.rule.targets} for name, e in entries.items() if e.rule.targets[0] in found
    }
    assert named == {name: {optim.Group(g["lr_scale"], g["weight_decay"])} for name, g in groups.items()}


def check_lr_schedule(cases: list[dict]) -> None:
    for case in cases:
        args = case["args"]
        settings = Optim(lr=args["base_value"], min_lr=args["final_value"], schedule=args["sched_type"])
        steps = args["warmup_steps"]
        warmup = steps if steps > 0 else args["warmup_epochs"] * args["niter_per_ep"]
        total = args["epochs"] * args["niter_per_ep"]
        rate = optim.schedule(settings, warmup=warmup, total=total)
        values = jax.vmap(rate)(jnp.arange(total))
        np.testing.assert_allclose(values, case["values"], rtol=1e-5, atol=1e-6 * args["base_value"])


def check_frames(middle: list[dict], random: list[dict]) -> None:
    for case in middle:
        chosen = frames.choose_frames(case["num_frames"], case["vlen"], None)
        assert chosen.tolist() == case["indices"], case
    rng = np.random.default_rng(0)
    for case in random:
        wanted, available = case["num_frames"], case["vlen"]
        draws = np.stack([frames.choose_frames(wanted, available, rng) for _ in range(400)])
        count = min(wanted, available)
        assert draws.shape == (400, wanted) and (draws[:, count:] == draws[:, count - 1 : count]).all(), case
        if case["fallback_to_sorted_sample_without_replacement"]:
            assert (np.diff(draws[:, :count], axis=1) > 0).all(), case
            assert draws.min() >= 0 and draws.max() < available, case
        else:
            ranges = np.array(case["half_open_ranges"])
            assert len(ranges) == count, case
            assert (draws >= ranges[:, 0]).all() and (draws < ranges[:, 1]).all(), case
            short = ranges[:, 1] - ranges[:, 0] <= 30  # 400 draws reach both ends of these
            assert (draws.min(0) == ranges[:, 0])[short].all() and (draws.max(0) == ranges[:, 1] - 1)[short].all(), case


def check_truncation(plain: list[dict], pairs: list[dict], specials: dict[str, int]) -> None:
    for case in plain:
        begin, *ids, end = case["ids"]
        assert (begin, end) == (specials["bos"], specials["eos"])
        row, mask = text.encode_text(ids, case["max_length"], **specials)
        assert row.tolist() == case["out"] and mask.tolist() == [int(i < case["length"]) for i in range(len(row))], case
    for case in pairs:
        row, mask, prompt_length = text.encode_pair(case["prompt"], case["text"], case["max_length"], **specials)
        assert row.tolist() == case["out"] and prompt_length == case["prompt_length"], case
        assert mask.tolist() == [int(i < case["length"]) for i in range(len(row))], case


def check_retrieval(cases: list[dict]) -> None:
    """The reference names video-to-text scores `txt_*` and text-to-video scores `vid_*`."""
    for case in cases:
        scores, clip = np.array(case["scores_v2t"]), np.array(case["txt2vid"])
        right = np.arange(len(scores))[:, None] == clip
        found = task_metrics.recalls(task_metrics.ranks_in(scores, right), task_metrics.ranks_in(scores.T, right.T))
        named = {name.replace("v2t_", "txt_").replace("t2v_", "vid_"): value for name, value in found.items()}
        assert {name: named[name] for name in case["metrics"]} == pytest.approx(case["metrics"])


def check_derangements(cases: list[dict]) -> None:
    """Stored permutations have no fixed point; ours draw all such permutations equally often."""
    for case in cases:
        n = case["n"]
        assert sorted(case["result"]) == list(range(n)) and all(i != p for i, p in enumerate(case["result"]))
        draws = jax.jit(jax.vmap(lambda key, n=n: match.derangement(key, n)))(jax.random.split(jax.random.key(0), 4000))
        assert (np.sort(draws, axis=1) == np.arange(n)).all() and (draws != np.arange(n)).all()
        each, counts = np.unique(draws, axis=0, return_counts=True)
        if n <= 5:
            every = [p for p in itertools.permutations(range(n)) if all(i != j for i, j in enumerate(p))]
            assert len(each) == len(every) and counts.min() > 0.6 * 4000 / len(every)


def check_templates(expected: dict) -> None:
    length, title = 80, "标" * 100
    for prompt, name in ((classify.prompt_of, "classification"), (match.prompt_of, "itm")):
        kept = title[: length - int(expected[f"{name}_title_chars"].removeprefix("max_length - "))]
        assert prompt(title, length) == expected[f"{name}_prompt"].format(title=kept)
    assert (expected["itm_yes"], expected["itm_no"]) == (match.YES, match.NO)


def test_rules(golden) -> None:
    cases = json.loads(golden("rules.json").read_text(encoding="utf-8"))
    check_param_groups(cases["param_groups"])
    check_lr_schedule(cases["lr_schedule"])
    check_frames(cases["frames_middle"], cases["frames_rand"])
    for case in cases["pre_caption"]:
        assert text.clean_text(case["text"], case["max_words"]) == case["out"], case
    check_truncation(cases["truncate_plain"], cases["truncate_prompt"], cases["special_ids"])
    for case in cases["caption_metric_normalise"]:
        assert " ".join(caption_metrics.normalise(case["text"])) == case["out"], case
    check_retrieval(cases["retrieval_metrics"])
    case = cases["top_k_accuracy"]
    for k in (1, 5):
        found = task_metrics.top_k(np.array(case["logits"]), np.array(case["labels"]), k)
        assert found == pytest.approx(case[f"top{k}"])
    check_derangements(cases["derangement"])
    check_templates(cases["templates"])


def test_every_fixture_has_a_test(golden_folder: Path) -> None:
    files = {path.stem for path in golden_folder.iterdir() if path.suffix in (".npz", ".json")}
    assert files <= {name.removeprefix("test_") for name in globals() if name.startswith("test_")}
