"""What is at a destination is always either the old or the new, whole."""

import errno
import os

import pytest

from jaxweights.checkpoint import _atomic, atomic_directory, atomic_file
from jaxweights.checkpoint._check_destination import check_destination
from tests.checkpoint._helpers import everything, kill, start


def test_a_directory_appears_with_all_its_files_and_nothing_else(tmp_path):
    with atomic_directory(tmp_path / "deep" / "out") as partial:
        (partial / "sub").mkdir()
        (partial / "sub" / "a").write_text("1")
        assert not (tmp_path / "deep" / "out").exists()
    assert everything(tmp_path) == {"deep/out/sub/a": b"1"}


@pytest.mark.parametrize("context, old", [(atomic_directory, "out/a"), (atomic_file, "out")])
def test_an_existing_destination_is_kept_unless_overwriting_is_asked_for(tmp_path, context, old):
    (tmp_path / old).parent.mkdir(exist_ok=True)
    (tmp_path / old).write_text("old")
    with pytest.raises(FileExistsError, match=r"out' exists and nothing was written.*overwrite="):
        with context(tmp_path / "out"):
            pytest.fail("the body must not run")
    assert everything(tmp_path) == {old: b"old"}
    with context(tmp_path / "out", overwrite=True) as partial:
        (partial / "a" if partial.is_dir() else partial).write_text("new")
        assert (tmp_path / old).read_text() == "old"
    assert everything(tmp_path) == {old: b"new"}


@pytest.mark.parametrize("context, old", [(atomic_directory, "out/a"), (atomic_file, "out")])
@pytest.mark.parametrize("error", [RuntimeError("boom"), KeyboardInterrupt()])
def test_a_failing_body_changes_nothing_and_leaves_nothing(tmp_path, context, old, error):
    with pytest.raises(type(error)):
        with context(tmp_path / "new" / "out") as partial:
            (partial / "a" if partial.is_dir() else partial).write_text("half")
            raise error
    assert list(tmp_path.iterdir()) == []
    (tmp_path / old).parent.mkdir(exist_ok=True)
    (tmp_path / old).write_text("old")
    with pytest.raises(type(error)):
        with context(tmp_path / "out", overwrite=True) as partial:
            raise error
    assert everything(tmp_path) == {old: b"old"}


def test_a_directory_is_swapped_in_two_steps_where_the_system_has_no_exchange(
    tmp_path, monkeypatch
):
    monkeypatch.setattr(_atomic, "rename_at_once", lambda *_: False)
    for text in ("first", "second"):
        with atomic_directory(tmp_path / "out", overwrite=True) as partial:
            (partial / "a").write_text(text)
        assert everything(tmp_path) == {"out/a": text.encode()}


def test_a_directory_caught_between_the_two_steps_is_put_back_by_the_next_run(tmp_path):
    aside = tmp_path / f".out{_atomic._MARK}0123456789abcdef.old"
    aside.mkdir()
    (aside / "a").write_text("old")
    with pytest.raises(FileExistsError, match="exists and nothing was written"):
        with atomic_directory(tmp_path / "out"):
            pass
    assert everything(tmp_path) == {"out/a": b"old"}


def test_a_destination_that_appears_meanwhile_is_kept(tmp_path):
    with pytest.raises(FileExistsError, match="appeared while its replacement was being written"):
        with atomic_directory(tmp_path / "out") as partial:
            (partial / "a").write_text("mine")
            (tmp_path / "out").mkdir()
            (tmp_path / "out" / "a").write_text("theirs")
    assert everything(tmp_path) == {"out/a": b"theirs"}


def test_an_empty_name_is_not_the_folder_that_one_is_in():
    with pytest.raises(ValueError, match=r"the destination is empty\. Name what shall be written"):
        check_destination("write", "", overwrite=True, directory=True)


@pytest.mark.parametrize(
    "context, is_now", [(atomic_directory, "is a file"), (atomic_file, "is a directory")]
)
def test_a_file_and_a_directory_do_not_replace_each_other(tmp_path, context, is_now):
    out = tmp_path / "out"
    out.mkdir() if context is atomic_file else out.touch()
    with pytest.raises(FileExistsError, match=is_now):
        with context(out, overwrite=True):
            pass
    assert out.exists()


def test_the_working_directory_is_never_overwritten(tmp_path, monkeypatch):
    (tmp_path / "inside").mkdir()
    monkeypatch.chdir(tmp_path / "inside")
    with pytest.raises(ValueError, match="would remove the working directory"):
        with atomic_directory(tmp_path, overwrite=True):
            pass


def test_a_link_keeps_pointing_to_what_is_overwritten(tmp_path):
    (tmp_path / "real").write_text("old")
    (tmp_path / "link").symlink_to("real")
    with atomic_file(tmp_path / "link", overwrite=True) as partial:
        partial.write_text("new")
    assert (tmp_path / "real").read_text() == "new" and (tmp_path / "link").is_symlink()


@pytest.mark.parametrize("when", ["out/a", None])
def test_a_killed_process_leaves_the_old_destination_and_the_next_run_cleans_up(tmp_path, when):
    if when:
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "a").write_text("old")
    child = start(f"""
        import time
        from jaxweights.checkpoint import atomic_directory
        with atomic_directory({str(tmp_path / "out")!r}, overwrite=True) as partial:
            (partial / "a").write_text("half")
            print("ready", flush=True)
            time.sleep(60)
    """)
    # While its writer lives, a partial result is not touched by others.
    with atomic_directory(tmp_path / "out", overwrite=True) as partial:
        (partial / "a").write_text("old")
    assert sorted(everything(tmp_path).values()) == [b"half", b"old"]
    kill(child)
    assert (tmp_path / "out" / "a").read_text() == "old"
    with atomic_directory(tmp_path / "out", overwrite=True) as partial:
        (partial / "a").write_text("new")
    assert everything(tmp_path) == {"out/a": b"new"}


def test_a_disk_without_room_is_refused_before_anything_is_written(tmp_path):
    (tmp_path / "out").write_text("old")
    with pytest.raises(OSError, match=r"out' needs \d+ bytes, but only \d+ are free.*Free some"):
        with atomic_file(tmp_path / "out", overwrite=True, needs_bytes=2**60):
            pytest.fail("the body must not run")
    assert everything(tmp_path) == {"out": b"old"}


def test_a_disk_that_fills_up_leaves_the_destination_untouched(tmp_path, file_limit):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "a").write_text("old")
    with pytest.raises(OSError, match=r"the disk is full while writing .*out'.*untouched") as error:
        with atomic_directory(tmp_path / "out", overwrite=True) as partial:
            (partial / "a").write_bytes(bytes(100_000))
    assert error.value.errno == errno.ENOSPC
    assert everything(tmp_path) == {"out/a": b"old"}


def test_a_disk_that_refuses_the_final_flush_leaves_the_destination_untouched(
    tmp_path, monkeypatch
):
    def fsync(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(OSError, match="the disk is full"):
        with atomic_file(tmp_path / "out") as partial:
            partial.write_text("new")
    assert everything(tmp_path) == {}


def test_errors_that_are_not_about_space_pass_unchanged(tmp_path):
    with pytest.raises(PermissionError, match="mine"):
        with atomic_file(tmp_path / "out"):
            raise PermissionError("mine")
