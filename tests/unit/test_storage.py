"""Paths and globs mean the same on a disk and on any other filesystem of pyarrow."""

import os

import pytest
from pyarrow import fs

from embedshard.errors import ConfigError, DataError
from embedshard.storage import Location, expand, locate

pytestmark = pytest.mark.timeout(30)

FILES = [
    "day=1/a.parquet",
    "day=1/b.parquet",
    "day=1/_SUCCESS",
    "day=1/.hidden.parquet",
    "day=2/a.parquet",
    "day=2/deep/er/c.parquet",
    "day=2/_temporary/d.parquet",
    "notes.txt",
    "x[1].parquet",
    "x1.parquet",
]


@pytest.fixture(params=["local", "subtree", "memory"])
def folder(request, tmp_path):
    """A location with FILES below it, on a disk, on a disk seen as a foreign filesystem, and in memory."""
    if request.param == "local":
        root = locate(str(tmp_path / "data"))
    elif request.param == "subtree":
        root = locate("data", fs.SubTreeFileSystem(str(tmp_path), fs.LocalFileSystem()))
    else:
        root = locate("data", fs._MockFileSystem())
    for file in FILES:
        location = root.join(*file.split("/"))
        location.parent.make_dirs()
        location.write_text_atomically(file)
    return root


def names(folder, *patterns):
    filesystem = None if folder.is_local else folder.filesystem
    found = expand([f"{folder.path}/{pattern}".rstrip("/") for pattern in patterns], filesystem).files
    for location in found:
        relative = location.path.removeprefix(f"{folder.path}/")
        assert location.read_bytes().decode() == relative
        assert location.uri.endswith(relative)
    return [location.path.removeprefix(f"{folder.path}/") for location in found]


@pytest.mark.parametrize(
    ("patterns", "expected"),
    [
        (["day=1/a.parquet"], ["day=1/a.parquet"]),
        (["day=1"], ["day=1/a.parquet", "day=1/b.parquet"]),
        (["day=1/"], ["day=1/a.parquet", "day=1/b.parquet"]),
        (["day=1/*.parquet"], ["day=1/a.parquet", "day=1/b.parquet"]),
        (["day=1/*"], ["day=1/a.parquet", "day=1/b.parquet"]),
        (["day=?/a.parquet"], ["day=1/a.parquet", "day=2/a.parquet"]),
        (["day=[13]/*.parquet"], ["day=1/a.parquet", "day=1/b.parquet"]),
        (["day=[!1]/*.parquet"], ["day=2/a.parquet"]),
        (["day=2/**/*.parquet"], ["day=2/a.parquet", "day=2/deep/er/c.parquet"]),
        (["day=2/**"], ["day=2/a.parquet", "day=2/deep/er/c.parquet"]),
        (["**/c.parquet"], ["day=2/deep/er/c.parquet"]),
        (["day=*"], ["day=1/a.parquet", "day=1/b.parquet", "day=2/a.parquet", "day=2/deep/er/c.parquet"]),
        (["day=2/_temporary/d.parquet"], ["day=2/_temporary/d.parquet"]),
        (["day=2/_temp*/d.parquet"], ["day=2/_temporary/d.parquet"]),
        (["notes.txt"], ["notes.txt"]),
        (["x[1].parquet"], ["x[1].parquet"]),
        (["x?.parquet"], ["x1.parquet"]),
        (["day=2/a.parquet", "day=1", "day=?/a.parquet"], ["day=1/a.parquet", "day=1/b.parquet", "day=2/a.parquet"]),
    ],
)
def test_patterns_name_the_files_a_person_expects_sorted_and_each_once(folder, patterns, expected):
    assert names(folder, *patterns) == expected


@pytest.mark.parametrize(
    ("patterns", "skipped"),
    [
        (["day=1/a.parquet", "day=1/*.parquet"], ["day=1/.hidden.parquet"]),
        (["day=1/*"], ["day=1/.hidden.parquet", "day=1/_SUCCESS"]),
        (["day=1"], ["day=1/.hidden.parquet", "day=1/_SUCCESS"]),
        (["day=1", "day=1/_SUCCESS"], ["day=1/.hidden.parquet"]),
        (["day=2/**"], ["day=2/_temporary/d.parquet"]),
        (["x?.parquet"], []),
    ],
)
def test_what_a_pattern_skips_is_known_and_what_is_spelled_out_is_meant(folder, patterns, skipped):
    filesystem = None if folder.is_local else folder.filesystem
    found = expand([f"{folder.path}/{pattern}" for pattern in patterns], filesystem)
    assert [location.path.removeprefix(f"{folder.path}/") for location in found.skipped] == skipped
    spelled_out = {f"{folder.path}/{pattern}" for pattern in patterns if "*" not in pattern and "/" in pattern}
    assert found.spelled_out == spelled_out


@pytest.mark.parametrize(
    ("pattern", "words"),
    [
        ("day=1/*.csv", ["day=1/*.csv", "no file matches", "_SUCCESS", "a.parquet"]),
        ("day=3/*.parquet", ["day=3/*.parquet", "nearest folder that exists", "day=1, day=2, notes.txt"]),
        ("no/such/folder/*/x", ["no/such/folder", "day=1, day=2"]),
        ("notes.txt/*.parquet", ["notes.txt is a file, not a folder"]),
        ("nothing.parquet", ["nothing.parquet", "day=1, day=2"]),
    ],
)
def test_a_pattern_that_matches_nothing_says_what_is_there(folder, pattern, words):
    with pytest.raises(DataError) as caught:
        names(folder, "day=1", pattern)
    for word in words:
        assert word in str(caught.value)


def test_relative_paths_home_and_file_uris_name_the_same_file(folder, tmp_path, monkeypatch):
    if not folder.is_local:
        pytest.skip("of the local disk")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    absolute = str(tmp_path / "data" / "day=1" / "a.parquet")
    spellings = [absolute, "data/day=1/a.parquet", "./data/../data/day=1/a.parquet", "~/data/day=1/a.parquet"]
    assert [found.path for found in expand([*spellings, f"file://{absolute}", "data/day=1/a*"]).files] == [absolute]
    monkeypatch.chdir(tmp_path / "data")
    assert [found.name for found in expand(["*1.parquet"]).files] == ["x1.parquet"]


def test_unknown_schemes_and_empty_paths_are_refused():
    with pytest.raises(ConfigError, match=r"scheme 's4'.*file, s3, gs, gcs, abfs"):
        locate("s4://bucket/data")
    with pytest.raises(ConfigError, match="empty"):
        locate("")
    with pytest.raises(ConfigError, match="empty"):
        expand([""])


def test_a_location_knows_its_parts(folder):
    file = folder.join("day=1", "a.parquet")
    assert file.name == "a.parquet"
    assert file.parent == folder.join("day=1")
    assert folder.join("day=1/a.parquet") == file
    assert file.size() == len("day=1/a.parquet")
    assert file.is_file()
    assert folder.exists()
    assert not folder.is_file()
    with file.open_input() as stream:
        stream.seek(4)
        assert stream.read(2) == b"1/"
    assert Location(folder.filesystem, "/", "/").parent.path == "/"
    with pytest.raises(FileNotFoundError):
        folder.join("nothing").size()


def test_writing_replaces_and_leaves_nothing_else_behind(folder):
    file = folder.join("day=1", "a.parquet")
    file.write_bytes_atomically(b"\x00new")
    assert file.read_bytes() == b"\x00new"
    assert folder.join("day=1").list_names() == [".hidden.parquet", "_SUCCESS", "a.parquet", "b.parquet"]
    assert folder.join("nothing").list_names() == []


def test_deleting_what_is_not_there_is_no_error(folder):
    file = folder.join("day=1", "a.parquet")
    for _ in range(2):
        file.delete_file()
        assert not file.exists()
        folder.join("day=2").delete_tree()
        assert not folder.join("day=2").exists()
    folder.join("day=1").make_dirs()
    assert folder.join("day=1", "b.parquet").exists(), "making a folder that exists changes nothing"


def test_a_write_that_fails_leaves_the_former_file_and_no_partial_one(tmp_path, monkeypatch):
    file = locate(str(tmp_path / "file"))
    file.write_text_atomically("former")

    def fail(handle):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="No space"):
        file.write_text_atomically("new")
    assert file.read_bytes() == b"former"
    assert os.listdir(tmp_path) == ["file"]


def test_a_copy_of_a_file_appears_whole_or_not_at_all(tmp_path, monkeypatch):
    (tmp_path / "source").write_bytes(b"new" * 1000)
    target = locate(tmp_path / "folder" / "copy")
    target.parent.make_dirs()
    target.write_bytes_atomically(b"former")

    def broken(source, partial):
        partial.write_bytes(b"new")
        raise OSError("the disk is full")

    with monkeypatch.context() as patched:
        patched.setattr("shutil.copyfile", broken)
        with pytest.raises(OSError, match="the disk is full"):
            target.put_file(tmp_path / "source")
    assert target.read_bytes() == b"former"
    assert target.parent.list_names() == ["copy"], "no part is left"
    target.put_file(tmp_path / "source")
    target.get_file(tmp_path / "back")
    assert target.read_bytes() == (tmp_path / "back").read_bytes() == b"new" * 1000
