"""BLOOM and its adapters equal stored outputs of the PyTorch reference; one test for each fixture file."""

import json
import re
from collections.abc import Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax.traverse_util import unflatten_dict
from safetensors.torch import save_file

import trees
from ymplug_jax.convert import bloom as tables
from ymplug_jax.convert import mplug_chat as chat_tables
from ymplug_jax.convert import rules, to_orbax
from ymplug_jax.core import stored_params
from ymplug_jax.data import chat_media, conversation, transforms
from ymplug_jax.models import attention, bloom, layers
from ymplug_jax.models.bloom import Bloom
from ymplug_jax.models.clip_vit import ClipViT
from ymplug_jax.models.language_model import positions
from ymplug_jax.models.lora import Lora, Settings
from ymplug_jax.models.mplug_chat import MPLUGChat
from ymplug_jax.models.query_abstractor import QueryAbstractor
from ymplug_jax.tasks.mplug_chat import packed_rows, passes

OUTPUT, GRADIENT = 1e-5, 1e-4


@pytest.fixture(autouse=True)
def exact_products() -> Iterator[None]:
    with jax.default_matmul_precision("highest"):
        yield


def model_of(config: dict, **more) -> Bloom:
    return Bloom(
        vocab=config["vocab_size"],
        width=config["hidden_size"],
        depth=config["n_layer"],
        heads=config["n_head"],
        ln_eps=config["layer_norm_epsilon"],
        **more,
    )


def untied(weights: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    (copy, original) = tables.TIED[0]
    np.testing.assert_array_equal(weights[copy], weights[original])
    return {name: value for name, value in weights.items() if name != copy}


def logits_of(model: Bloom, params: dict, ids: np.ndarray, mask: np.ndarray) -> tuple[jax.Array, dict]:
    embeds = model.apply({"params": params}, ids, method="embed")
    hidden, kept = model.apply({"params": params}, embeds, mask, capture_intermediates=True, mutable="intermediates")
    logits = model.apply({"params": params}, hidden, method="logits")
    return logits, {"embeddings": embeds, "hidden": hidden, **kept["intermediates"]["blocks"]}


def mean_loss(logits: jax.Array, labels: np.ndarray) -> jax.Array:
    targets = labels[:, 1:]
    kept = targets >= 0
    losses = jax.nn.logsumexp(logits[:, :-1], -1) - jnp.take_along_axis(
        logits[:, :-1], np.where(kept, targets, 0)[..., None], -1
    ).squeeze(-1)
    return jnp.sum(losses * kept) / kept.sum()


def test_bloom(read) -> None:
    file = read("bloom.npz")
    model, weights = model_of(file.config), untied(file.group("param"))
    params = trees.to_tree(tables.BLOOM, weights, tables.like_of(model))
    run = jax.jit(lambda *args: logits_of(model, *args))
    for side in ("left", "right"):
        ids, mask = file[f"in/{side}/input_ids"], file[f"in/{side}/attention_mask"]
        logits, out = run(params, ids, mask)
        bias = bloom.slopes(model.heads)[:, None, None] * positions(mask)[:, None, None]
        file.check(f"out/{side}/alibi", bias, OUTPUT)
        file.check(f"out/{side}/embeddings_ln", out["embeddings"], OUTPUT)
        states = jax.tree.leaves(out["__call__"])[0]
        file.check(f"out/{side}/hidden_0", out["embeddings"], OUTPUT)
        file.check(f"out/{side}/hidden_1", states[0], OUTPUT)
        file.check(f"out/{side}/hidden_2", out["hidden"], OUTPUT)
        file.check(f"out/{side}/logits", logits, OUTPUT)
        for i in range(model.depth):
            q, k, v = (out["attn"][part]["__call__"][0][i] for part in "qkv")
            file.check(f"out/{side}/cache_key_{i}", k.transpose(0, 2, 1, 3), OUTPUT)
            file.check(f"out/{side}/cache_value_{i}", v.transpose(0, 2, 1, 3), OUTPUT)
            one_hot = jnp.broadcast_to(jnp.eye(k.shape[1])[:, None], (*k.shape[:3], k.shape[1]))
            seen = mask[:, None, None].astype(bool)
            weights_of_keys = attention.attend(q, k, one_hot, causal=True, mask=seen, bias=bias)
            file.check(f"out/{side}/attn_probs_{i}", weights_of_keys.transpose(0, 2, 1, 3), OUTPUT)

        steps = []
        for _ in range(file.config["num_new_tokens"]):
            step = run(params, ids, mask)[0][:, -1]
            steps.append(step)
            ids = np.concatenate([ids, np.argmax(step, -1)[:, None].astype(ids.dtype)], axis=1)
            mask = np.concatenate([mask, np.ones_like(mask[:, :1])], axis=1)
        new = ids[:, -file.config["num_new_tokens"] :]
        np.testing.assert_array_equal(new, file[f"out/{side}/greedy_ids"])
        file.check(f"out/{side}/greedy_step_logits", np.stack(steps), OUTPUT)
        if side == "left":
            stopped = np.cumsum(new == file["in/left/eos_token_id"], axis=1) - (new == file["in/left/eos_token_id"]) > 0
            expected = np.where(stopped, file.config["pad_token_id"], new)
            np.testing.assert_array_equal(expected, file["out/left/greedy_ids_with_eos"])

    ids, mask, labels = (file[f"in/right/{name}"] for name in ("input_ids", "attention_mask", "labels"))
    loss, grads = jax.value_and_grad(lambda p: mean_loss(logits_of(model, p, ids, mask)[0], labels))(params)
    file.check("out/right/loss", loss, OUTPUT)
    file.check_all("grad/right", rules.to_torch(tables.BLOOM, grads), GRADIENT)
    np.testing.assert_array_equal(file["in/lengths"], file["in/left/attention_mask"].sum(axis=1))
    file.done()


def renamed(weights: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    for pattern, replacement in tables.RENAME:
        weights = {re.sub(pattern, replacement, name): value for name, value in weights.items()}
    return weights


def converted(folder: Path, wish: to_orbax.Wish, source: Path, like: dict) -> dict:
    """Parameters of a conversion, as `init_from` reads them."""
    to_orbax.to_orbax("bloom", [source], folder, wish)
    place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    like = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place), {"llm": like})
    return unflatten_dict(stored_params.load_params(str(folder), like), sep="/")["llm"]


def test_lora(read, tmp_path: Path) -> None:
    file = read("lora.npz")
    config, weights = file.config, untied(renamed(file.group("param")))
    plain = model_of(config["bloom"])
    model = plain.clone(lora_rank=config["r"], lora_scale=config["alpha"] / config["r"])
    base = {name: torch.from_numpy(value) for name, value in weights.items() if "lora_" not in name}
    adapter = {f"base_model.model.{n}": torch.from_numpy(value) for n, value in weights.items() if "lora_" in n}
    save_file(base, tmp_path / "model.safetensors")
    save_file(adapter, tmp_path / "adapter_model.safetensors")
    settings = {"peft_type": "LORA", "r": config["r"], "lora_alpha": config["alpha"], "bias": "none"}
    (tmp_path / "adapter_config.json").write_text(json.dumps(settings))
    wish = to_orbax.Wish(heads={"llm": plain.heads}, adapter=tmp_path)
    source = tmp_path / "model.safetensors"
    merged = converted(tmp_path / "merged", wish, source, tables.like_of(plain))
    params = converted(tmp_path / "kept", wish._replace(keep_adapter=True), source, tables.like_of(model))
    without = {**params, "blocks": {k: v for k, v in params["blocks"].items() if k != "lora"}}

    ids, mask = file["in/input_ids"], file["in/attention_mask"]
    file.check("out/logits_base", logits_of(plain, without, ids, mask)[0], OUTPUT)
    file.check("out/logits_lora", logits_of(model, params, ids, mask)[0], OUTPUT)
    logits = logits_of(plain, merged, ids, mask)[0]
    assert np.abs(logits - file["out/logits_lora"]).max() <= OUTPUT * np.abs(file["out/logits_lora"]).max()
    name = "transformer.h.0.self_attention.query_key_value.weight"
    file.check("out/merged_weight_h0", rules.to_torch(tables.BLOOM, merged)[name], OUTPUT)

    x, block = file["in/x"], jax.tree.map(lambda leaf: leaf[0], params["blocks"])
    attn = layers.Attention(plain.width, plain.heads, *[jax.nn.initializers.zeros] * 2)
    qkv = attn.apply({"params": block["attn"]}, x, method="project")
    adapters = Settings(model.lora_rank, model.lora_scale, 0.0, model.lora_targets)
    lora = Lora(adapters, bloom.LINEARS, fused=True, deterministic=True, dtype="float32")
    changed = lora.apply({"params": block["lora"]}, ("q", "k", "v"), x, qkv, method="update")
    for name, parts in (("base", qkv), ("lora", changed)):
        file.check(f"out/linear_{name}", np.stack(parts, axis=3).reshape(*x.shape[:2], -1), OUTPUT)
    bias = bloom.slopes(model.heads)[:, None, None] * np.arange(x.shape[1])
    y = attn.apply({"params": block["attn"]}, attention.attend(*changed, causal=True, bias=bias), method="output")
    file.check("out/attention_lora", y, OUTPUT)

    def loss_of(lora: dict) -> jax.Array:
        whole = {**params, "blocks": {**params["blocks"], "lora": lora}}
        return mean_loss(logits_of(model, whole, ids, mask)[0], file["in/labels"])

    loss, grads = jax.value_and_grad(loss_of)(params["blocks"]["lora"])
    file.check("out/loss_lora", loss, OUTPUT)
    zeros = jax.tree.map(jnp.zeros_like, params)
    named = rules.to_torch(tables.BLOOM, {**zeros, "blocks": {**zeros["blocks"], "lora": grads}})
    named = {re.sub(r"(lora_[AB])", r"\1.default", n): value for n, value in named.items() if "lora_" in n}
    file.check_all("grad", named, GRADIENT)
    file.done()


def frames_last(pixels: np.ndarray) -> np.ndarray:
    """[M, 3, S, S] or [M, 3, T, S, S] -> [M, T, S, S, 3]."""
    pixels = pixels if pixels.ndim == 5 else pixels[:, :, None]
    return pixels.transpose(0, 2, 3, 4, 1)


def tower_of(config: dict) -> ClipViT:
    return ClipViT(
        image_size=config["image_size"],
        patch_size=config["patch_size"],
        depth=config["num_hidden_layers"],
        width=config["hidden_size"],
        heads=config["num_attention_heads"],
        mlp=config["intermediate_size"],
        double_cls=True,
    )


def pool_of(config: dict, queries: int, mlp: int) -> QueryAbstractor:
    return QueryAbstractor(
        queries=queries,
        depth=config["num_hidden_layers"],
        heads=config["num_attention_heads"],
        mlp=mlp,
        dropout=config["attention_probs_dropout_prob"],
    )


def test_vision(read) -> None:
    file = read("vision.npz")
    model = tower_of(file.config)
    assert file.config["layer_norm_eps"] == 1e-6
    clip = frames_last(file["in/video"])
    like = jax.eval_shape(lambda: model.init(jax.random.key(0), clip)["params"])
    params = trees.to_tree(chat_tables.VISION, file.group("param"), like)
    for kind in ("image", "video"):
        media, weights = file[f"in/{kind}"], file[f"in/{kind}_cotangent"]

        def loss_of(params: dict, pixels: np.ndarray, weights: np.ndarray = weights) -> tuple[jax.Array, tuple]:
            tokens, kept = model.apply({"params": params}, pixels, capture_intermediates=True, mutable="intermediates")
            return jnp.sum(tokens * weights) / weights.size, (tokens, kept["intermediates"])

        loss, (tokens, kept) = loss_of(params, frames_last(media))
        blocks = kept["blocks"]
        file.check(f"out/{kind}/hidden_0", kept["norm_pre"]["__call__"][0], OUTPUT)
        states = blocks["__call__"][0][0]
        for i in range(model.depth):
            file.check(f"out/{kind}/hidden_{i + 1}", states[i], OUTPUT)
            q, k, _ = (blocks["attn"][part]["__call__"][0][i] for part in "qkv")
            q, k = (x.reshape(*x.shape[:2], model.heads, -1) for x in (q, k))
            one_hot = jnp.broadcast_to(jnp.eye(k.shape[1])[:, None], (*k.shape[:3], k.shape[1]))
            seen = attention.attend(q, k, one_hot)
            file.check(f"out/{kind}/attn_probs_{i}", seen.transpose(0, 2, 1, 3), OUTPUT)
            if kind == "video":
                before = kept["norm_pre"]["__call__"][0] if i == 0 else states[i - 1]
                added = jnp.concatenate([before[:, :, :1], blocks["temporal"]["__call__"][0][i]], axis=2)
                file.check(f"out/video/temporal_{i}", added, OUTPUT)
        file.check(f"out/{kind}/last_hidden_state", tokens, OUTPUT)
        norm = layers.norm(None, 1e-6, "float32")
        pooled = norm.apply({"params": params["norm"]}, tokens[:, :, 0].mean(axis=1))
        file.check(f"out/{kind}/pooler_output", pooled, OUTPUT)
        file.check(f"out/{kind}/loss", loss, OUTPUT)
        grads, pixels = jax.grad(lambda p, x, f=loss_of: f(p, x)[0], argnums=(0, 1))(params, frames_last(media))
        pixels = np.asarray(pixels).transpose(0, 4, 1, 2, 3).reshape(media.shape)
        file.check_all(f"grad/{kind}", {**rules.to_torch(chat_tables.VISION, grads), "input": pixels}, GRADIENT)
    file.done()


def test_abstractor(read) -> None:
    file = read("abstractor.npz")
    config = file.config
    model = pool_of(config, config["num_query_tokens"], config["mlp_hidden_width"])
    table, width = (*chat_tables.QUERIES, *chat_tables.ABSTRACTOR), config["language_hidden_size"]
    like = jax.eval_shape(lambda: model.init(jax.random.key(0), file["in/video_embeds"], width)["params"])
    params = trees.to_tree(table, file.group("param"), like)

    def run(params: dict, tokens: np.ndarray, **how) -> tuple[jax.Array, jax.Array]:
        out, kept = model.apply(
            {"params": params}, tokens, width, **how, capture_intermediates=True, mutable="intermediates"
        )
        return out, kept["intermediates"]["blocks"]["__call__"][0][0]

    image, video = file["in/image_embeds"], file["in/video_embeds"]
    mask = file["in/video_mask"].reshape(video.shape[:3])
    cases = {
        "image": (image, {}),
        "video": (video, {}),
        "video_masked": (video, {"mask": mask}),
        "video_no_temporal_query": (video, {"temporal": False}),
    }
    for name, (tokens, how) in cases.items():
        out, states = run(params, tokens, **how)
        for i in range(model.depth):
            file.check(f"out/{name}/layer_{i}", states[i], OUTPUT)
        file.check(f"out/{name}/last_hidden_state", out, OUTPUT)
        file.check(f"out/{name}/pooler_output", states[-1][:, 0], OUTPUT)
    for name, tokens in (("image", image), ("video", video)):
        weights = file[f"in/{name}_cotangent"]
        loss, (grads, at_tokens) = jax.value_and_grad(
            lambda p, x, w=weights: jnp.sum(run(p, x)[0] * w) / w.size, argnums=(0, 1)
        )(params, tokens)
        file.check(f"out/{name}/loss", loss, OUTPUT)
        named = {**rules.to_torch(table, grads), "encoder_hidden_states": np.asarray(at_tokens)}
        file.check_all(f"grad/{name}", named, GRADIENT)
    file.done()


IMAGE, VIDEO = -1, -2


def index_of(ids: np.ndarray, images: np.ndarray, clips: np.ndarray, slots: int) -> np.ndarray:
    """Row of the stacked media vectors (images first) at each position, -1 for text: the i-th run of slots has the i-th medium."""
    index = np.full(ids.shape, -1, np.int32)
    for kind, media, first in ((IMAGE, images, 0), (VIDEO, clips, len(images))):
        places = np.flatnonzero(ids.reshape(-1) == kind)
        assert len(places) == len(media) * slots
        rows = (first + np.arange(len(media)))[:, None] * slots + np.arange(slots)
        index.reshape(-1)[places] = rows.reshape(-1)
    return index


def test_full(read) -> None:
    file = read("full.npz")
    config = file.config
    weights = {name: value for name, value in file.group("param").items() if name != "language_model.lm_head.weight"}
    np.testing.assert_array_equal(
        file["param/language_model.lm_head.weight"], weights["language_model.transformer.word_embeddings.weight"]
    )
    heads = {
        "vision": config["vision"]["num_attention_heads"],
        "abstractor": config["abstractor"]["num_attention_heads"],
        "llm": config["bloom"]["n_head"],
    }
    model = chat_tables.model_of({name: value.shape for name, value in weights.items()}, heads)
    assert model == MPLUGChat(
        tower_of(config["vision"]),
        pool_of(config["abstractor"], config["num_query_tokens"], config["mlp_hidden_width"]),
        model_of(config["bloom"]),
    )
    params = trees.to_tree(chat_tables.WHOLE, weights, chat_tables.like_of(model))
    images, clips = frames_last(file["in/pixel_values"]), frames_last(file["in/video_pixel_values"])
    slots = config["media_slots"]
    assert (config["image_token_id"], config["video_token_id"]) == (IMAGE, VIDEO)

    @jax.jit
    def encode(params: dict, pixels: np.ndarray) -> jax.Array:
        return model.apply({"params": params}, pixels, method="encode_media")

    def embed(params: dict, media: jax.Array, ids: np.ndarray, index: np.ndarray) -> jax.Array:
        return model.apply({"params": params}, ids, media, index, method="embed")

    @jax.jit
    def read_on(params: dict, embeds: jax.Array, mask: np.ndarray | None) -> tuple[jax.Array, jax.Array, jax.Array]:
        hidden, kept = model.apply(
            {"params": params}, embeds, mask, method="hidden", capture_intermediates=True, mutable="intermediates"
        )
        logits = model.apply({"params": params}, hidden, method="logits")
        return logits, hidden, jax.tree.leaves(kept["intermediates"]["llm"]["blocks"]["__call__"])[0]

    seen_images, seen_clips = encode(params, images), encode(params, clips)
    file.check("out/train/image_features", seen_images, OUTPUT)
    file.check("out/train/video_features", seen_clips, OUTPUT)

    # Training: media anywhere, the loss on answers only.
    ids, mask = file["in/train/input_ids"], file["in/train/attention_mask"]
    assert file["in/train/num_images"].sum() == len(images)
    assert file["in/train/num_videos"].sum() == len(clips)
    loss_mask = np.ones_like(file["in/train/prompt_mask"])
    for name in ("non_padding_mask", "non_media_mask", "prompt_mask"):
        loss_mask = loss_mask * file[f"in/train/{name}"]
    np.testing.assert_array_equal(loss_mask, file["out/train/loss_mask"])
    labels = np.where(np.pad(loss_mask, ((0, 0), (1, 0))) > 0, ids, -100)
    np.testing.assert_array_equal(labels, file["out/train/labels"])
    index = index_of(ids, images, clips, slots)
    embeds = embed(params, jnp.concatenate([seen_images, seen_clips]), ids, index)
    file.check("out/train/inputs_embeds", embeds, OUTPUT)
    logits, hidden, states = read_on(params, embeds, mask)
    file.check("out/train/logits", logits, OUTPUT)
    file.check("out/train/logits_no_attention_mask", read_on(params, embeds, None)[0], OUTPUT)
    file.check("out/train/lm_hidden_0", embeds, OUTPUT)
    for i in range(1, model.llm.depth):
        file.check(f"out/train/lm_hidden_{i}", states[i - 1], OUTPUT)
    file.check(f"out/train/lm_hidden_{model.llm.depth}", hidden, OUTPUT)

    def loss_of(params: dict, change: np.ndarray) -> jax.Array:
        media = jnp.concatenate([encode(params, images), encode(params, clips)])
        return mean_loss(read_on(params, embed(params, media, ids, index) + change, mask)[0], labels)

    run = jax.jit(jax.value_and_grad(loss_of, argnums=(0, 1)))
    loss, (grads, at_embeds) = run(params, np.zeros(embeds.shape, np.float32))
    file.check("out/train/loss", loss, OUTPUT)
    named = {**rules.to_torch(chat_tables.WHOLE, grads), "inputs_embeds": np.asarray(at_embeds)}
    file.check_all("grad/train", named, GRADIENT)

    # Still images only: what is meant, and the public forward without the norm of the word embeddings.
    ids, loss_mask = file["in/asis_image/input_ids"], file["in/asis_image/loss_mask"]
    labels = np.where(np.pad(loss_mask, ((0, 0), (1, 0))) > 0, ids, -100)
    stills = frames_last(file["in/asis_image/pixel_values"])
    index = index_of(ids, stills, clips[:0], slots)
    embeds = embed(params, encode(params, stills), ids, index)
    table = params["llm"]["token_embed"]
    without_norm = jnp.where((index < 0)[..., None], table[np.maximum(ids, 0)], embeds)
    for name, given in (("intended_image", embeds), ("asis_image", without_norm)):
        logits = read_on(params, given, None)[0]
        file.check(f"out/{name}/logits", logits, OUTPUT)
        file.check(f"out/{name}/loss", mean_loss(logits, labels), OUTPUT)

    # Generation.
    media = jnp.concatenate([seen_images[file["in/gen/image_index"]], seen_clips[file["in/gen/video_index"]]])
    chosen = images[file["in/gen/image_index"]], clips[file["in/gen/video_index"]]
    count, eos, pad = config["num_new_tokens"], file["in/gen/eos_token_id"], config["bloom"]["pad_token_id"]

    def greedy(name: str) -> tuple[np.ndarray, np.ndarray, jax.Array, np.ndarray]:
        ids, mask = file[f"in/{name}/input_ids"], file[f"in/{name}/attention_mask"]
        prompt, length = embed(params, media, ids, index_of(ids, *chosen, slots)), ids.shape[1]
        embeds = jnp.pad(prompt, ((0, 0), (0, count), (0, 0)))  # attention is causal: what follows is not seen
        seen, steps = np.pad(mask, ((0, 0), (0, count))), []
        for i in range(length, length + count):
            logits = read_on(params, embeds, seen)[0]
            steps.append(np.asarray(logits[:, i - 1]))
            new = np.argmax(steps[-1], -1)[:, None]
            last = model.apply({"params": params}, new, None, np.full_like(new, -1), method="embed")
            embeds, seen[:, i] = embeds.at[:, i].set(last[:, 0]), 1
        return np.stack([step.argmax(-1) for step in steps], 1).astype(np.int32), np.stack(steps), prompt, mask

    new, steps, prompt, mask = greedy("gen")
    file.check("out/gen/inputs_embeds", prompt, OUTPUT)
    np.testing.assert_array_equal(mask, file["out/gen/attention_mask"])
    # At padding, which sees no key, the logits depend on the length.
    file.check("out/gen/prompt_logits", read_on(params, prompt, mask)[0], OUTPUT)
    file.check("out/gen/greedy_step_logits", steps, OUTPUT)
    np.testing.assert_array_equal(new, file["out/gen/greedy_ids"])
    bos = np.full_like(new[:, :1], config["bloom"]["bos_token_id"])
    np.testing.assert_array_equal(np.concatenate([bos, new], axis=1), file["out/gen/sequences_raw"])
    stopped = np.cumsum(new == eos, axis=1) - (new == eos) > 0
    np.testing.assert_array_equal(np.where(stopped, pad, new), file["out/gen/greedy_ids_with_eos"])
    np.testing.assert_array_equal(greedy("gen_rightpad")[0], file["out/gen_rightpad/greedy_ids"])
    file.done()


class Bytes:
    """The toy tokenizer of the fixture: byte b of UTF-8 is 4 + b."""

    bos, eos, pad = 1, 2, 3

    def encode(self, text: str) -> list[int]:
        return [4 + byte for byte in text.encode()]


def test_loss_of_the_task(read) -> None:
    """The stored batch, with the media of each row beside it as the task packs them, has the stored loss."""
    file = read("full.npz")
    config, slots = file.config, file.config["media_slots"]
    heads = {
        "vision": config["vision"]["num_attention_heads"],
        "abstractor": config["abstractor"]["num_attention_heads"],
        "llm": config["bloom"]["n_head"],
    }
    weights = {name: value for name, value in file.group("param").items() if name != "language_model.lm_head.weight"}
    model = chat_tables.model_of({name: value.shape for name, value in weights.items()}, heads)
    params = trees.to_tree(chat_tables.WHOLE, weights, chat_tables.like_of(model))
    ids, mask = file["in/train/input_ids"], file["in/train/attention_mask"]
    rows, (images, videos) = len(ids), (file[f"in/train/num_{kind}"] for kind in ("images", "videos"))
    clips = frames_last(file["in/video_pixel_values"])
    shape = packed_rows.Shape(ids.shape[1], slots, int(images.max()), int(videos.max()), clips.shape[1], clips.shape[2])

    def beside(pixels: np.ndarray, counts: np.ndarray) -> np.ndarray:
        """Pixels before normalisation, f32[B, most, T, S, S, 3]: the stored ones are all rows' one after the other."""
        out = np.zeros((rows, counts.max(), *pixels.shape[1:]), np.float32)
        for row, (end, count) in enumerate(zip(np.cumsum(counts), counts, strict=True)):
            out[row, :count] = pixels[end - count : end]
        return (out * transforms.CLIP_STD + transforms.CLIP_MEAN).astype(np.float32) * 255

    batch = {
        "ids": np.pad(np.maximum(ids, 0), ((0, 0), (0, 1))),
        "answer": np.pad(file["out/train/loss_mask"], ((0, 0), (1, 1)))[:, : ids.shape[1] + 1],
        "segments": np.pad(mask, ((0, 0), (0, 1))),
        "index": np.stack([packed_rows.index_of(row, shape) for row in ids]),
        "images": beside(frames_last(file["in/pixel_values"]), images),
        "videos": beside(clips, videos),
        "valid": np.ones(rows, bool),
    }
    loss, metrics = jax.jit(lambda p, b: passes.loss_of(model, p, b, None, keep_logits=False))(params, batch)
    assert metrics["loss"].weight == file["out/train/loss_mask"].sum()
    file.check("out/train/loss", loss, OUTPUT)


def test_text_pipeline(read) -> None:
    file = read("text_pipeline.npz")
    config, words = file.config, Bytes()
    slots = config["media_slots"]
    assert config["media_tokens"] == conversation.PLACEHOLDERS
    for i, case in enumerate(config["conversations"]):
        limit = case["max_length"]
        found = conversation.for_training(case["text"], words, slots, limit, reference=True)
        padded = np.pad(found.ids, (0, limit + 1 - len(found.ids)), constant_values=words.pad)
        np.testing.assert_array_equal(padded, file[f"out/conv_{i}/input_ids"], err_msg=case["text"])
        assert len(found.ids) == file[f"out/conv_{i}/seq_length"]
        targets = np.arange(1, limit + 1)
        np.testing.assert_array_equal(targets < len(found.ids), file[f"out/conv_{i}/non_padding_mask"])
        np.testing.assert_array_equal(padded[1:] >= 0, file[f"out/conv_{i}/non_media_mask"])
        answer = np.pad(found.answer, (0, limit + 1 - len(found.ids)))[1:]
        np.testing.assert_array_equal(answer, file[f"out/conv_{i}/prompt_mask"], err_msg=case["text"])

    rows = [conversation.for_answering(text, words, slots, piecewise=False) for text in config["prompts"]]
    longest = max(map(len, rows))
    padded = [np.pad(row, (0, longest - len(row)), constant_values=words.eos) for row in rows]
    np.testing.assert_array_equal(padded, file["out/prompts/input_ids"])
    mask = [np.arange(longest) < len(row) for row in rows]
    np.testing.assert_array_equal(mask, file["out/prompts/attention_mask"])

    for i, (total, frames) in enumerate(config["frame_cases"]):
        np.testing.assert_array_equal(chat_media.frame_indices(total, frames), file[f"out/frames_{i}"])
    image = chat_media.still_pixels(file["in/image_u8"], config["image_size"])
    file.check("out/image_pixels", image[0].transpose(2, 0, 1), OUTPUT)
    clip = chat_media.normalised(file["in/frames_u8"])
    file.check("out/video_pixels", clip.transpose(3, 0, 1, 2)[None], OUTPUT)
    file.done()
