"""A killed run is gone on with to the same bytes."""

import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from jaxweights.quantize import round_to_nearest
from jaxweights.recipes import transform_in_blocks
from jaxweights.sparsify import magnitude
from tests.recipes._onload import QUICK, tensors_of, tokens

PROGRAM = """\
    import sys
    from pathlib import Path
    from jaxweights.recipes import transform_in_blocks
    from tests.recipes._onload import QUICK
    def progress(task, done, total):
        if (task, done) == (sys.argv[3], int(sys.argv[4])):
            print("ready", flush=True)
            sys.stdin.readline()
    transform_in_blocks(sys.argv[1], sys.argv[2], **QUICK, progress=progress)
"""


@pytest.fixture(scope="module")
def uninterrupted(folder, tmp_path_factory):
    out = tmp_path_factory.mktemp("whole") / "out"
    return tensors_of(transform_in_blocks(folder / "llama", out, **QUICK))


@pytest.mark.parametrize("task, done", [("Blocks", 0), ("Blocks", 2), ("Writing weights", 9)])
def test_a_killed_run_is_gone_on_with_to_the_same_bytes(
    folder, tmp_path, uninterrupted, task, done
):
    child = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(PROGRAM), str(folder / "llama"),
         str(tmp_path / "out"), task, str(done)],
        stdout=subprocess.PIPE,
        stdin=subprocess.PIPE,
        cwd=Path(__file__).resolve().parents[2],
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
    )  # fmt: skip
    assert child.stdout is not None and child.stdin is not None
    assert child.stdout.readline() == b"ready\n"
    child.send_signal(signal.SIGKILL)
    child.wait()
    child.stdout.close()
    child.stdin.close()
    assert not (tmp_path / "out").exists()
    seen = []
    transform_in_blocks(
        folder / "llama", tmp_path / "out", **QUICK, resume=True,
        progress=lambda *event: seen.append(event),
    )  # fmt: skip
    assert seen[0] == ("Blocks", {"Blocks": done}.get(task, 3), 3)
    assert tensors_of(tmp_path / "out") == uninterrupted
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def interrupted(folder, out, at, **changes):
    """Leaves what Ctrl-C behind so many blocks leaves."""

    def progress(task, done, total):
        if done == at:
            raise KeyboardInterrupt

    given = QUICK | {"progress": progress} | changes
    with pytest.raises(KeyboardInterrupt):
        transform_in_blocks(folder / "llama", out, **given)
    [left] = out.parent.glob(".out.*")
    return left / ".blocks"


def test_torn_files_are_made_again(folder, tmp_path, uninterrupted):
    left = interrupted(folder, tmp_path / "out", 2)
    assert sorted(p.name for p in left.iterdir()) == [
        "block-00000", "block-00001", "identity.json", "states-1-00002",
    ]  # fmt: skip
    damaged = bytearray((left / "block-00001").read_bytes())
    damaged[-100] ^= 1
    (left / "block-00001").write_bytes(damaged)
    seen = []
    transform_in_blocks(
        folder / "llama", tmp_path / "out", **QUICK, resume=True,
        progress=lambda *event: seen.append(event),
    )  # fmt: skip
    # What the first block passed on is gone, so it is made again, too.
    assert seen[0] == ("Blocks", 0, 3)
    assert tensors_of(tmp_path / "out") == uninterrupted


@pytest.mark.parametrize(
    "changes, word",
    [
        ({"batches": tokens(2)}, "batches"),
        ({"transforms": magnitude(sparsity=0.5)}, "transforms"),
        ({"recipe": "other"}, "recipe"),
        ({"again": "never"}, "again"),
    ],
)
def test_another_run_is_not_gone_on_with(folder, tmp_path, changes, word):
    interrupted(folder, tmp_path / "out", 1)
    given = QUICK | changes
    with pytest.raises(ValueError, match=f"an earlier run for .* differs in {word}, so it cannot"):
        transform_in_blocks(folder / "llama", tmp_path / "out", **given, resume=True)


def test_other_settings_of_a_transform_are_not_gone_on_with(folder, tmp_path):
    interrupted(folder, tmp_path / "out", 1, transforms=round_to_nearest(bits=8))
    given = QUICK | {"transforms": round_to_nearest(bits=4)}
    with pytest.raises(ValueError, match="differs in representations, so it cannot"):
        transform_in_blocks(folder / "llama", tmp_path / "out", **given, resume=True)
