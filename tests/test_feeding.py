"""The table of what a host must deliver, in docs/scale.md."""

import json

import pytest

from benchmarks import feeding

RESULTS = json.loads(feeding.DATA.read_text(encoding="utf-8"))


def test_the_page_has_the_table_that_the_command_prints():
    page = feeding.PAGE.read_text(encoding="utf-8")
    assert feeding.table(RESULTS, feeding.Costs()) in page, "run python -m benchmarks.feeding --write"


def test_a_row():
    """512 clips in 0.25 s on 4 hosts: 512 a second and host."""
    job = {
        "tables": ["pretrain"], "task": "pretrain", "config": "1.3b@v5e-16", "topology": "v5e:4x4", "slices": 1,
        "facts": {
            "devices": 16, "batch_size": 512, "predicted_step_seconds": 0.25, "compiler_step_seconds": 0.5, "fits": True,
        },
    }  # fmt: skip
    costs = feeding.Costs(frame_us=1000, bucket_us=1000, frame_bytes=50_000, stored=10)
    (need,) = feeding.needs({"": job})
    assert (need.hosts, need.frames, need.clips, need.clips_by_compiler, need.batch) == (4, 4, 512, 256, 128)
    assert need.cores(costs) == pytest.approx(512 * 0.005)
    assert need.row(costs).split(" | ")[3:] == [
        "512 / 256", "2.6 of 56", "0.7 of 192 GB", "256 MB/s", "1.0 GB/s, 2,048/s", "0.4 GB/s, 8,192/s |",
    ]  # fmt: skip


def test_every_slice_has_a_row():
    names = {need.name for need in feeding.needs(RESULTS)}
    slices = {job["config"].partition("@")[2] for job in RESULTS.values() if set(job["tables"]) & {"pretrain", "tune"}}
    assert all(any(name.endswith(f"@{one}") for name in names) for one in slices)
