"""Texts to calibrate and to measure with."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

from jaxweights.recipes._download import Progress
from jaxweights.recipes._fetch import fetch
from jaxweights.recipes._packages import TEXTS


@dataclasses.dataclass(frozen=True)
class Text:
    """A text in its documents.

    Attributes:
      name: What reports call it.
      documents: Files, chapters or topics, in order.
    """

    name: str
    documents: tuple[str, ...]

    @property
    def whole(self) -> str:
        """All documents, with an empty line between them."""
        return "\n\n".join(self.documents)


def load_text(name: str, *, reflow: bool = True, progress: Progress | None = None) -> Text:
    """Loads a named text, downloading it at the first call.

    Args:
      name: `brown` (the Brown corpus, 500 files of American prose of 1961), `moby-dick` (the
        novel, by chapter), or `pydoc-topics` (Python's own help texts, on every machine).
      reflow: As in `reflow_paragraphs`.
      progress: Called with (task, bytes done, bytes in all) while downloading.

    Returns:
      The text.

    Example:
      >>> text = load_text("pydoc-topics")
      >>> len(text.documents) > 50
      True
    """
    package = TEXTS[name]
    if package is None:
        documents = _pydoc_topics()
    else:
        path = fetch(package, progress=progress)
        documents = _brown(path) if path.is_dir() else _chapters(path)
    return _text(name, documents, reflow)


def read_text_file(path: str | Path, *, reflow: bool = True) -> Text:
    r"""Reads a text file of one's own as one document.

    Args:
      path: A UTF-8 file.
      reflow: As in `reflow_paragraphs`.

    Returns:
      The text.

    Raises:
      ValueError: If it cannot be read, is not UTF-8, or holds no words.

    Example:
      >>> import tempfile
      >>> file = Path(tempfile.mkdtemp()) / "notes.txt"
      >>> _ = file.write_text("One line\nand its rest.")
      >>> read_text_file(file).documents
      ('One line and its rest.',)
    """
    try:
        document = Path(path).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"recipes.read_text_file: '{path}' is not UTF-8 text ({error.reason} at byte "
            f"{error.start}). Convert it first."
        ) from None
    except OSError as error:
        raise ValueError(f"recipes.read_text_file: '{path}': {error.strerror}.") from None
    if not document.strip():
        raise ValueError(f"recipes.read_text_file: '{path}' holds no words.")
    return _text(Path(path).name, (document,), reflow)


def reflow_paragraphs(text: str) -> str:
    r"""Joins the lines of each paragraph; empty lines still part paragraphs.

    Books are stored with hard line breaks, which language models did not see in training and pay
    for: prose with hard breaks has another perplexity than the same prose without.

    Args:
      text: Any text.

    Returns:
      The text, one line a paragraph, with one empty line between paragraphs.

    Example:
      >>> reflow_paragraphs("Call me\nIshmael.\n\n\nSome years ago")
      'Call me Ishmael.\n\nSome years ago'
    """
    paragraphs = re.split(r"\n[^\S\n]*\n\s*", text.replace("\r\n", "\n").strip())
    return "\n\n".join(" ".join(paragraph.split()) for paragraph in paragraphs)


def _text(name: str, documents: tuple[str, ...], reflow: bool) -> Text:
    return Text(name, tuple(map(reflow_paragraphs, documents)) if reflow else documents)


def _pydoc_topics() -> tuple[str, ...]:
    from pydoc_data import topics

    # The order of the keys differs between Pythons.
    return tuple(topics.topics[name] for name in sorted(topics.topics))


def _chapters(path: Path) -> tuple[str, ...]:
    text = path.read_text(encoding="utf-8")
    return tuple(part.strip() for part in re.split(r"(?m)^(?=CHAPTER \d+\.)", text) if part.strip())


def _brown(folder: Path) -> tuple[str, ...]:
    names = sorted(path for path in folder.iterdir() if re.fullmatch(r"c[a-r]\d\d", path.name))
    return tuple(untag(path.read_text(encoding="utf-8")) for path in names)


def untag(tagged: str) -> str:
    r"""Takes the word classes of the Brown corpus away and closes up its punctuation.

    Args:
      tagged: Lines of `word/class`.

    Returns:
      Plain prose, one paragraph a sentence as in the source.

    Example:
      >>> untag("``/`` No/at evidence/nn ''/'' ,/, he/pps said/vbd ./.")
      '"No evidence", he said.'
    """
    sentences = []
    for line in tagged.splitlines():
        words = [token.rsplit("/", 1)[0] for token in line.split()]
        if words:
            sentences.append(_close_up(" ".join(words)))
    return "\n".join(sentences)


def _close_up(sentence: str) -> str:
    sentence = re.sub(r"``\s*", '"', sentence)
    sentence = re.sub(r"\s*''", '"', sentence)
    sentence = re.sub(r"\s+([,.;:?!)\]}])", r"\1", sentence)
    return re.sub(r"([(\[{])\s+", r"\1", sentence)
