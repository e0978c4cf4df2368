"""What is asked of the operating system."""

import os

import pytest

from jaxweights.checkpoint._disk import flush, lengthen
from jaxweights.checkpoint._mapped import MappedFile


@pytest.mark.parametrize("length", [3, 4096, 1 << 20])
def test_a_file_that_is_lengthened_keeps_its_bytes_and_ends_in_zeros(tmp_path, length):
    file = tmp_path / "file"
    file.write_bytes(b"abc")
    lengthen(file, length)
    assert file.read_bytes() == b"abc" + bytes(length - 3)
    # As a run that is gone on with does.
    lengthen(file, length)
    assert file.read_bytes() == b"abc" + bytes(length - 3)


def test_a_file_without_any_bytes_stays_empty(tmp_path):
    file = tmp_path / "file"
    file.touch()
    lengthen(file, 0)
    assert file.read_bytes() == b""


def test_every_file_and_folder_is_sent_to_the_disk_but_nothing_that_is_linked(
    tmp_path, monkeypatch
):
    (tmp_path / "folder" / "deeper").mkdir(parents=True)
    (tmp_path / "elsewhere").touch()
    (tmp_path / "folder" / "link").symlink_to(tmp_path / "elsewhere")
    files = [tmp_path / "folder" / f"{i}" for i in range(20)] + [tmp_path / "folder/deeper/file"]
    for file in files:
        file.touch()
    sent = []
    monkeypatch.setattr(os, "fsync", lambda descriptor: sent.append(os.fstat(descriptor).st_ino))
    flush(tmp_path / "folder")
    folders = [tmp_path / "folder", tmp_path / "folder" / "deeper"]
    assert sorted(sent) == sorted(path.stat().st_ino for path in [*files, *folders])


def test_a_file_that_the_disk_refuses_is_an_error_among_others(tmp_path, monkeypatch):
    for i in range(20):
        (tmp_path / f"{i}").touch()
    refused = (tmp_path / "13").stat().st_ino

    def fsync(descriptor):
        if os.fstat(descriptor).st_ino == refused:
            raise OSError("refused")

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(OSError, match="refused"):
        flush(tmp_path)


def test_bytes_are_read_ahead_only_if_they_are_not_in_memory(tmp_path, monkeypatch):
    file = tmp_path / "file"
    file.write_bytes(bytes(1 << 16))
    asked = []
    monkeypatch.setattr("os.posix_fadvise", lambda *call: asked.append(call), raising=False)
    monkeypatch.setattr("os.RWF_NOWAIT", 8, raising=False)
    mapped = MappedFile(file, function="test")

    def not_here(*call):
        raise BlockingIOError

    monkeypatch.setattr("os.preadv", lambda *call: 1, raising=False)
    mapped.expect(4096, 4096)
    assert not asked
    monkeypatch.setattr("os.preadv", not_here, raising=False)
    mapped.expect(4096, 4096)
    assert len(asked) == 1
