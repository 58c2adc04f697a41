"""`benchmarks.device` at its small size: every step has a result, failures do not stop it, and it needs few libraries."""

import json
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.profiler import ProfileData

import runs
from benchmarks import attention_parity, device, device_report, profile_summary, torch_generate

BLOCKED = ("grain", "tensorflow", "tensorflow_datasets", "ml_collections", "apache_beam", "cv2", "sentencepiece")
# The planes of a GPU trace: two streams with kernels, one line with the time of the whole module, and a plane of the host.
TRACE = """
planes {
  name: "/device:GPU:0"
  lines { name: "Stream #7(Compute)"
    events { metadata_id: 1 duration_ps: 6000000 stats { metadata_id: 1 str_value: "gemm_fusion.1" } }
    events { metadata_id: 1 duration_ps: 2000000 stats { metadata_id: 1 str_value: "gemm_fusion.1" } }
    events { metadata_id: 2 duration_ps: 1000000 stats { metadata_id: 1 str_value: "fusion.2" } } }
  lines { name: "Stream #9(MemcpyD2D)" events { metadata_id: 3 duration_ps: 1000000 } }
  lines { name: "XLA Modules" events { metadata_id: 4 duration_ps: 9000000 } }
  event_metadata { key: 1 value { id: 1 name: "nvjet_tst_128x256" } }
  event_metadata { key: 2 value { id: 2 name: "loop_add_fusion" } }
  event_metadata { key: 3 value { id: 3 name: "MemcpyD2D" } }
  event_metadata { key: 4 value { id: 4 name: "jit_step" } }
  stat_metadata { key: 1 value { id: 1 name: "hlo_op" } }
}
planes { name: "/host:CPU" lines { name: "python" events { metadata_id: 1 duration_ps: 7000000 } }
  event_metadata { key: 1 value { id: 1 name: "step" } } }
"""
PROGRAM = """
  %gemm_fusion.1 = bf16[8,8] fusion(%a), metadata={op_name="jit(step)/transpose(jvp(MPLUGVideo))/llm/blocks/mlp/up/dot_general"}
"""


@pytest.mark.slow
def test_every_step_has_a_result_without_libraries_that_read_data(tmp_path: Path) -> None:
    out = tmp_path / "new" / "device.json"
    program = f"import sys\nsys.modules.update(dict.fromkeys({BLOCKED!r}))\n"
    program += "from benchmarks import device\ndevice.main(sys.argv[1:])"
    command = [
        sys.executable,
        "-c",
        program,
        "--size=small",
        "--no_compile",
        "--limit=3000",
        f"--out={out}",
    ]  # torch.compile needs g++
    done = subprocess.run(command, cwd=runs.ROOT, capture_output=True, text=True, timeout=1500)
    assert done.returncode == 0, done.stderr[-3000:]
    result = json.loads(out.read_text(encoding="utf-8"))
    assert result["finished"] and result["device"] == "cpu" and result["versions"]["jax"] == jax.__version__
    assert result["steps"].keys() == device.BUDGETS.keys() - {"compiled"} and not result["failed"]
    found = {step: part["results"] for step, part in result["steps"].items()}
    assert not [name for part in found.values() for name, value in part.items() if "error" in value], done.stdout
    assert len(found["attention"]) == 9 and all(case["agrees"] for case in found["attention"].values())

    sides = {"ours", "PyTorch eager, classes", "PyTorch eager"}
    assert found["train"].keys() == found["mfu"].keys() == found["memory"].keys() == sides
    for name, side in found["train"].items():
        assert side["losses"] == pytest.approx(found["train"]["ours"]["losses"], rel=1e-4)
        times = side["milliseconds"]
        assert 0 < times["p10"] <= times["median"] <= times["p90"] and len(side["milliseconds_by_order"]) == 2
        mfu = found["mfu"][name]
        assert mfu["mfu"] == pytest.approx(mfu["model_flops"] / mfu["peak_flops"] / times["median"] * 1e3)
    assert found["captions"].keys() == {"greedy, batch 1", "beam 3, batch 2"}
    for row in found["captions"].values():
        assert row["agrees"] and row["same_ids"] > 0.98
        assert row["log_probability"] == pytest.approx(row["their_log_probability"], abs=1e-3)
    assert found["memory"]["ours"]["xla_argument_bytes"] > 2**20
    profile = found["profile"]["step"]
    assert sum(profile["kinds"].values()) == pytest.approx(1) and profile["kinds"]["products"] > 0
    assert any("mlp" in one["place"] for one in profile["top"])
    assert sum(line.startswith("[") for line in done.stdout.splitlines()) == 9 + 2 + 2 * 3 + 3 + 2 + 3 + 1


def test_a_failing_step_is_one_line_and_the_next_one_follows(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    report = device_report.Report(tmp_path / "r.json", limit=600, began=time.perf_counter())

    def out_of_memory() -> None:
        report.add("first", "small", {"x": float("nan")}, "fits")
        raise RuntimeError("RESOURCE_EXHAUSTED: no memory\nthe rest of a long message")

    def hangs() -> None:
        try:
            time.sleep(30)
        except Exception:
            pytest.fail("swallowed by a handler of the step")

    report.run("first", 60, out_of_memory)
    report.run("second", 0.3, hangs)
    report.run("third", 60, lambda: report.add("third", "all", {"x": 1}, "done"))
    report.limit = 0
    report.run("fourth", 10, lambda: pytest.fail("there was no time left"))
    read = json.loads((tmp_path / "r.json").read_text(encoding="utf-8"))
    steps = {name: step["results"] for name, step in read["steps"].items()}
    assert steps["first"] == {
        "small": {"x": "nan"},
        "step": {"error": "RuntimeError: RESOURCE_EXHAUSTED: no memory"},
    }
    assert steps["second"]["step"]["error"].startswith("OverBudget")
    assert steps["third"] == {"all": {"x": 1}} and "skipped" in steps["fourth"]["step"]["error"]
    assert len(capsys.readouterr().out.splitlines()) == 5


def test_a_step_that_hangs_ends_the_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    codes: list[int] = []
    monkeypatch.setattr(device_report.os, "_exit", codes.append)
    report = device_report.Report(tmp_path / "r.json", limit=0.1, began=time.perf_counter())
    report.add("first", "all", {"x": 1}, "done")
    with report.watch(grace=0.1):
        for _ in range(600):
            time.sleep(0.1)
            if codes:
                break
    read = json.loads((tmp_path / "r.json").read_text(encoding="utf-8"))
    assert codes == [1] and "did not end" in read["error"] and read["steps"]["first"]["results"] == {"all": {"x": 1}}


def test_an_attention_that_differs_is_found() -> None:
    def blind(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        return attention_parity.plain(q, k, v)  # lacks the causal mask

    def detached(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        return attention_parity.plain_causal(q, jax.lax.stop_gradient(k), v)

    shape = (2, 8, 2, 16)
    for wrong, part in ((blind, "forward_error"), (detached, "gradient_error")):
        found = attention_parity.measure(
            attention_parity.Case(wrong, attention_parity.plain_causal, shape, shape), "bfloat16", 1
        )
        assert not found["agrees"] and found[part] > 0.1 and 0 < found["plain_" + part] < 0.02


def test_plain_attention_is_softmax_attention() -> None:
    q, k, v = np.random.default_rng(0).normal(size=(3, 1, 3, 1, 4)).astype(np.float32)
    logits = q[0, :, 0] @ k[0, :, 0].T / 2
    weights = np.exp(logits) * np.tri(3)
    expected = weights / weights.sum(axis=1, keepdims=True) @ v[0, :, 0]
    np.testing.assert_allclose(attention_parity.plain_causal(q, k, v)[0, :, 0], expected, rtol=1e-5)


def test_kernels_are_recognised_by_their_custom_call() -> None:
    call = '%x = (bf16[2]) custom-call(%q), custom_call_target="{}", backend_config={{}}'
    assert attention_parity.kernel_of(call.format("__cudnn$fmhaSoftmaxBackward")) == "cuDNN"
    assert attention_parity.kernel_of(call.format("tpu_custom_call")) == "Pallas on TPU"
    assert attention_parity.kernel_of(call.format("__cublas$gemm")) == "none"


def test_captions_that_are_not_the_model_s_own_are_found() -> None:
    lm = device.SIZES["small"].model.llm
    pair = torch_generate.decoders(lm, "cpu")
    prefix = jnp.asarray(np.random.default_rng(0).normal(size=(2, torch_generate.QUERIES, lm.width)), jnp.float32)
    ids = jnp.asarray(np.random.default_rng(1).integers(0, lm.vocab, (2, 5)))
    _, worst = torch_generate.judge(lm, pair.params, prefix, ids)
    assert worst > 1


def test_kernels_of_a_gpu_are_summed_by_operation(tmp_path: Path) -> None:
    (tmp_path / "host.xplane.pb").write_bytes(ProfileData.text_proto_to_serialized_xspace(TRACE))
    found = profile_summary.summary(tmp_path, PROGRAM, runs=2)
    assert found["busy_milliseconds"] == pytest.approx(0.005)
    assert found["kinds"] == pytest.approx({"products": 0.8, "element-wise": 0.1, "copies": 0.1})
    first = found["top"][0]
    assert first["place"] == "backward llm/blocks/mlp/up/dot_general" and first["kernel"] == "nvjet_tst_128x256"
    assert first["milliseconds"] == pytest.approx(0.004) and first["times"] == 1 and first["share"] == 0.8


def test_the_cost_analysis_is_reported_without_operations_in_the_trace(tmp_path: Path) -> None:
    report = device_report.Report(tmp_path / "r.json", limit=60, began=time.perf_counter())
    work = device.Bench(device.SIZES["small"], "float32", report)
    compiled = jax.jit(lambda x: x @ x).lower(jax.ShapeDtypeStruct((16, 16), "float32")).compile()
    work.step = SimpleNamespace(step=lambda: None, compiled=compiled)
    work.profile()
    results = report.result["steps"]["profile"]["results"]
    assert "no operation" in results["trace"]["error"]
    assert results["XLA's cost analysis"]["flops"] == 2 * 16**3


def test_an_unknown_step_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        device.main(["--steps=train,everything", f"--out={tmp_path / 'd.json'}"])
    assert "unknown step 'everything'; choose one of attention, build" in capsys.readouterr().err
    assert not (tmp_path / "d.json").exists()
