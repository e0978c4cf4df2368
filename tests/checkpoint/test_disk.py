"""What is asked of the operating system."""

import pytest

from jaxweights.checkpoint._disk import lengthen
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
