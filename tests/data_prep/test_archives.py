"""Videos in archives: names, contents, damage, and members that could lead outside."""

import io
import os
import tarfile
import unicodedata
import zipfile
from pathlib import Path

import numpy as np
import pytest
from etils import epath

from data_prep import archives
from data_prep.names import Names
from data_prep.videos import open_videos
from ymplug_jax.data.video_container import Reject

FILES = {
    "videos/a.mp4": b"a" * 700,
    "videos/深/小猫.flv": b"cat",
    "videos/empty.mp4": b"",
    f"videos/{'x' * 150}.mp4": b"long name",
    unicodedata.normalize("NFD", "videos/café.mp4"): b"decomposed",
    "videos/b.mkv": bytes(range(256)) * 5000,
}
FORMATS = {"pax": tarfile.PAX_FORMAT, "gnu": tarfile.GNU_FORMAT}


def write_tar(
    path: Path, files: dict[str, bytes], form: int = tarfile.PAX_FORMAT, more: list[tarfile.TarInfo] | None = None
) -> Path:
    with tarfile.open(path, "w", format=form) as tar:
        for info in more or []:
            tar.addfile(info)
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def write_zip(path: Path, files: dict[str, bytes], method: int = zipfile.ZIP_DEFLATED) -> Path:
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return path


def read(videos: archives.Tar | archives.Zip, name: str) -> bytes:
    with videos.file(name) as path:
        assert path.suffix == Path(name).suffix
        data = path.read_bytes()
    assert not path.exists()
    return data


@pytest.mark.parametrize("form", ["pax", "gnu", "stored", "deflated"])
def test_all_files_are_found_with_their_content(form: str, tmp_path: Path):
    if form in FORMATS:
        path = write_tar(tmp_path / "a.tar", {f"./{name}": data for name, data in FILES.items()}, FORMATS[form])
    else:
        path = write_zip(tmp_path / "a.zip", FILES, zipfile.ZIP_STORED if form == "stored" else zipfile.ZIP_DEFLATED)
    videos = open_videos(str(path))
    assert isinstance(videos, archives.Tar | archives.Zip)
    assert list(videos.names()) == list(FILES) and not videos.skipped
    for name, data in FILES.items():
        assert videos.present(name) and read(videos, name) == data
    assert read(videos, "videos/café.mp4") == b"decomposed", "the row is composed, the member decomposed"
    assert not videos.present("videos/c.mp4") and not videos.present("a.mp4") and not videos.present("videos")
    for name, reason in (
        ("videos/c.mp4", "missing_file"),
        ("../videos/a.mp4", "hostile_path"),
        ("/videos/a.mp4", "hostile_path"),
    ):
        with pytest.raises(Reject) as caught, videos.file(name):
            pass
        assert caught.value.reason == reason
    videos.close()


def test_a_saved_index_gives_the_same_files_without_reading_the_headers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    path = write_tar(tmp_path / "a.tar", FILES)
    archives.Tar(epath.Path(path)).save_index(epath.Path(tmp_path / "index.npy"))
    monkeypatch.setattr(archives.Tar, "_members", lambda *_: pytest.fail("the headers were read"))
    videos = open_videos(path, index=str(tmp_path / "index.npy"))
    assert {name: read(videos, name) for name in FILES} == FILES
    videos.close()


def test_of_equal_names_the_last_member_counts(tmp_path: Path):
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for data in (b"old", b"newer"):
            info = tarfile.TarInfo("a.mp4")
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    videos = archives.Tar(epath.Path(tmp_path / "a.tar"))
    assert read(videos, "a.mp4") == b"newer"
    videos.close()


def test_members_that_could_lead_outside_are_left_out(tmp_path: Path):
    bad = {"/etc/x.mp4": b"", "../x.mp4": b"", "videos/../../x.mp4": b""}
    links = []
    for kind, target in ((tarfile.SYMTYPE, "/etc/hostname"), (tarfile.LNKTYPE, "videos/a.mp4"), (tarfile.CHRTYPE, "")):
        info = tarfile.TarInfo(f"videos/link{kind.decode()}.mp4")
        info.type, info.linkname = kind, target
        links.append(info)
    tar = archives.Tar(epath.Path(write_tar(tmp_path / "a.tar", {**bad, **FILES}, more=links)))
    assert list(tar.names()) == list(FILES)
    assert sorted(tar.skipped) == sorted([*bad, *(info.name for info in links)])
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        link = zipfile.ZipInfo("videos/link.mp4")
        link.external_attr = 0o120777 << 16
        archive.writestr(link, "/etc/hostname")
        for name in bad:
            archive.writestr(zipfile.ZipInfo(name), b"")
        archive.writestr("videos/a.mp4", b"a")
    found = archives.Zip(epath.Path(tmp_path / "a.zip"))
    assert list(found.names()) == ["videos/a.mp4"] and len(found.skipped) == 4
    assert not found.present("videos/link.mp4") and not tar.present("videos/link2.mp4")
    found.close()


def test_archives_that_were_cut_off_are_refused_wherever_they_end(tmp_path: Path):
    whole = write_tar(tmp_path / "whole.tar", FILES).read_bytes()
    content = len(whole.rstrip(b"\0"))
    for size in (0, 100, 512, 1000, 1024, content // 2, content - content % 512, (content + 511) // 512 * 512):
        (tmp_path / "a.tar").write_bytes(whole[:size])
        with pytest.raises(
            archives.BadArchive, match=r"a\.tar: .*(cut off|not a tar).*; download or make the archive again"
        ):
            archives.Tar(epath.Path(tmp_path / "a.tar"))
    whole = write_zip(tmp_path / "whole.zip", FILES).read_bytes()
    for size in (0, 100, len(whole) // 2, len(whole) - 1):
        (tmp_path / "a.zip").write_bytes(whole[:size])
        with pytest.raises(archives.BadArchive, match="cut off or damaged"):
            archives.Zip(epath.Path(tmp_path / "a.zip"))


def test_damage_is_found(tmp_path: Path):
    data = bytearray(write_tar(tmp_path / "a.tar", {"a.mp4": b"a" * 600, "b.mp4": b"b"}).read_bytes())
    data[512 + 1024 + 100] ^= 0xFF  # in the header of the second member
    (tmp_path / "a.tar").write_bytes(data)
    with pytest.raises(archives.BadArchive, match=r"damaged at byte 1536, after a\.mp4"):
        archives.Tar(epath.Path(tmp_path / "a.tar"))
    data = bytearray(write_zip(tmp_path / "a.zip", {"a.mp4": b"abcdef" * 100}, zipfile.ZIP_STORED).read_bytes())
    data[100] ^= 0xFF
    (tmp_path / "a.zip").write_bytes(data)
    videos = archives.Zip(epath.Path(tmp_path / "a.zip"))
    with pytest.raises(Reject, match="download the archive again") as caught, videos.file("a.mp4"):
        pass
    assert caught.value.reason == "unreadable"
    data = bytearray(write_zip(tmp_path / "b.zip", {"a.mp4": b"a"}).read_bytes())
    data[data.index(b"PK\x01\x02") + 8] |= 1  # the flag of encryption in the index
    (tmp_path / "b.zip").write_bytes(data)
    with pytest.raises(archives.BadArchive, match="encrypted; unpack"):
        archives.Zip(epath.Path(tmp_path / "b.zip"))


def test_a_tar_that_became_shorter_is_a_failure_of_the_place(tmp_path: Path):
    path = write_tar(tmp_path / "a.tar", FILES)
    videos = archives.Tar(epath.Path(path))
    os.truncate(path, 600)
    with pytest.raises(OSError, match="become shorter"), videos.file("videos/b.mkv"):
        pass
    videos.close()


def test_archives_of_other_kinds_are_refused_by_name():
    for name in ("a.tar.gz", "b.TGZ", "c.tar.zst", "d.7z"):
        assert archives.is_archive(name)
        with pytest.raises(archives.BadArchive, match=f"{name}: .*unpack it into a folder"):
            archives.check_kind(name)
    assert not archives.is_archive("videos") and not archives.is_archive("a.mp4")


def test_messages_of_decoders_name_the_member(tmp_path: Path):
    videos = archives.Zip(epath.Path(write_zip(tmp_path / "a.zip", FILES)))
    with pytest.raises(Reject, match=r"a\.zip:videos/a\.mp4 is odd"), videos.file("videos/a.mp4") as path:
        raise Reject("unreadable", f"{path} is odd")
    videos.close()


def test_names_take_16_bytes_each():
    names = Names.of(f"videos/{i}.mp4" for i in range(100_000))
    wanted = [f"videos/{i}.mp4" for i in (0, 99_999, 100_000, 70_000)]
    assert names.places(wanted).tolist() == [0, 99_999, -1, 70_000]
    assert Names.of([]).places(["a"]).tolist() == [-1] and Names.of(["a"]).places([]).tolist() == []
    kept = sum(value.nbytes for value in vars(names).values() if isinstance(value, np.ndarray))
    assert kept <= 24 * 100_000
