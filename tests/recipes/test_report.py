"""The report is one page that needs nothing else, and says what it was given."""

import re
import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest

from jaxweights.recipes._figures import bars, heatmap, spectra
from jaxweights.recipes._html import megabytes
from jaxweights.recipes._leaves import LeafResult
from jaxweights.recipes._report import render_report


def leaf(path, **changes):
    fields = {
        "path": path,
        "shape": (2, 4, 8),
        "parameters": 64,
        "bytes_before": 256,
        "bytes_after": 40,
        "representation": "Quantized(bits=4)",
        "changed": True,
        "why": "",
        "zeros": 0.25,
        "errors": (0.1, 0.3),
    }
    return LeafResult(**fields | changes)


LEAVES = [
    leaf("layers/attn/q/kernel"),
    leaf("layers/mlp/up/kernel", errors=(0.2, 0.25)),
    leaf(
        "embed/embedding",
        changed=False,
        representation="dense",
        why="an embedding: left alone unless a `match` names it",
        errors=(),
        bytes_after=2560,
    ),
]


def score(nll, windows):
    return {"perplexity": np.exp(nll), "nll": nll, "error": 0.1, "tokens": 9, "windows": windows}


RESULT = {
    "model": {"name": "tiny <1>", "source": "here", "fingerprint": "sha256:0", "parameters": 2e6},
    "size": {"before": 8_000_000, "after": 1_000_000, "on_disk": {"orbax": 900_000}},
    "steps": [
        {
            "method": "quantize.gptq",
            "settings": {"bits": 4},
            "match": ["layers/.*"],
            "except": [".*/<o>/.*"],
        }
    ],
    "evaluation": {
        "perplexity": {
            "before": score(3.0, (2.9, 3.1)),
            "after": score(3.1, (3.0, 3.2)),
            "definition": "How it was measured.",
        }
    },
    "calibration": {"definition": "Calibrated on words."},
    "spectra": {"attn/q, layer 1": ([3.0, 1.0], [2.9, 0.9])},
    "recipe": "model: <script>alert('x')</script> & more\n",
    "versions": {"jax": "0.0"},
    "timestamp": "2026-01-01T00:00:00+00:00",
    "seconds": {"load": 1.0},
}


@pytest.fixture(scope="module")
def page():
    return render_report(RESULT, LEAVES)


def test_texts_are_escaped(page):
    assert "<script" not in page
    assert "&lt;script&gt;alert(&#x27;x&#x27;)&lt;/script&gt; &amp; more" in page
    assert ".*/&lt;o&gt;/.*" in page
    assert "<h1>tiny &lt;1&gt;: what changed and what it cost</h1>" in page


def test_nothing_outside_the_page_is_referred_to(page):
    rest = re.sub(r'xmlns(:xlink)?="http://www.w3.org/[^"]*"', "", page)
    assert "http" not in rest
    assert not re.search(r"\bsrc=|@import|<link|url\((?!#)", rest)
    links = set(re.findall(r'xlink:href="([^"]*)"', rest))
    assert all(link.startswith(("#", "data:image/png;base64,")) for link in links)


def test_numbers_before_and_after_are_there(page):
    assert "1 MB" in page and "was 8 MB" in page and "8.00 times smaller" in page
    assert f"was {np.exp(3.0):.2f}" in page
    # Every window grew by 0.1 nats: the change is exp(0.1) - 1 without any error.
    assert "+10.5 %" in page
    assert "On the disk: orbax 900 kB." in page


def test_what_was_left_is_there_with_its_reason(page):
    assert "unless a <code>match</code> names it" in page
    assert "33.3 % of the parameters." in page


def test_every_section_is_there(page):
    for heading in (
        "Before and after",
        "What was done",
        "Error of every matrix",
        "Spectra",
        "Every weight that was changed",
        "Left as it was, and why",
        "The recipe",
        "Where this comes from",
    ):
        assert f"<h2>{heading}</h2>" in page


def test_figures_are_well_formed_and_take_the_pages_colours(page):
    drawings = re.findall(r"<svg.*?</svg>", page, flags=re.DOTALL)
    assert len(drawings) == 3
    for drawing in drawings:
        ElementTree.fromstring(drawing)
        assert "var(--ink)" in drawing
        assert not re.search(r"#0[1-5]0[1-5]0[1-5]", drawing)
        assert "DejaVu" not in drawing


def test_ids_of_different_figures_do_not_collide(page):
    ids = re.findall(r'\bid="([^"]*)"', page)
    assert len(ids) == len(set(ids))


def test_a_report_without_measures_and_changes_is_a_page_too():
    bare = RESULT | {"evaluation": {}, "calibration": None, "spectra": {}}
    page = render_report(bare, [LEAVES[-1]])
    assert "No matrix was changed in value." in page
    assert "<h2>Spectra</h2>" not in page


def test_the_heatmap_has_layers_down_and_kinds_across():
    drawn = heatmap({"q": (0.1, 0.2, 0.3), "head": (0.05,)})
    texts = [element.text for element in ElementTree.fromstring(drawn).iter() if element.text]
    for text in ("q", "head", "0", "1", "2", "10.0", "20.0", "30.0", "5.0", "layer"):
        assert text in texts


def test_the_same_input_draws_the_same_figure():
    panels = [("Weights, MB", ".1f", 2.0, 1.0, 0.0, 0.0)]
    assert bars(panels) == bars(panels)
    lines = {"a": ([2.0, 1.0], [2.0, 0.0])}
    assert spectra(lines) == spectra(lines)


@pytest.mark.parametrize(
    "count, words",
    [
        (12, "12 bytes"),
        (1500, "1.5 kB"),
        (999_600, "1000 kB"),
        (2_500_000, "2.5 MB"),
        (3e9, "3 GB"),
    ],
)
def test_sizes_have_three_digits(count, words):
    assert megabytes(count) == words
