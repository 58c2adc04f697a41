"""SCALING.md matches its stored results, and the results match the programs of the current configs."""

import json
import os
import subprocess
import sys

import pytest

import runs
from benchmarks import scaling

RESULTS = json.loads(scaling.DATA.read_text(encoding="utf-8"))


def test_the_page_is_drawn_from_its_data() -> None:
    assert (runs.ROOT / "SCALING.md").read_text(encoding="utf-8") == scaling.draw(RESULTS)
    assert scaling.CHART.read_text(encoding="utf-8") == scaling.picture(RESULTS)


def test_every_row_is_one_that_the_command_makes() -> None:
    jobs = {scaling.key(job): job for job in scaling.jobs()}
    assert len(jobs) == len(scaling.jobs()) and jobs.keys() == RESULTS.keys()
    for name, row in RESULTS.items():
        assert jobs[name].items() <= row.items(), name


def test_rows_older_than_the_models_are_marked() -> None:
    name = "match 2.7b@v5p-64 v5p:4x4x4 x1"
    page = scaling.draw({key: {k: v for k, v in row.items() if k != "old"} for key, row in RESULTS.items()})
    assert "†" not in page
    marked = scaling.draw({name: RESULTS[name] | {"old": True}})
    assert (
        "| `match.py:2.7b@v5p-64` † |" in marked and marked.count("†") == 2 and "--missing" in marked.splitlines()[-1]
    )


def test_every_layout_fits_its_chips() -> None:
    assert not [name for name, row in RESULTS.items() if not row["facts"]["fits"]]


@pytest.mark.parametrize("name", ["pretrain 1.3b@v5e-16 v5e:4x4 x1", "match 2.7b@v5e-16 v5e:4x4 x1"])
def test_the_work_of_a_step_is_still_that_of_the_table(name: str) -> None:
    """Tracing gives FLOPs and layout without compiling, so a model change without an update of the table is noticed."""
    row = RESULTS[name]
    script = f"""
import json, os
os.environ |= {{"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1", "TPU_WORKER_HOSTNAMES": "localhost", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}}
from configs.mplug_video import {row["task"]} as task
from ymplug_jax.analysis import aot
from ymplug_jax.core import config
from ymplug_jax.training import setup
experiment = config.from_config_dict(task.get_config("{row["config"]}"))
ready = setup.prepare(experiment, aot.devices_of("{row["topology"]}", {row["slices"]}))
print(json.dumps([ready.mesh.size, experiment.train.batch_size, aot.model_flops(ready), aot.program_flops(ready)]))
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=runs.ROOT, env=os.environ, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    devices, batch, model, program = json.loads(done.stdout.splitlines()[-1])
    facts = row["facts"]
    assert (devices, batch) == (facts["devices"], facts["batch_size"])
    assert model / devices == facts["model_flops_per_device"]
    assert program / devices == facts["program_flops_per_device"]
