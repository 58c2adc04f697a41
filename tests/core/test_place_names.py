"""core.places: names of flags, and files in a bucket of a real server process, with faults."""

import argparse
import os
import subprocess
import sys
import time

import pytest

import buckets
from ymplug_jax.core import exits, place_copies, place_requests, places
from ymplug_jax.core.exits import Mistake, PlaceFailed


@pytest.fixture(scope="module")
def server():
    with buckets.served("clips", faults=True) as found:
        yield found


@pytest.fixture(autouse=True)
def _healthy(request):
    yield
    if "server" in request.fixturenames:
        request.getfixturevalue("server").heal()


@pytest.mark.parametrize(
    ("name", "path"),
    [
        ("a/b", "a/b"),
        ("/a", "/a"),
        ("file:///a/b", "/a/b"),
        ("gs://clips/a/", "gs://clips/a"),
        ("gs://clips", "gs://clips"),
        ("a:b/c", "a:b/c"),
        ("C:/x", "C:/x"),
        ("日本:/x", "日本:/x"),
    ],
)
def test_a_name_is_a_place(name, path):
    assert str(places.place(name, "--out")) == path
    assert places.is_remote(places.place(name, "--out")) == path.startswith("gs://")


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("gs:/clips/a", "write gs://clips/a"),
        ("s3:/clips/a", "write s3://clips/a"),
        ("file:/a/b", "write file:///a/b"),
        ("gcs://clips/a", "gcs:// is not supported"),
        ("https://x.org/a", "https:// is not supported"),
        ("tensor://x", "tensor:// is not supported"),
        ("gs://", "'' is not a bucket's name"),
        ("gs:///a", "'' is not a bucket's name"),
        ("gs://Clips/a", "'Clips' is not a bucket's name"),
        ("gs://clips/a?b", "cannot hold '?'"),
        ("gs://clips/../b", "cannot hold '..'"),
    ],
)
def test_another_name_is_one_clear_error(name, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(Mistake, match=r"^--out ") as caught:
        places.place(name, "--out")
    assert words in str(caught.value) and "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setattr(places.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(Mistake, match=r"pip install 'ymplug_jax\[s3\]'"):
        places.place("s3://clips/a", "--out")


def test_files_of_a_bucket(server, tmp_path):
    data = os.urandom(3_000_000)
    (tmp_path / "a").write_bytes(data)
    places.upload(tmp_path / "a", places.place("gs://clips/f/a", "--out"))
    places.write_text("gs://clips/f/字.txt", "一\r\n二")
    places.write_bytes("gs://clips/f/deep/x", b"x")
    assert places.sizes("gs://clips/f") == {"a": len(data), "字.txt": 8}
    assert places.sizes("gs://clips/none") == {} == places.sizes(tmp_path / "none")
    with pytest.raises(NotADirectoryError):
        places.sizes("gs://clips/f/a")
    assert places.exists("gs://clips/f") and places.exists("gs://clips/f/a") and not places.exists("gs://clips/f/b")
    places.download("gs://clips/f/a", tmp_path / "b")
    assert (tmp_path / "b").read_bytes() == data and server.get("clips", "f/字.txt") == "一\r\n二".encode()
    with pytest.raises(FileNotFoundError):
        places.download("gs://clips/f/none", tmp_path / "c")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "b"]


def test_a_move_can_be_repeated(server, tmp_path):
    for base in ("gs://clips/m", str(tmp_path)):
        places.write_bytes(f"{base}/a", b"1")
        places.move(f"{base}/a", f"{base}/b")
        places.move(f"{base}/a", f"{base}/b")
        assert places.sizes(base) == {"b": 1}
        with pytest.raises(FileNotFoundError):
            places.move(f"{base}/a", f"{base}/c")


def test_a_listing_shows_what_others_write(server):
    folder = places.place("gs://clips/shared", "--out")
    places.write_bytes(folder / "a", b"1")
    assert list(places.sizes(folder)) == ["a"] and [p.name for p in folder.iterdir()] == ["a"]
    server.put("clips", "shared/b", b"22")
    server.delete("clips", "shared/a")
    assert places.sizes(folder) == {"b": 2} and [p.name for p in folder.iterdir()] == ["b"]
    assert (folder / "b").exists() and not (folder / "a").exists()


@pytest.mark.parametrize("kind", ["503", "429", "503 after", "cut write", "cut read", "slow"])
def test_a_fault_that_passes_is_repeated(server, tmp_path, kind):
    data = os.urandom(400_000)
    (tmp_path / "a").write_bytes(data)
    if kind != "cut read":
        server.inject(buckets.Fault(kind, "POST", "/upload/", seconds=1))
    if kind != "cut write":
        server.inject(buckets.Fault(kind, "GET", "alt=media", least=1000, seconds=1))
    places.upload(tmp_path / "a", "gs://clips/faults/a")
    places.download("gs://clips/faults/a", tmp_path / "b")
    assert (tmp_path / "b").read_bytes() == data == server.get("clips", "faults/a")
    assert not server.waiting()


def test_a_refusal_is_not_a_missing_file(server):
    places.write_bytes("gs://clips/secret/a", b"1")
    server.inject(buckets.Fault("403", times=-1))
    for ask in (places.exists, places.sizes, places.check_bucket):
        with pytest.raises(OSError, match=r"(?i)forbidden") as caught:
            ask("gs://clips/secret")
        assert not isinstance(caught.value, FileNotFoundError) and "\n" not in str(caught.value)


def test_a_missing_bucket_is_named(server, tmp_path):
    for ask in (places.exists, places.sizes, places.check_bucket):
        with pytest.raises(OSError, match="there is no bucket gs://nowhere") as caught:
            ask("gs://nowhere/x")
        assert not isinstance(caught.value, FileNotFoundError)


def test_a_download_has_a_time_limit(server, tmp_path):
    server.put("clips", "slow/a", b"x" * 1000)
    server.inject(buckets.Fault("slow", "GET", "alt=media", times=-1, seconds=4))
    start = time.monotonic()
    with pytest.raises(TimeoutError, match="gs://clips/slow/a"):
        places.download("gs://clips/slow/a", tmp_path / "a", seconds=1)
    assert time.monotonic() - start < 3.5 and not list(tmp_path.iterdir())


def test_an_object_that_lies_about_its_content_is_refused(server, tmp_path, monkeypatch):
    server.put("clips", "lies/a", b"12345")
    files = place_requests.files_of("gs://clips/lies/a")
    monkeypatch.setattr(files, "cat_file", lambda *args, **kwargs: b"12346")
    with pytest.raises(OSError, match="checksum"):
        places.download("gs://clips/lies/a", tmp_path / "a")
    assert not list(tmp_path.iterdir())


def test_tensorflow_does_not_take_over_the_bucket(server):
    """etils prefers TensorFlow's own gs:// unless the package says otherwise before etils is imported."""
    code = "import ymplug_jax\nfrom etils import epath\nepath.Path('gs://clips/tf').write_text('x')\nimport sys\nassert 'tensorflow' not in sys.modules"
    env = {k: v for k, v in os.environ.items() if k not in ("EPATH_USE_TF", "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT")}
    subprocess.run([sys.executable, "-c", code], env=env, check=True, timeout=60)
    assert server.get("clips", "tf") == b"x"


def test_copies_for_libraries_that_read_local_files(server, tmp_path):
    server.put("clips", "copies/a/1.txt", b"1")
    server.put("clips", "copies/2.txt", b"22")
    assert places.below("gs://clips/copies") == {"2.txt": 2, "a/1.txt": 1}
    assert places.below("gs://clips/copies/2.txt") == {"": 2} and places.below("gs://clips/none") == {}
    with place_copies.local_copy("gs://clips/copies/2.txt") as file:
        assert file.name == "2.txt" and file.read_bytes() == b"22"
    assert not file.exists()
    with place_copies.local_folder("gs://clips/copies", "--source") as folder:
        assert (folder / "a" / "1.txt").read_bytes() == b"1" and (folder / "2.txt").read_bytes() == b"22"
        place_copies.upload_folder(folder, "gs://clips/again", last=["1.txt"])
    assert not folder.exists() and server.names("clips", "again/") == ["again/2.txt", "again/a/1.txt"]
    uploads = [line for line in server.requests if "uploadType" in line]
    assert uploads
    with place_copies.local_output("gs://clips/written/x.png") as file:
        file.write_bytes(b"png")
    assert server.get("clips", "written/x.png") == b"png"
    with pytest.raises(argparse.ArgumentTypeError, match="not a local file"):
        place_copies.local_only("gs://clips/a")


def test_a_working_folder_stays_until_it_succeeds(tmp_path, monkeypatch):
    monkeypatch.setattr(place_copies.tempfile, "gettempdir", lambda: str(tmp_path))

    def stopped() -> None:
        with place_copies.working_folder("gs://clips/out") as folder:
            folder.mkdir()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stopped()
    (folder,) = tmp_path.iterdir()
    with place_copies.working_folder("gs://clips/out") as again:
        assert again == folder and folder.exists()
    assert not folder.exists()


def test_a_stamp_changes_with_the_content(server, tmp_path):
    server.put("clips", "stamps/a", b"1")
    first = places.stamp("gs://clips/stamps/a")
    server.put("clips", "stamps/a", b"2")
    assert first and places.stamp("gs://clips/stamps/a") != first
    assert places.stamp("gs://clips/stamps/none") == [] == places.stamp(tmp_path / "none")


def test_epath_methods_do_not_take_a_refusal_for_missing(server):
    """gcsfs itself answers False to is_dir. Orbax and the readers of optional files rely on these methods."""
    path = places.place("gs://clips/refused/a", "--out")
    places.write_bytes(path, b"1")
    server.inject(buckets.Fault("403", times=-1))
    for ask in (path.exists, path.is_dir, path.parent.is_dir, path.read_bytes, lambda: list(path.parent.iterdir())):
        with pytest.raises(PlaceFailed, match="cannot be used"):
            ask()
    for size in (1, 6 << 20):  # one request, and an upload in parts
        with pytest.raises(PlaceFailed, match=r"^gs://clips.*cannot be used"):
            path.write_bytes(b"2" * size)


def test_a_failure_inside_a_library_is_found():
    hidden, error = PlaceFailed("gs://clips/a: the bucket cannot be used"), ValueError("a thread failed")
    error.__cause__ = hidden
    assert exits.place_failed(error) is hidden and exits.place_failed(ValueError("x")) is None
