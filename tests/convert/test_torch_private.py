"""The private names of torch that the converters use. A torch release that changes them fails here, not in a conversion."""

import ast
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

CONVERT = Path(__file__).parents[2] / "ymplug_jax" / "convert"
# torch's notes on serialization document both. No public API gives the offsets of tensors without reading their bytes.
USED = {"torch._subclasses.fake_tensor", "_checkpoint_offset"}


def test_no_other_private_name_is_used():
    found: set[str] = set()
    for path in CONVERT.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("torch"):
                found |= {node.module} if "._" in node.module else set()
            if isinstance(node, ast.Attribute) and node.attr.startswith("_") and not node.attr.startswith("__"):
                owner = node.value.id if isinstance(node.value, ast.Name) else ""
                found |= {node.attr} if owner in ("storage", "torch") else set()
    assert found == USED


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_fake_tensor_tells_where_its_bytes_lie(tmp_path: Path, dtype: torch.dtype):
    values = torch.arange(6.0).reshape(2, 3).to(dtype)
    torch.save({"first": torch.zeros(5), "second": values}, tmp_path / "x.pt")
    with FakeTensorMode(), (tmp_path / "x.pt").open("rb") as stream:
        fake = torch.load(stream, weights_only=True)["second"]
    begin = fake.untyped_storage()._checkpoint_offset
    stored = (tmp_path / "x.pt").read_bytes()[begin : begin + 6 * values.itemsize]
    assert fake.shape == (2, 3) and stored == values.view(torch.uint8).numpy().tobytes()
