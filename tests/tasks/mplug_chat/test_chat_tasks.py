"""The tasks of the chat model on a tiny model: packed examples, the loss, partitions, meshes and checks at start."""

import dataclasses
import json
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import chat
import shards
from configs.mplug_chat import instruct as instruct_config
from ymplug_jax.analysis import hlo
from ymplug_jax.convert import vit
from ymplug_jax.core import config, state
from ymplug_jax.core.exits import Mistake
from ymplug_jax.data import chat_media, conversation, frames
from ymplug_jax.data.packing import Size
from ymplug_jax.data.records import Record
from ymplug_jax.models import mplug_chat
from ymplug_jax.models.clip_vit import SIZES
from ymplug_jax.models.timesformer import TimeSformer
from ymplug_jax.tasks import options
from ymplug_jax.tasks import task as task_lib
from ymplug_jax.tasks.mplug_chat import packed_rows, passes
from ymplug_jax.training import parameter_table, setup, vision_settings
from ymplug_jax.training import step as step_lib

COUNTS = {
    "adapters_abstractor": (111_038_464, "1.48 %"),
    "lora": (3_932_160, "0.0525 %"),
    "adapters_abstractor_lora": (114_970_624, "1.54 %"),
    "all_linears": (126_767_104, "1.69 %"),
}
TEXT = chat.talk("text", (), [("红色", "圆形"), ("蓝色", "在移动")])
IMAGE = chat.talk("image", ("image",), [("红色", "圆形在移动")], seed=1)
CLIP = chat.talk("clip", ("clip",), [("绿色", "方形")], seed=2)
BOTH = chat.talk("both", ("image", "clip", "image"), [("蓝色", "三角形")], seed=3)
SILENT = chat.talk("silent", ("image",), [], seed=4)
ROWS = ((TEXT, CLIP), (IMAGE, CLIP), (BOTH,), (SILENT,))


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(shards.tokenizer(tmp_path_factory.mktemp("chat") / "t.model"))


@pytest.mark.parametrize("partition", mplug_chat.PARTITIONS)
def test_trained_parameters(partition: str) -> None:
    run = setup.prepare(config.from_config_dict(instruct_config.get_config(f"7b-{partition}")), jax.devices()[:1])
    count, share = COUNTS[partition]
    assert state.count(run.state.trainable) == count
    assert f"trained {count:,} ({share})" in parameter_table.table(run)


def test_a_clip_conversion_fills_the_tower_but_for_its_temporal_parts() -> None:
    """`init_from=llm=BLOOM_DIR,vision=CLIP_DIR`: what a conversion of CLIP L/14 lacks may start fresh, and nothing else."""
    made = chat.MODEL.clone(vision=SIZES["l14"].clone(depth=2))
    ours = state.flatten({"vision": jax.eval_shape(lambda: mplug_chat.init(made, jax.random.key(0)))["vision"]})
    clip = TimeSformer(image_size=224, patch_size=14, depth=2, width=1024, heads=16, mlp_ratio=4.0, frames=1)
    theirs = state.flatten({"vision": vit.spatial_like(clip)})
    assert {path: leaf.shape for path, leaf in theirs.items()} == {path: ours[path].shape for path in theirs}
    missing = ours.keys() - theirs.keys()
    assert missing == {path for path in ours for pattern in mplug_chat.FRESH if re.fullmatch(pattern, path)}


def test_packed_examples(tokenizer: str) -> None:
    task = task_lib.get(chat.experiment(tokenizer))
    example = task.example(
        [TEXT, IMAGE, BOTH._replace(text="\n".join(BOTH.text.split("\n")[:2]), media=BOTH.media[:2])],
        np.random.default_rng(0),
    )
    assert {key: (value.shape, value.dtype) for key, value in example.items()} == {
        key: (leaf.shape, leaf.dtype) for key, leaf in task.spec.items()
    }
    known = passes.preprocess.tokenizer_for(chat.experiment(tokenizer).data, 64)
    ids, answer, segments, index = (example[key] for key in ("ids", "answer", "segments", "index"))
    begin = 0
    for number, record in enumerate((TEXT, IMAGE), 1):
        tokens = conversation.for_training(record.text, known, chat.SLOTS, chat.LENGTH)
        place = segments == number
        assert task.measure(record) == Size(len(tokens.ids), len(record.media), 0) and place.sum() == len(tokens.ids)
        np.testing.assert_array_equal(ids[place], np.maximum(tokens.ids, 0))
        np.testing.assert_array_equal(answer[place], tokens.answer)
        assert ids[begin] == known.bos and ids[begin + len(tokens.ids) - 1] == known.eos
        begin += len(tokens.ids)
    slots = index[index >= 0].reshape(-1, chat.SLOTS)
    assert [row[0] // chat.SLOTS for row in slots] == [0, 1, 2], "the images of the row, then its clip"
    np.testing.assert_array_equal(slots % chat.SLOTS, np.tile(np.arange(chat.SLOTS), (3, 1)))
    assert (segments[:-1][index >= 0] > 1).all() and not answer[:-1][index >= 0].any()
    picture = frames.decode_frames(IMAGE.media[0].frames, [0])[0]
    np.testing.assert_array_equal(example["images"][0], chat_media.still(picture, 16))
    decoded = frames.decode_frames(BOTH.media[1].frames, chat_media.frame_indices(4, 2))
    np.testing.assert_array_equal(example["videos"][0], chat_media.clip(decoded, 16))
    assert not example["videos"][1].any()


def test_titles_are_packed_with_their_clips(tokenizer: str) -> None:
    task = task_lib.get(chat.experiment(tokenizer, "pretrain"))
    records = [
        Record(f"{i}", chat.medium("clip", i).frames, np.arange(4), shards.title(i), [], "", -1) for i in range(2)
    ]
    example = task.example(records, None)
    known = passes.preprocess.tokenizer_for(chat.experiment(tokenizer).data, 64)
    for i, record in enumerate(records):
        row = example["ids"][example["segments"] == i + 1]
        title = known.encode(record.title)
        assert row.tolist() == [known.bos, *[0] * chat.SLOTS, *title, known.eos]
        assert task.measure(record) == Size(len(row), 0, 1)
        assert example["answer"][example["segments"] == i + 1].tolist() == [0] * (1 + chat.SLOTS) + [1] * (
            len(title) + 1
        )
    long = packed_rows.titled(list(range(90)), 1, 2, chat.SLOTS, chat.LENGTH)
    assert len(long.ids) == chat.LENGTH + 1 and long.ids[-1] == 2


def test_what_does_not_fit_is_named(tokenizer: str) -> None:
    task = task_lib.get(chat.experiment(tokenizer))
    assert task.measure(SILENT) == Size(0, 0, 0) and task.room == Size(chat.LENGTH + 1, 2, 2)
    with pytest.raises(
        ValueError, match=r"config.options.images_per_row: 2, but the row that begins with image has 3 images"
    ):
        task.example([IMAGE, IMAGE, IMAGE], None)
    with pytest.raises(ValueError, match=r"text: a row of 49 tokens cannot hold \d+"):
        task.example([TEXT] * 9, None)
    with pytest.raises(
        ValueError, match="both: its text has placeholders for image, clip, image, but the record holds image, image"
    ):
        task.example([BOTH._replace(media=IMAGE.media * 2)], None)


QUIET = chat.model("all_linears")
QUIET = QUIET.clone(abstractor=QUIET.abstractor.clone(dropout=0.0))


@pytest.fixture(scope="module")
def packed(tokenizer: str):
    """The loss with its gradient, compiled once, on one device."""
    run = chat.prepare(tokenizer, model=QUIET)
    params = chat.params_of(run)
    gradient = jax.jit(jax.value_and_grad(lambda p, batch: run.task.loss(p, batch, None), has_aux=True))
    return run, params, gradient


def test_packed_rows_equal_rows_of_their_own(packed) -> None:
    run, params, gradient = packed
    (loss, metrics), grads = gradient(params, chat.batch_of(run, ROWS))
    alone = [record for row in ROWS for record in row]
    total, weight, summed = 0.0, 0.0, jax.tree.map(jnp.zeros_like, params)
    for i in range(0, len(alone), 4):
        some = [[record] for record in alone[i : i + 4]]
        batch = chat.batch_of(run, some + [[TEXT]] * (4 - len(some)), valid=np.arange(4) < len(some))
        (_, one), own = gradient(params, batch)
        total, weight = total + float(one["loss"].total), weight + float(one["loss"].weight)
        summed = jax.tree.map(lambda a, b, w=one["loss"].weight: a + w * b, summed, own)
    assert weight == metrics["loss"].weight > 0
    np.testing.assert_allclose(loss, total / weight, rtol=1e-5)
    for path, leaf in state.flatten(grads).items():
        other = state.flatten(summed)[path] / weight
        np.testing.assert_allclose(leaf, other, atol=1e-5 * max(1.0, float(jnp.abs(other).max())), err_msg=path)


def test_rows_without_a_target_have_no_loss(packed) -> None:
    run, params, gradient = packed
    (loss, metrics), grads = gradient(params, chat.batch_of(run, [[SILENT]] * 4))
    assert loss == 0 and metrics["loss"].weight == 0
    assert all(np.all(np.asarray(leaf) == 0) for leaf in jax.tree.leaves(grads))
    (loss, metrics), grads = gradient(params, chat.batch_of(run, ROWS, valid=np.zeros(4, bool)))
    assert loss == 0 and all(np.isfinite(leaf).all() for leaf in jax.tree.leaves((metrics, grads)))


def assert_learns(run: setup.Run, step: step_lib.Step, now: state.TrainState, frozen: dict, batch: dict) -> None:
    """Check that the loss falls, every trained parameter moves and the frozen ones keep their bits."""
    before = {path: np.array(leaf).tobytes() for path, leaf in state.flatten(frozen).items()}
    start = {path: np.array(leaf) for path, leaf in state.flatten(now.trainable).items()}
    losses = []
    for _ in range(8):
        now, metrics = step(now, frozen, batch, jax.random.key(0))
        losses.append(metrics["loss"].value())
    assert losses[-1] < losses[0] - 0.05, losses
    assert {path: np.array(leaf).tobytes() for path, leaf in state.flatten(frozen).items()} == before
    assert not [path for path, leaf in state.flatten(now.trainable).items() if np.array_equal(start[path], leaf)]
    assert not any(path.startswith("llm/") and "/lora/" not in path for path in start)


@pytest.mark.parametrize("partition", ["adapters_abstractor", "lora"])
def test_the_loss_falls_and_frozen_parameters_stay(partition: str, tokenizer: str) -> None:
    """The other two partitions have the same frozen parameters; one is trained on a mesh below. Clips alone halve what is compiled."""
    run = chat.prepare(tokenizer, partition=partition, options={"images_per_row": 0}, optim={"lr": 3e-2})
    step, batch = step_lib.compile_step(run), chat.batch_of(run, ((TEXT, CLIP), (CLIP,), (TEXT,), (CLIP, CLIP)))
    assert_learns(run, step, *chat.started(run, chat.params_of(run)), batch)


def test_micro_batches_on_a_mesh_give_the_same_gradient(packed, tokenizer: str) -> None:
    """Every row twice: the mean over a batch of 8 in two micro-batches on four devices is the mean over the 4 rows on one."""
    one, params, gradient = packed
    (loss, _), grads = gradient(params, chat.batch_of(one, ROWS))
    train = {"batch_size": 8, "accumulate": 2}
    run = chat.prepare(
        tokenizer, 4, model=QUIET, mesh={"data": 2, "fsdp": 2}, train=train, partition="all_linears", optim={"lr": 3e-2}
    )
    step = step_lib.compile_step(run)
    now, held = chat.started(run, params)
    batch = chat.batch_of(run, [*ROWS, *reversed(ROWS)])
    now, metrics = step(now, held, batch, jax.random.key(0))
    np.testing.assert_allclose(metrics["loss"].value(), loss, rtol=1e-5)
    assert metrics["packed_rows"].value() == 6 / 4
    np.testing.assert_allclose(
        metrics["padding"].value(), np.mean(np.asarray(batch["segments"])[:, :-1] == 0), rtol=1e-6
    )
    norm = np.sqrt(sum(float(jnp.sum(leaf**2)) for leaf in jax.tree.leaves(state.split(grads, run.frozen_patterns)[0])))
    np.testing.assert_allclose(metrics["grad_norm"].value(), norm, rtol=1e-5)
    share = 0.1 * min(
        1.0, run.experiment.optim.clip / norm
    )  # the first moment of Adam is a tenth of the clipped gradient
    for path, leaf in state.flatten(now.opt_state[1].mu).items():
        expected = share * np.asarray(state.flatten(grads)[path])
        np.testing.assert_allclose(leaf, expected, atol=1e-4 * max(1e-3, np.abs(expected).max()), err_msg=path)
    gathered = [one for one in hlo.collectives(step.as_text(), run.mesh.shape) if one.kind == "all-gather"]
    assert gathered, "the weights"
    shapes = " ".join(shape for one in gathered for shape in one.shapes)
    assert not re.search(rf"[\[,]({chat.SLOTS}|{4 * chat.SLOTS}),{chat.MODEL.llm.width}\]", shapes), (
        "vectors of media stay"
    )
    assert_learns(run, step, now, held, batch)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data": {"augment": True}}, "config.data.augment: True, but the chat tasks read frames as they are"),
        ({"data": {"frames": 1}}, "config.data.frames: 1, but a clip needs 2 or more"),
        ({"data": {"image_size": 32}}, "config.data.image_size: 32, but config.model.vision.image_size is 16"),
        ({"data": {"max_tokens": 4}}, r"config.data.max_tokens: 4 cannot hold the 3 slots of an image or clip"),
        ({"model": chat.MODEL.clone(vision=chat.MODEL.vision.clone(dtype="float16"))}, "config.model.vision.dtype: float16 overflows"),
        ({"model": chat.MODEL.clone(llm=chat.MODEL.llm.clone(vocab=8))}, "tokens, the model only 8"),
    ],
)  # fmt: skip
def test_settings_that_do_not_agree(changes: dict, message: str, tokenizer: str) -> None:
    with pytest.raises(ValueError, match=message):
        task_lib.get(chat.experiment(tokenizer, **changes))


def test_a_released_decoder_has_its_own_marks(tokenizer: str) -> None:
    bloom = chat.MODEL.clone(llm=chat.MODEL.llm.clone(vocab=250880))
    task_lib.get(chat.experiment(tokenizer, model=bloom))  # bos 1, eos 2
    qwen = dataclasses.replace(chat.experiment(tokenizer), model=instruct_config.recipe.model("qwen2.5-1.5b", "lora"))
    qwen = dataclasses.replace(qwen, data=dataclasses.replace(qwen.data, image_size=224, max_tokens=2048))
    with pytest.raises(
        Mistake, match=r"texts begin with .* and end with token 2, but this decoder was trained with 151643 and 151643"
    ):
        task_lib.get(qwen)


def test_weights_and_shards_are_compared_by_content(tokenizer: str, tmp_path: Path) -> None:
    before = chat.experiment(tokenizer)
    for name, text in (
        ("run/config.json", config.to_json(options.completed(before))),
        ("made/conversion.json", json.dumps({"sizes": {"MPLUGChat": config.settings_of(before.model)}})),
    ):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_text(text, encoding="utf-8")
    doubled = chat.MODEL.clone(vision=chat.MODEL.vision.clone(double_cls=True))
    for source in ("run", "vision=made", "llm=run"):
        start = {"init_from": source.replace("run", str(tmp_path / "run")).replace("made", str(tmp_path / "made"))}
        vision_settings.check(chat.experiment(tokenizer, train=start))
        other = chat.experiment(tokenizer, train=start, model=doubled)
        if source == "llm=run":
            vision_settings.check(other)
            continue
        with pytest.raises(Mistake, match=r"config.model.vision.double_cls: True, but .* was trained with False"):
            vision_settings.check(other)
    (tmp_path / "manifest.json").write_text(json.dumps({"frames": {"per_clip": 4}}), encoding="utf-8")
    task_lib.get(chat.experiment(tokenizer, data={"path": str(tmp_path), "frames": 4}))
    with pytest.raises(Mistake, match=r"config.data.frames: 5, but .* holds 4 frames per clip; lower it"):
        task_lib.get(chat.experiment(tokenizer, data={"path": str(tmp_path), "frames": 5}))
