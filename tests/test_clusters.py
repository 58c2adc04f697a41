"""Start commands for Dataflow, Flink and Spark, the images, and the worker pool: what Beam, build_shards and the files agree on."""

import configparser
import importlib.util
import os
import re
import shlex
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement

import buckets
import launch_files
from data_prep import beam_flags, build_flags

ROOT = launch_files.ROOT
LAUNCH = ROOT / "launch"
OURS = re.findall(r"--\w+", build_flags.parser().format_help())
BUILD = [
    "--config", "pretrain", "--csv=gs://clips/a b.csv", "--video_root", "gs://clips/videos", "--out=gs://clips/shards",
]  # fmt: skip
DATAFLOW = {"PROJECT": "my-project", "REGION": "us-central1", "TEMP": "gs://clips/tmp", "IMAGE": "repo/ymplug_worker"}
FLINK = {"FLINK": "flink:8081", "PARALLELISM": "64", "IMAGE": "repo/ymplug_worker"}
SPARK = {"SPARK": "spark://spark:7077", "IMAGE": "repo/ymplug_worker"}


def start(script: str, variables: dict[str, str], *flags: str, **more: str) -> subprocess.CompletedProcess:
    environment = {"PATH": os.environ["PATH"], **variables, **more}
    return subprocess.run([LAUNCH / script, *flags], env=environment, capture_output=True, text=True, timeout=60)


def dry_run(script: str, variables: dict[str, str], *flags: str) -> tuple[build_flags.argparse.Namespace, list[str]]:
    """Return (flags of build_shards, flags of Beam) of the command that the script prints."""
    done = start(script, variables, *(flags or BUILD), DRY_RUN="1")
    assert done.returncode == 0, done.stderr
    words = shlex.split(done.stdout)
    assert words[:3] == ["python", "-m", "data_prep.build_shards"]
    return build_flags.parse(words[3:])


@pytest.fixture(scope="module")
def bucket() -> Iterator[None]:
    """A storage server: Beam's validation of Dataflow's options asks for the bucket of --temp_location."""
    with buckets.served("clips"):
        yield


@pytest.mark.parametrize(
    ("script", "variables", "values"),
    [
        (
            "dataflow.sh",
            {**DATAFLOW, "JOB": "shards-1", "SERVICE_ACCOUNT": "a@b.c", "SUBNETWORK": "regions/r/subnetworks/s"},
            {
                "runner": "DataflowRunner", "project": "my-project", "region": "us-central1",
                "temp_location": "gs://clips/tmp", "job_name": "shards-1", "sdk_location": "container",
                "sdk_container_image": "repo/ymplug_worker", "machine_type": "n2-standard-8", "disk_size_gb": 100,
                "num_workers": 4, "max_num_workers": 50, "autoscaling_algorithm": "THROUGHPUT_BASED",
                "number_of_worker_harness_threads": 1, "use_public_ips": False,
                "service_account_email": "a@b.c", "subnetwork": "regions/r/subnetworks/s", "streaming": False,
            },
        ),
        (
            "flink.sh",
            FLINK,
            {
                "runner": "FlinkRunner", "flink_master": "flink:8081", "parallelism": 64, "sdk_worker_parallelism": "4",
                "environment_type": "DOCKER", "environment_config": "repo/ymplug_worker", "flink_version": "1.19",
            },
        ),
        (
            "flink.sh",
            {**FLINK, "POOL": "localhost:50000", "JAR": "/jars/flink.jar", "SLOTS": "16"},
            {
                "environment_type": "EXTERNAL", "environment_config": "localhost:50000", "sdk_worker_parallelism": "16",
                "flink_job_server_jar": "/jars/flink.jar",
            },
        ),
        (
            "spark.sh",
            {**SPARK, "JAR": "/jars/spark.jar"},
            {
                "runner": "SparkRunner", "spark_master_url": "spark://spark:7077", "spark_version": "3",
                "environment_type": "DOCKER", "environment_config": "repo/ymplug_worker",
                "spark_job_server_jar": "/jars/spark.jar",
            },
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)  # fmt: skip
def test_start_commands_pass_beams_own_validation(bucket: None, script: str, variables: dict, values: dict):
    from apache_beam.options.pipeline_options import PipelineOptions
    from apache_beam.options.pipeline_options_validator import PipelineOptionsValidator
    from apache_beam.runners import create_runner

    args, flags = dry_run(script, variables)
    assert (args.config, str(args.csv), str(args.out)) == ("pretrain", "gs://clips/a b.csv", "gs://clips/shards")
    assert args.stall_minutes >= 30 and args.workers is None
    beam_flags.check(flags, OURS, False)
    options = PipelineOptions(flags)
    every = options.get_all_options()
    assert {name: every[name] for name in values} == values
    runner = create_runner(beam_flags.runner_of(flags))
    assert PipelineOptionsValidator(options, runner).validate() == []
    known = beam_flags._known()
    left = [flag for flag in flags if flag.split("=")[0] not in known]
    assert left == (["--number_of_execution_retries=3"] if script == "flink.sh" else []), "only job servers know more"


def test_a_misspelt_flag_among_those_of_a_start_command_is_refused(bucket: None):
    _, flags = dry_run("dataflow.sh", DATAFLOW)
    for flag in flags:
        name, _, value = flag.partition("=")
        wrong = [f"{name[:6]}{name[7:]}={value}" if one == flag else one for one in flags]
        with pytest.raises(ValueError):
            beam_flags.check(wrong, OURS, False)


@pytest.mark.parametrize(
    ("script", "variables", "flags", "message"),
    [
        ("dataflow.sh", {**DATAFLOW, "TEMP": ""}, BUILD, "error: TEMP is not set; set it as described at the top of "),
        ("dataflow.sh", {**DATAFLOW, "WORKERS": "many"}, BUILD, "error: WORKERS=many: not a whole number of 1 or more; correct it"),
        ("dataflow.sh", {**DATAFLOW, "MAX_WORKERS": "0"}, BUILD, "error: MAX_WORKERS=0: not a whole number of 1 or more; "),
        ("dataflow.sh", DATAFLOW, [*BUILD, "--out", "/mnt/shards"], "error: --out /mnt/shards: Dataflow workers cannot read it; give gs://"),
        ("dataflow.sh", DATAFLOW, [*BUILD, "--csv=gs://clips"], "error: --csv gs://clips: Dataflow workers cannot read it; "),
        ("flink.sh", {"FLINK": "f:1", "PARALLELISM": "2"}, BUILD, "error: POOL is not set; "),
        ("flink.sh", FLINK, [*BUILD, "--video_root=videos"], "error: --video_root videos: workers cannot read it; give a bucket or an absolute path"),
        ("spark.sh", {}, BUILD, "error: SPARK is not set; "),
    ],
)  # fmt: skip
def test_a_wrong_variable_is_one_line(script: str, variables: dict, flags: list[str], message: str):
    done = start(script, variables, *flags)
    assert done.returncode == 2 and done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert line.startswith(message)


@pytest.mark.parametrize(("codes", "ends", "starts"), [("5 0", 0, 2), ("5 5 5 5", 5, 3), ("2", 2, 1), ("1", 1, 1)])
def test_a_failed_job_is_started_again(tmp_path: Path, codes: str, ends: int, starts: int):
    """After exit code 5 the script starts the same command again, at most TRIES times; other errors end it."""
    python, log = tmp_path / "python", tmp_path / "log"
    python.write_text(f'#!/bin/bash\necho "$*" >> {log}\ncodes=({codes})\nexit "${{codes[$(wc -l < {log}) - 1]}}"\n')
    (tmp_path / "sleep").write_text("#!/bin/bash\n")
    for program in (python, tmp_path / "sleep"):
        program.chmod(0o755)
    path = f"{tmp_path}:{os.environ['PATH']}"
    done = start("spark.sh", SPARK, "--csv=/mnt/a.csv", PATH=path, TRIES="3")
    lines = log.read_text().splitlines()
    assert done.returncode == ends and len(lines) == starts and len(set(lines)) == 1
    assert done.stderr.count("ended with exit code 5") == codes.split()[:3].count("5")


@pytest.fixture(scope="module")
def images() -> tuple[dict[str, str], dict[str, launch_files.Stage]]:
    return launch_files.stages((ROOT / "Dockerfile").read_text())


def test_everything_that_the_images_copy_exists(images):
    patterns = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if line]
    _, found = images
    copied = set()
    for stage in found.values():
        for words in stage.words("COPY"):
            if words[0].startswith("--from="):
                assert words[0].removeprefix("--from=") in found
                continue
            *sources, target = words
            for source in sources:
                assert (ROOT / source).exists() and not launch_files.ignored(source, patterns), source
                assert target == "./" or target == source
                copied.add(source)
    assert copied >= {"setup.cfg", "pyproject.toml", "ymplug_jax", "data_prep", "configs", "launch"}
    for path in (".git/config", "runs/a", "tests/x.py", "ymplug_jax/__pycache__/a.pyc", "shards/x.tfrecord"):
        assert launch_files.ignored(path, patterns), path
    assert not launch_files.ignored("ymplug_jax/data/records.py", patterns)


def test_the_images_install_extras_that_exist_in_versions_of_setup_cfg(images):
    arguments, found = images
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    extras = config["options.extras_require"]
    expected = {"worker": {"prep", "gcs", "s3", "dataflow"}, "tpu": {"tpu", "gcs"}, "gpu": {"cuda", "gcs"}}
    for name, wanted in expected.items():
        runs = [words for instruction, words in launch_files.whole(name, found) if instruction == "RUN"]
        installed = [word for words in runs if words[:2] == ["pip", "install"] for word in words[2:]]
        (own,) = [word for word in installed if word.startswith(".[")]
        assert set(own[2:-1].split(",")) == wanted <= set(extras)
        others = [word for word in installed[: installed.index("&&") if "&&" in installed else None] if word != own]
        assert others == ([f"apache-beam=={arguments['BEAM']}"] if name == "worker" else [])
    requirements = [Requirement(line.split("#")[0]) for line in extras["prep"].strip().splitlines()]
    (beam,) = [requirement for requirement in requirements if requirement.name == "apache-beam"]
    assert arguments["BEAM"] in beam.specifier, "the entrypoint has the version of the installed Beam"
    assert f"apache/beam_python{arguments['PYTHON']}_sdk:{arguments['BEAM']}" == found["beam"].base
    assert arguments["PYTHON"] in config["options"]["python_requires"] or arguments["PYTHON"] >= "3.11"


def test_the_entrypoints_of_the_images(images):
    _, found = images
    assert found["worker"].words("ENTRYPOINT") == [["/opt/apache/beam/boot"]]
    assert ["--from=beam", "/opt/apache/beam", "/opt/apache/beam"] in found["worker"].words("COPY")
    for name in ("tpu", "gpu"):
        (command,) = found[name].words("CMD")
        assert command[:2] == ["python", "-m"] and importlib.util.find_spec(command[2])
        assert found[name].words("ENTRYPOINT") == [[]], "launch/gke.yaml names the command"
        workdirs = [words for instruction, words in launch_files.whole(name, found) if instruction == "WORKDIR"]
        assert workdirs == [["/app"]], "commands name launch/ and configs/ relative to it"
    users = {name: found[name].words("USER") for name in ("worker", "tpu", "gpu")}
    assert users == {"worker": [], "tpu": [], "gpu": [["1000"]]}


def test_the_commands_of_kubernetes_exist_in_the_images(images):
    _, found = images
    copied = {word for stage in ("code",) for words in found[stage].words("COPY") for word in words[:-1]}
    (container,) = yaml.safe_load((LAUNCH / "gke.yaml").read_text())["spec"]["replicatedJobs"][0]["template"]["spec"][
        "template"
    ]["spec"]["containers"]
    assert container["image"].endswith("/ymplug_jax") and "-t ymplug_jax " in (ROOT / "Dockerfile").read_text()
    files = [word for word in container["command"] if word.startswith(("launch/", "--config=configs/"))]
    assert len(files) == 2
    for word in files:
        file = word.removeprefix("--config=").split(":")[0]
        assert (ROOT / file).exists() and file.split("/")[0] in copied
    assert importlib.util.find_spec(container["command"][container["command"].index("-m") + 1])


def test_the_worker_pool_on_kubernetes():
    service, pool, driver = yaml.safe_load_all((LAUNCH / "worker_pool.yaml").read_text())
    assert [part["kind"] for part in (service, pool, driver)] == ["Service", "StatefulSet", "Job"]
    name, (port,) = service["metadata"]["name"], service["spec"]["ports"]
    assert service["spec"]["clusterIP"] == "None", "every pod has a name of its own"
    labels = [part["spec"]["template"]["metadata"]["labels"] for part in (pool, driver)]
    assert all(service["spec"]["selector"].items() <= each.items() for each in labels)
    assert pool["spec"]["serviceName"] == name and pool["spec"]["selector"]["matchLabels"] == labels[0]
    pod = driver["spec"]["template"]["spec"]
    assert (pod["subdomain"], pod["restartPolicy"]) == (name, "Never"), "workers call the job service by its name"
    (worker,), (command,) = pool["spec"]["template"]["spec"]["containers"], pod["containers"]
    assert worker["image"] == command["image"] and worker["image"].endswith("/ymplug_worker")
    assert importlib.util.find_spec(worker["command"][2]) and worker["command"][3] == f"--service_port={port['port']}"
    (rule,) = driver["spec"]["podFailurePolicy"]["rules"]
    assert rule["onExitCodes"] == {"containerName": command["name"], "operator": "In", "values": [2]}

    shell = command["command"][2]
    subprocess.run(["bash", "-n", "-c", shell], check=True)
    assert [importlib.util.find_spec(module) is not None for module in re.findall(r"-m (\S+)", shell)] == [True, True]
    args, flags = build_flags.parse([word.replace("BUCKET", "clips") for word in command["command"][4:]])
    beam_flags.check(flags, OURS, args.workers is not None)
    addresses = [f"{pool['metadata']['name']}-{i}.{name}:{port['port']}" for i in range(pool["spec"]["replicas"])]
    assert beam_flags.pools(flags) == addresses, "a job for every pod"
    assert beam_flags.flag_value(flags, "--job_endpoint").split(":")[1] in shell
