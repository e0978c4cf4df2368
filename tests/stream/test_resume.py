"""A killed stream leaves no destination, and is gone on with to the same bits."""

import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest

from jaxweights.stream import _destination
from jaxweights.stream._jobs import Job, Operand
from jaxweights.stream._run import stream_jobs
from tests.checkpoint._helpers import everything
from tests.stream.test_delta import Arrays

PROGRAM = """\
    import sys
    from pathlib import Path
    from tests.stream.test_resume import run
    written = 0
    def progress(task, done, total):
        global written
        written += 1
        if written == int(sys.argv[2]):
            print("ready", flush=True)
            sys.stdin.readline()
    run(Path(sys.argv[1]), format=sys.argv[3], progress=progress)
"""


def run(destination, *, scale=2.0, **options):
    """A stream of ten small tensors that are doubled."""
    jobs = []
    for i in range(10):
        array = np.random.default_rng(i).normal(size=(50, 20)).astype(np.float32)
        jobs.append(
            Job(
                f"layer.{i}",
                array.shape,
                array.dtype,
                (Operand(Arrays(array), f"layer.{i}"),),
                lambda arrays, start: np.asarray(arrays[0]) * np.float32(scale),
                entrywise=True,
            )
        )
    return stream_jobs(
        "stream",
        jobs,
        destination,
        recipe={"scale": scale},
        identity={"scale": scale},
        max_shard_bytes=10_000,
        **options,
    )


def _killed(destination, after, form="safetensors"):
    """Starts a stream and kills it when it has made some progress."""
    child = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(PROGRAM), str(destination), str(after), form],
        stdout=subprocess.PIPE,
        stdin=subprocess.PIPE,
        cwd=Path(__file__).resolve().parents[2],
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
    )
    assert child.stdout is not None and child.stdout.readline() == b"ready\n"
    return child


def _end(child):
    child.send_signal(signal.SIGKILL)
    child.wait()
    child.stdout.close()
    child.stdin.close()


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    run(folder / "out")
    return everything(folder / "out")


@pytest.mark.parametrize("after, form", [(2, "safetensors"), (7, "safetensors"), (5, "orbax")])
def test_a_killed_run_is_gone_on_with_to_the_same_bytes(tmp_path, after, form):
    run(tmp_path / "whole", format=form)
    uninterrupted = everything(tmp_path / "whole")
    shutil.rmtree(tmp_path / "whole")
    child = _killed(tmp_path / "out", after, form)
    _end(child)
    assert not (tmp_path / "out").exists()
    done = run(tmp_path / "out", format=form, resume=True)
    assert 0 < done.resumed < 10
    # The provenance, too: what was not read again has the checksums that the killed run took.
    said = json.loads(uninterrupted["jaxweights-provenance.json"])
    assert len(said["inputs"]) == 10
    found = everything(tmp_path)
    assert found == {f"out/{name}": content for name, content in uninterrupted.items()}


def test_what_was_written_behind_the_last_tensor_is_written_again(tmp_path, monkeypatch):
    run(tmp_path / "whole")

    def killed(folder):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(_destination, "flush", killed)
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path / "out", files={"config.json": "{}"})
    assert run(tmp_path / "out", files={"config.json": "{}"}, resume=True).resumed == 10
    made, whole = everything(tmp_path / "out"), everything(tmp_path / "whole")
    assert made.pop("config.json") == b"{}"
    assert made.keys() == whole.keys()


def test_all_is_on_the_disk_as_it_is_before_it_has_its_name(tmp_path, monkeypatch):
    sent, fsync = {}, os.fsync

    def recorded(descriptor):
        fsync(descriptor)
        status = os.fstat(descriptor)
        sent[status.st_ino] = (status.st_mtime_ns, (tmp_path / "out").exists())

    monkeypatch.setattr(os, "fsync", recorded)
    run(tmp_path / "out", files={"config.json": "{}"})
    made = [tmp_path / "out", *(tmp_path / "out").rglob("*")]
    assert {"config.json", "model.safetensors.index.json"} < {path.name for path in made}
    assert all(sent[p.stat().st_ino] == (p.stat().st_mtime_ns, False) for p in made)


def test_a_torn_line_of_the_journal_takes_no_other_along(tmp_path, monkeypatch):
    _end(_killed(tmp_path / "out", 5))
    [partial] = tmp_path.iterdir()
    with (partial / _destination.JOURNAL).open("a") as journal:
        journal.write('{"tensor": "lay')

    def killed(folder):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(_destination, "flush", killed)
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path / "out", resume=True)
    assert run(tmp_path / "out", resume=True).resumed == 10


def test_a_format_that_cannot_be_written_is_refused(tmp_path):
    with pytest.raises(ValueError, match="format='gguf' cannot be written"):
        run(tmp_path / "out", format="gguf")


def test_without_resuming_a_run_starts_anew(tmp_path, uninterrupted):
    _end(_killed(tmp_path / "out", 5))
    assert run(tmp_path / "out").resumed == 0
    assert everything(tmp_path / "out") == uninterrupted


def test_tensors_that_a_lost_machine_did_not_keep_are_made_again(tmp_path, uninterrupted):
    _end(_killed(tmp_path / "out", 7))
    [partial] = tmp_path.iterdir()
    file = partial / "model-00001-of-00005.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    run(tmp_path / "out", resume=True)
    assert everything(tmp_path / "out")[file.name] == uninterrupted[file.name]


def test_what_another_recipe_left_is_not_gone_on_with(tmp_path):
    _end(_killed(tmp_path / "out", 5))
    with pytest.raises(ValueError, match=r"differs in scale, so it cannot be gone on with"):
        run(tmp_path / "out", scale=3.0, resume=True)


def test_two_runs_for_one_destination_refuse_each_other(tmp_path):
    child = _killed(tmp_path / "out", 3)
    try:
        with pytest.raises(FileExistsError, match="another run is writing"):
            run(tmp_path / "out")
    finally:
        _end(child)


def test_an_existing_destination_is_kept(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="exists and nothing was written"):
        run(tmp_path / "out")
    with pytest.raises(FileExistsError, match="holds no checkpoint"):
        run(tmp_path / "out", overwrite=True)
    assert everything(tmp_path) == {"out/mine.txt": b"mine"}


def test_a_failing_tensor_leaves_nothing_behind(tmp_path):
    def fail(arrays, start):
        raise ValueError("'layer.0': broken")

    array = np.ones((4, 4), np.float32)
    job = Job("layer.0", (4, 4), array.dtype, (Operand(Arrays(array), "a"),), fail, True)
    with pytest.raises(ValueError, match="broken"):
        stream_jobs("stream", [job], tmp_path / "deep" / "out", recipe={}, identity={})
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_an_error_and_leaves_nothing_behind(tmp_path, file_limit):
    array = np.ones((100, 100), np.float32)
    job = Job("w", array.shape, array.dtype, (Operand(Arrays(array), "a"),))
    with pytest.raises(OSError, match="the disk is full while writing"):
        stream_jobs("stream", [job], tmp_path / "out", recipe={}, identity={})
    assert list(tmp_path.iterdir()) == []
