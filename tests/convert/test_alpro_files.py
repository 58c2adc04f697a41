"""ALPRO's checkpoints in four layouts: recognised, exact round trips, and outputs equal to those of Hugging Face's layers."""

from pathlib import Path

import jax
import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from ymplug_jax.convert import __main__ as command
from ymplug_jax.convert import alpro as tables
from ymplug_jax.core import state, stored_params

GOLDEN = Path(__file__).parents[1] / "golden" / "alpro"
FILES = {
    "pretrain.npz": ("youku", 4),
    "retrieval.npz": ("youku", 4),
    "classification.npz": ("youku", 3),
    "pretrain_sf.npz": ("salesforce", 4),
    "retrieval_sf.npz": ("salesforce", 4),
    "prompter_sf.npz": ("prompter", 4),
    "qa_sf.npz": ("salesforce_qa", 4),
}


def tensors(file: str) -> dict[str, torch.Tensor]:
    """The state dict of a golden file: parameters and buffers."""
    with np.load(GOLDEN / file) as arrays:
        named = {name.partition("/")[2]: arrays[name] for name in arrays if name.startswith(("param/", "buffer/"))}
    return {name: torch.from_numpy(value) for name, value in named.items()}


@pytest.mark.parametrize("file", FILES)
def test_there_agrees_and_back_is_equal(file: str, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    layout, heads = FILES[file]
    source = tensors(file)
    torch.save({"model": source}, tmp_path / "x.pt")
    argv = ["--model", "alpro", "--source", str(tmp_path / "x.pt"), "--out", str(tmp_path / "orbax"), "--check"]
    assert command.main([*argv, "--heads", "text=4", f"vision={heads}"]) == 0
    assert "modules against PyTorch" in capsys.readouterr().out
    back = ["--model", "alpro", "--source", str(tmp_path / "orbax"), "--out", str(tmp_path / "back"), "--to", "torch"]
    assert command.main(back) == 0
    found = load_file(tmp_path / "back" / "model.safetensors")
    lost = {name for name in source.keys() - found.keys()}
    assert all("position_ids" in name or "visual_encoder.model.head" in name or "prompt_feat" in name for name in lost)
    assert "prompter.video_prompt_feat" not in lost and found.keys() <= source.keys()
    for name, value in found.items():
        expected = source[name].clone()
        if name.endswith("qkv.bias"):  # the key bias cancels in softmax and is dropped
            expected.view(3, -1)[1] = 0
        assert torch.equal(value, expected), name
    assert tables.layout_of({name: tuple(value.shape) for name, value in source.items()}) == layout


def test_a_release_starts_a_run(tmp_path: Path) -> None:
    """A Salesforce checkpoint has all parameters of pre-training, with the prompter and its entities."""
    torch.save(tensors("pretrain_sf.npz"), tmp_path / "x.pt")
    argv = ["--model", "alpro", "--source", str(tmp_path / "x.pt"), "--out", str(tmp_path / "orbax")]
    assert command.main([*argv, "--heads", "text=4", "vision=4"]) == 0
    shapes = {name: tuple(value.shape) for name, value in tensors("pretrain_sf.npz").items()}
    model = tables.model_of(shapes, "salesforce", {"text": 4, "vision": 4})
    assert (model.entities, model.masked, model.variant) == (6, True, "salesforce")
    from ymplug_jax.models import alpro

    like = jax.eval_shape(lambda: alpro.init(model, jax.random.key(0)))
    place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    abstract = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place), like)
    found = stored_params.load_params(str(tmp_path / "orbax"), abstract)
    assert found.keys() == state.flatten(like).keys()
    np.testing.assert_array_equal(found["prompter/entities"], tensors("pretrain_sf.npz")["prompter.video_prompt_feat"])


def test_released_sizes_are_known() -> None:
    """Youku-mPLUG's ViT-B/16 has 8 heads, Salesforce's 12; BERT's twelve layers are split in the middle."""

    def shapes(prefix: str, inner: str, time: str) -> dict[str, tuple[int, ...]]:
        found = {
            f"{inner}cls_token": (1, 1, 768),
            f"{inner}patch_embed.proj.weight": (768, 3, 16, 16),
            f"{inner}pos_embed": (1, 197, 768),
            f"{inner}{time}": (1, 4, 768),
            f"{inner}blocks.0.mlp.fc1.weight": (3072, 768),
            f"{inner}blocks.11.mlp.fc1.weight": (3072, 768),
            f"{prefix}embeddings.word_embeddings.weight": (21128, 768),
            f"{prefix}embeddings.position_embeddings.weight": (512, 768),
            f"{prefix}embeddings.token_type_embeddings.weight": (2, 768),
            "vision_proj.weight": (256, 768),
            "itm_head.weight": (2, 768),
        }
        layers = {f"{prefix}encoder.layer.{i}.intermediate.dense.weight": (3072, 768) for i in range(12)}
        return found | layers

    youku = tables.model_of(shapes("text_encoder.bert.", "visual_encoder.", "temporal_embed"), "youku", {})
    assert (youku.vision.heads, youku.vision.depth, youku.text.depth, youku.fusion.depth) == (8, 12, 6, 6)
    assert not youku.masked and youku.matching and youku.vision.frames == 4
    other = shapes("text_encoder.bert.", "visual_encoder.model.", "time_embed")
    assert tables.layout_of(other) == "salesforce"
    assert tables.model_of(other, "salesforce", {}).vision.heads == 12
