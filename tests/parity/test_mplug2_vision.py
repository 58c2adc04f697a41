"""The vision towers of mPLUG-2 equal stored outputs of the PyTorch reference; one test for each fixture file."""

import re
from collections.abc import Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import trees
from ymplug_jax.convert import clip_video, rules
from ymplug_jax.models import clip_vit, layers, temporal
from ymplug_jax.models.clip_vit import VideoClipViT

OUTPUT, GRADIENT = 1e-5, 1e-4


@pytest.fixture(autouse=True)
def exact_products() -> Iterator[None]:
    with jax.default_matmul_precision("highest"):
        yield


@pytest.fixture(scope="module")
def golden_folder(request: pytest.FixtureRequest) -> Path:
    root = Path(request.config.getoption("golden", None) or Path(__file__).parents[1] / "golden")
    if not (root / "mplug2").is_dir():
        pytest.skip(f"{root} has no folder mplug2")
    return root / "mplug2"


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


def frames_last(pixels: np.ndarray) -> np.ndarray:
    """[B, 3, T, S, S] -> [B, T, S, S, 3]."""
    return pixels.transpose(0, 2, 3, 4, 1)


def channels_first(tokens: jax.Array) -> jax.Array:
    """Patches [B, T, P, D] -> [B, D, T, h, w]."""
    b, t, p, d = tokens.shape
    side = round(p**0.5)
    return tokens.transpose(0, 3, 1, 2).reshape(b, d, t, side, side)


def check_tower(
    file, model: VideoClipViT, table: tuple[rules.Rule, ...], prefix: str, output: str, merged: bool
) -> None:
    """Compare what a tower returns and computes inside, its loss and the loss's gradients; `prefix` is that of the names."""
    video = frames_last(file["in/video"])
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
        file.check(f"out/pos_embed_{name}", layers.resize_pos_embed(file["in/pos_embed"], len(wanted) - 1), OUTPUT)
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
