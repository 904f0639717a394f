"""Files of lines: what a disk appends, an object store puts anew, and neither loses what another process wrote."""

import pytest
from pyarrow import fs

from embedshard.errors import StorageError
from embedshard.lines import LineFile
from embedshard.storage import locate


@pytest.fixture(params=["disk", "store"])
def place(request, tmp_path):
    if request.param == "disk":
        return locate(tmp_path / "folder" / "lines.jsonl")
    return locate("folder/lines.jsonl", fs._MockFileSystem())


def test_lines_are_appended_to_those_that_are_there(place):
    for number in range(3):
        file = LineFile(place)
        file.add(f"{number}")
        file.keep()
        file.add(f"{number}, after it was kept")
        file.close()
        file.close()
    assert place.read_text().splitlines() == [
        f"{number}{tail}" for number in range(3) for tail in ("", ", after it was kept")
    ]


def test_a_line_that_was_cut_off_stays_alone_on_its_line(place):
    place.parent.make_dirs()
    place.write_text_atomically('whole\n{"cut')
    file = LineFile(place)
    file.add("next")
    file.close()
    assert place.read_text() == 'whole\n{"cut\nnext\n'


def test_two_that_write_at_once_lose_no_line(place):
    first, second = LineFile(place), LineFile(place)
    written = []
    for number in range(4):
        for name, file in (("first", first), ("second", second)):
            file.add(f"{name} {number}")
            written.append(f"{name} {number}")
            file.keep()
            assert sorted(place.read_text().splitlines()) == sorted(written)
    first.close()
    second.close()
    assert sorted(place.read_text().splitlines()) == sorted(written)


def test_a_store_is_written_only_when_there_is_something_new():
    place = locate("folder/lines.jsonl", fs._MockFileSystem())
    file = LineFile(place)
    file.keep()
    file.close()
    assert not place.exists()
    file.add("line")
    assert not place.exists()
    file.keep()
    place.delete_file()
    file.keep()
    assert not place.exists(), "nothing new"
    file.add("another")
    file.close()
    assert place.read_text() == "line\nanother\n"


def test_a_file_that_cannot_be_written_is_told(tmp_path):
    (tmp_path / "file").write_text("")
    place = locate("file/lines.jsonl", fs.SubTreeFileSystem(str(tmp_path), fs.LocalFileSystem()))
    file = LineFile(place)
    file.add("line")
    with pytest.raises(StorageError, match=r"file/lines.jsonl cannot be read or written: .*See that"):
        file.keep()
