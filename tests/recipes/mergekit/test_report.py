"""The merge report: written whole, beside the merge, with numbers that are those of the deltas."""

import html
import json
import re

import numpy as np
import pytest

from jaxweights.analyze import deltas
from jaxweights.checkpoint import write_safetensors
from jaxweights.cli._main import main
from jaxweights.recipes.mergekit import run_merge
from tests.recipes.mergekit._checkpoints import CONFIG, read, write_config

pytest.importorskip("matplotlib")

Q1 = "model.layers.1.self_attn.q_proj.weight"
SHAPES = {
    "model.embed_tokens.weight": (24, 8),
    **{
        f"model.layers.{i}.{kind}.weight": shape
        for i in range(2)
        for kind, shape in {"self_attn.q_proj": (8, 8), "mlp.up_proj": (16, 8)}.items()
    },
    "model.norm.weight": (8,),
}


def _model(seed, base=None):
    draw = np.random.default_rng(seed)
    drawn = {name: draw.normal(size=shape).astype(np.float32) for name, shape in SHAPES.items()}
    return drawn if base is None else {k: base[k] + np.float32(0.1) * v for k, v in drawn.items()}


BASE = _model(0)
MODELS = {name: _model(i, BASE) for i, name in enumerate(["math", "code", "chat"], start=1)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    for name, arrays in {"base": BASE, **MODELS}.items():
        files = {"config.json": json.dumps(CONFIG)}
        write_safetensors(folder / name, arrays, files=files)
    return folder


def _ties(*names, **more):
    entries = [
        {"model": name, "parameters": {"weight": 1.0, "density": 0.25}} for name in names or MODELS
    ]
    return {"merge_method": "ties", "base_model": "base", "models": entries, **more}


def _linear(*names, **more):
    entries = [{"model": name, "parameters": {"weight": 1.0}} for name in names]
    return {"merge_method": "linear", "models": entries, **more}


def _page(folder, config, name):
    path = write_config(folder, config, f"{name}.yml")
    run_merge(path, folder / name, report=folder / f"{name}.html")
    return (folder / f"{name}.html").read_text(encoding="utf-8")


def _row(page, tensor):
    """The cells of a tensor's row by the heads of the columns."""
    heads = re.findall(r"<th(?: [^>]*)?>(.*?)</th>", page)
    row = re.search(rf"<tr><td><code>{re.escape(tensor)}</code>.*?</tr>", page)
    assert row is not None
    cells = re.findall(r"<td[^>]*>(.*?)</td>", row[0])
    return dict(zip(heads, cells, strict=True))


def test_the_table_holds_the_numbers_of_the_analysis(folder):
    page = _page(folder, _ties(), "ties")
    trees = [{Q1: model[Q1]} for model in MODELS.values()]
    want = deltas({Q1: BASE[Q1]}, trees, density=0.25)[Q1]
    row = _row(page, Q1)
    assert row["Shape"] == "8×8"
    for name, norm in zip(MODELS, want.relative_norm, strict=True):
        assert row[name] == f"{100 * norm:.2f} %" or row[name] == f"{100 * norm:.1f} %"
    pairs = np.asarray(want.cosine)[np.triu_indices(3, 1)]
    assert float(row["Cosine"]) == pytest.approx(pairs.mean(), abs=6e-4)
    assert float(row["Lowest"]) == pytest.approx(pairs.min(), abs=6e-4)
    assert row["Conflicts"] == f"{100 * want.sign_conflict:.1f} %"
    assert row["Held"] == f"{100 * np.mean(want.kept_energy):.1f} %"


def test_the_page_holds_its_figures_and_the_configuration_and_needs_no_network(folder):
    page = _page(folder, _ties(), "figures")
    classes = re.findall(r'<svg[^>]* class="([^"]*)"', page)
    assert classes == [
        "cosines",
        "cosines-by-depth",
        "conflicts-by-depth",
        "sizes-by-depth",
        "kept-by-depth",
    ]
    for word in ("self_attn.q_proj", "mlp.up_proj", *MODELS):
        assert f">{word}</text>" in page
    assert "differences from the base, base." in page
    assert html.escape((folder / "figures.yml").read_text()) in page
    assert not re.search(r'(src|href)="(?!#|data:)', page)
    assert page.count("<section>") == page.count("</section>") == 7


def test_the_heatmap_shows_the_cosines_of_whole_models(folder):
    page = _page(folder, _ties(), "heatmap")
    figure = page[page.index('class="cosines"') : page.index('class="cosines-by-depth"')]
    shown = re.findall(r">([-\u2212]?\d\.\d\d)</text>", figure)
    moved = [
        np.concatenate([(m[k].astype(float) - BASE[k]).ravel() for k in SHAPES])
        for m in MODELS.values()
    ]
    for i, j in ((0, 1), (0, 2), (1, 2)):
        cosine = moved[i] @ moved[j] / np.linalg.norm(moved[i]) / np.linalg.norm(moved[j])
        assert shown.count(f"{cosine:.2f}") >= 2  # once on each side of the diagonal


def test_the_merge_is_the_same_with_and_without_a_report(folder):
    config = write_config(folder, _ties(), "same.yml")
    plain = run_merge(config, folder / "plain")
    told = run_merge(config, folder / "told", report=folder / "told.html")
    assert plain.checksums == told.checksums


def test_averages_take_the_first_model_as_origin_and_say_so(folder):
    page = _page(folder, _linear("math", "code", "chat"), "linear")
    assert "linear has no base, so deltas are differences from the first model, math." in page
    trees = [{Q1: MODELS[name][Q1]} for name in ("code", "chat")]
    want = deltas({Q1: MODELS["math"][Q1]}, trees)[Q1]
    assert float(_row(page, Q1)["Cosine"]) == pytest.approx(float(want.cosine[0, 1]), abs=6e-4)
    assert "Held" not in _row(page, Q1)


def test_averages_with_a_base_compare_with_it(folder):
    page = _page(folder, _linear("math", "base", "code", base_model="base"), "based")
    assert "differences from the base, base." in page
    want = deltas({Q1: BASE[Q1]}, [{Q1: MODELS[n][Q1]} for n in ("math", "code")])[Q1]
    row = _row(page, Q1)
    assert float(row["Cosine"]) == pytest.approx(float(want.cosine[0, 1]), abs=6e-4)
    assert "Lowest" not in row and "base" not in row


def test_one_delta_has_a_size_but_no_cosines(folder):
    page = _page(folder, _linear("math", "code"), "single")
    assert "Every tensor has one delta" in page
    assert re.findall(r'<svg[^>]* class="([^"]*)"', page) == ["sizes-by-depth"]
    assert set(_row(page, Q1)) == {"Tensor", "Shape", "code"}


def test_copies_have_nothing_to_compare(folder):
    config = {"merge_method": "passthrough", "models": [{"model": "math"}]}
    page = _page(folder, config, "copies")
    assert "there are no deltas to compare" in page and "<svg" not in page


def test_names_are_escaped_and_no_formulas(folder):
    odd = folder / "<i>a&b$x_1$"
    other = folder / "_hidden"
    for place, name in ((odd, "math"), (other, "code")):
        write_safetensors(place, MODELS[name], files={"config.json": json.dumps(CONFIG)})
    page = _page(folder, _ties(odd.name, other.name), "names")
    assert "<i>" not in page
    assert ">&lt;i&gt;a&amp;b$x_1$</text>" in page
    assert re.search(r">\u200b?_hidden</text>", page)
    assert "&lt;i&gt;a&amp;b$x_1$" in page[page.index("The configuration") :]


def test_an_existing_report_is_refused_before_any_work(folder):
    config = write_config(folder, _ties(), "exists.yml")
    report = folder / "exists.html"
    report.write_text("mine")
    with pytest.raises(FileExistsError, match=r"exists\.html' exists and nothing was written"):
        run_merge(config, folder / "exists", report=report)
    assert not (folder / "exists").exists() and report.read_text() == "mine"
    run_merge(config, folder / "exists", report=report, overwrite=True)
    assert report.read_text(encoding="utf-8").startswith("<!doctype html>")


@pytest.mark.parametrize("which, words", [("clash.yml", "configuration"), ("clash", "destination")])
def test_a_report_that_would_replace_the_runs_own_files_is_refused(folder, which, words):
    config = write_config(folder, _ties(), "clash.yml")
    with pytest.raises(ValueError, match=f"would replace the {words}"):
        run_merge(config, folder / "clash", report=folder / which, overwrite=True)
    assert not (folder / "clash").exists()


def test_a_report_may_lie_in_the_merged_folder(folder):
    config = write_config(folder, _ties(), "inside.yml")
    run_merge(config, folder / "inside", report=folder / "inside" / "report.html")
    assert (folder / "inside" / "report.html").is_file()
    assert set(read(folder / "inside")) == set(SHAPES)


def test_the_command_names_the_report(folder, capsys):
    config = write_config(folder, _ties(), "command.yml")
    out, report = folder / "command", folder / "command.html"
    arguments = ["merge", str(config), str(out), "--report", str(report), "--quiet"]
    assert main(arguments) == 0
    assert f"report: {report}" in capsys.readouterr().out
    assert report.is_file()
    assert main([*arguments, "--explain"]) == 1
    assert "--explain reads no values" in capsys.readouterr().err
