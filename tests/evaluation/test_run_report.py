"""The report of real tiny runs: whole, self-contained, readable by everyone, honest about gaps."""

import itertools
import json
import re
import shutil
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from test_inspection import thinking

from whyrec.catalog.dataset import Dataset, Item, read_items, write_items
from whyrec.cli import main
from whyrec.evaluation.evaluate import evaluate
from whyrec.evaluation.figures import COLOURS
from whyrec.evaluation.gallery import gallery
from whyrec.evaluation.pages import DARK, LIGHT, figure_text, html_prose, markdown_cell
from whyrec.evaluation.run_report import report
from whyrec.evaluation.sasrec import SasrecRecipe
from whyrec.evaluation.trace_view import TraceReader
from whyrec.stage import run_stage

SECTIONS = {
    "data": "Data",
    "sids": "Semantic IDs",
    "training": "Training",
    "results": "Results",
    "thinking": "Thinking: gain and cost",
    "faithfulness": "Are the traces true, and do the items follow?",
    "gallery": "Good and bad traces",
    "latency": "Latency",
    "made": "How it was measured",
}
VOID = {"meta", "link", "br", "img", "hr", "input", "wbr"}


class Page(HTMLParser):
    """Elements of a page, with the text in each; balanced tags are asserted."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None], list[str]]] = []
        self.open: list[int] = []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attributes) -> None:
        self.found.append((tag, dict(attributes), []))
        if tag not in VOID:
            self.open.append(len(self.found) - 1)

    def handle_startendtag(self, tag, attributes) -> None:
        self.found.append((tag, dict(attributes), []))

    def handle_endtag(self, tag) -> None:
        assert self.found[self.open.pop()][0] == tag

    def handle_data(self, data) -> None:
        for place in self.open:
            self.found[place][2].append(data)

    def all(self, tag: str) -> list[tuple[dict[str, str | None], str]]:
        return [(a, " ".join("".join(text).split())) for t, a, text in self.found if t == tag]


@pytest.fixture(scope="module")
def whole(prepared_run: Path, saved_model: Path, tmp_path_factory) -> Path:
    """A run with all stages and an evaluation with baselines, thinking and traces."""
    run = Path(shutil.copytree(prepared_run, tmp_path_factory.mktemp("whole") / "tiny"))
    log = [{"loss": 3.0 - step / 10, "step": step} for step in range(1, 11)]
    log += [{"eval_N@10": step / 100, "eval_R@10": step / 50, "step": step} for step in (5, 10)]

    def build(folder: Path) -> dict:
        thinking(saved_model, folder / "copy")
        for path in list((folder / "copy").iterdir()):
            path.rename(folder / path.name)
        (folder / "copy").rmdir()
        return {"log": log, "best_checkpoint_step": 10}

    model = run / "model" / "activated"
    model.parent.mkdir()
    run_stage(model, build, stage="activate", config={"seed": 0}, inputs={})
    evaluate(
        model,
        run,
        split="test",
        beams=10,
        sasrec_recipe=SasrecRecipe(epochs=1, dim=8, heads=1, layers=1),
        think="both",
        traces=True,
        command="whyrec evaluate tiny",
    )
    return run


@pytest.fixture(scope="module")
def written(whole: Path) -> tuple[str, str]:
    html, markdown = report(whole)
    assert [path.name for path in (html, markdown)] == ["report.html", "report.md"]
    return html.read_text(encoding="utf-8"), markdown.read_text(encoding="utf-8")


def notes(page: Page) -> str:
    return " ".join(text for a, text in page.all("ul") if a.get("class") == "notes")


def test_every_section_is_there_with_its_figures(whole: Path, written) -> None:
    html, markdown = written
    page = Page(html)
    assert [(a["id"], text) for a, text in page.all("h2")] == list(SECTIONS.items())
    assert [a["href"] for a, _ in page.all("a") if a["href"] != "#data"][: len(SECTIONS) - 1] == [
        f"#{name}" for name in list(SECTIONS)[1:]
    ]
    figures = json.loads((whole / "eval" / "results.json").read_text())["figures"]
    for key in ("whyrec", "whyrec-think", "popularity", "sasrec"):
        value = f"{figures[f'{key}/test/excluded/N@10']:.4f}".replace("0.", ".")
        low = f"{figures[f'{key}/test/excluded/N@10/low']:.4f}".replace("0.", ".")
        assert f"{value} [{low}" in html and f"{value} \\[{low}" in markdown
    assert figure_text(figures["cost/think/tokens"]) in html
    assert "30 items" in html and "24" in html
    for title in SECTIONS.values():
        assert f"\n## {title}\n" in markdown
    assert "whyrec evaluate tiny" in html and "whyrec evaluate tiny" in markdown
    assert "no published figures" in notes(page) and "no enhanced model" in notes(page)
    assert "no aligned model" in notes(page) and "no activated model" not in notes(page)


def test_it_asks_for_nothing_outside_of_itself(written) -> None:
    html, _ = written
    page = Page(html)
    for tag, attributes, _text in page.found:
        assert tag not in ("script", "link", "iframe", "object", "embed", "img")
        for name, value in attributes.items():
            if name in ("src", "href", "xlink:href", "srcset", "action", "data", "poster"):
                assert (value or "").startswith(("#", "data:image/png;base64,")), (tag, name, value)
            assert not name.startswith("on")
    assert all(target.startswith("#") for target in re.findall(r"url\(([^)]*)\)", html))
    assert "@import" not in html
    policies = [a["content"] for a, _ in page.all("meta") if "http-equiv" in a]
    assert policies == ["default-src 'none'; style-src 'unsafe-inline'; img-src data:"]


def test_it_can_be_read_by_everyone(written) -> None:
    html, _ = written
    page = Page(html)
    assert page.all("html")[0][0]["lang"] == "en" and page.all("title")[0][1]
    assert len(page.all("h1")) == len(page.all("main")) == 1
    svgs = [a for a, _ in page.all("svg")]
    assert len(svgs) >= 5 and all(a["role"] == "img" and a["aria-label"] for a in svgs)
    assert len({a["aria-label"] for a in svgs}) == len(svgs)
    tables = page.all("table")
    assert tables and len(page.all("caption")) == len(tables) and all(t for _, t in tables)
    assert all(a.get("scope") in ("row", "col") for a, _ in page.all("th"))
    ids = Counter(a["id"] for _, a, _ in page.found if "id" in a)
    assert max(ids.values()) == 1
    for _, attributes, _text in page.found:
        if str(attributes.get("href", "")).startswith("#"):
            assert attributes["href"][1:] in ids, attributes  # type: ignore[index]
    levels = [int(tag[1]) for tag, _, _ in page.found if re.fullmatch("h[1-6]", tag)]
    assert all(b <= a + 1 for a, b in itertools.pairwise(levels))
    assert "prefers-color-scheme: dark" in html and "width=device-width" in html
    for marked, text in page.all("mark"):
        assert ("✗ untrue" in text) == (marked["class"] == "false") and text[-1] in "✓e"


def luminance(colour: str) -> float:
    parts = [int(colour[k : k + 2], 16) / 255 for k in (1, 3, 5)]
    linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("theme", [LIGHT, DARK], ids=["light", "dark"])
def test_contrast(theme: dict[str, str]) -> None:
    pairs = [(text, ground) for text in ("ink", "soft", "other") for ground in ("paper", "panel")]
    pairs += [("ours", "paper"), ("third", "paper")]
    pairs += [("true", "true-ground"), ("false", "false-ground")]
    for text, ground in pairs:
        bright, dark = sorted((luminance(theme[text]), luminance(theme[ground])), reverse=True)
        assert (bright + 0.05) / (dark + 0.05) >= 4.5, (text, ground)
    assert LIGHT.items() >= COLOURS.items() and LIGHT.keys() == DARK.keys()


def test_runs_with_only_some_stages(run: Path, tmp_path: Path, capsys) -> None:
    assert main(["report", "--run", str(run), "--output", str(tmp_path / "out")]) == 0
    assert capsys.readouterr().out.split() == [
        str(tmp_path / "out" / name) for name in ("report.html", "report.md")
    ]
    page = Page((tmp_path / "out" / "report.html").read_text(encoding="utf-8"))
    assert {a["id"] for a, _ in page.all("h2")} == set(SECTIONS)
    for sentence in (
        "no aligned model",
        "no results",
        "no figures with thinking",
        "traces were not checked",
        "no traces at",
        "no seconds were recorded",
        "nothing was measured",
    ):
        assert sentence in notes(page)
    shutil.rmtree(run / "sids")
    html, _ = report(run)
    assert "no semantic IDs" in notes(Page(html.read_text(encoding="utf-8")))
    assert main(["report", "--run", str(tmp_path / "nowhere")]) == 2
    assert "is no run folder" in capsys.readouterr().err


def test_names_are_no_markup(run: Path) -> None:
    items = read_items(run / "dataset" / "items.parquet")
    evil = '<script>alert(1)</script> | `a` "$x^2$" \u202e'
    renamed = [Item(i.item_id, f"{evil} {n}", "<i>B</i>", ()) for n, i in enumerate(items)]
    write_items(run / "dataset" / "items.parquet", [*renamed[:-1], Item(items[-1].item_id)])
    html, markdown = (path.read_text(encoding="utf-8") for path in report(run))
    page = Page(html)
    assert not page.all("script") and not page.all("i")
    assert "<script>alert(1)</script>" in " ".join(text for _, text in page.all("td"))
    assert "1 of 30 items have no title" in notes(page)
    assert "<script>" not in markdown
    rows = [line for line in markdown.splitlines() if "alert(1)" in line]
    assert rows and all(len(re.findall(r"(?<!\\)\|", row)) == 5 for row in rows)


def test_other_data_older_figures_and_published_ones(whole: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(whole, tmp_path / "run"))
    results = run / "eval" / "results.json"
    old = json.loads(results.read_text())
    results.write_text(json.dumps(old | {"data_sha256": "0" * 64, "date": "2020-01-01T00:00:00"}))
    row = {"model": "P5", "source": "paper", "figures": {"N@10": 0.25, "R@10": 0.5}}
    published = tmp_path / "published.json"
    published.write_text(json.dumps({"dataset": "Toy", "protocol": "full", "rows": [row]}))
    html, _ = report(run, published=published)
    page = Page(html.read_text(encoding="utf-8"))
    assert "measured on another data set" in notes(page)
    assert "before the newest model" in notes(page)
    assert "no published figures" not in notes(page)
    assert "P5, published" in html.read_text() and "As published: Toy, full" in html.read_text()
    folder = tmp_path / "records"
    folder.mkdir()
    for seed in (0, 1):
        (folder / f"seed-{seed}.json").write_text(json.dumps(old | {"seed": seed}))
    html, _ = report(run, results=[folder])
    assert "another data set" not in html.read_text()
    assert "means over 2 records" in html.read_text()
    with pytest.raises(ValueError, match="holds no records"):
        report(run, results=[tmp_path / "none"])
    results.write_text("{")
    with pytest.raises(ValueError, match="not valid JSON"):
        report(run)


def test_the_gallery_shows_the_best_and_the_worst(prepared_run: Path, tmp_path: Path) -> None:
    dataset = Dataset.load(prepared_run / "dataset")
    reader = TraceReader(dataset.items)

    def row(user: str, trace: str, true: int, false: list[str], items: str, **more) -> dict:
        return {
            "user": user,
            "history": ["item001", "item006"],
            "target": "item011",
            "trace": trace,
            "well_formed": True,
            "named": true + len(false),
            "true": true,
            "false": false,
            "items": [f"item{n}" for n in items.split()],
        } | more

    rows = [
        row("late", "The history shares Genre 1. Next: Genre 1.", 2, [], "002 003 011"),
        row("lies", "The history shares Genre 4. Next: Genre 1.", 1, ["Genre 4"], "011 002"),
        row("first", "The history shares Genre 1. Next: Genre 1.", 2, [], "011 002"),
        row("cut", "The history", 0, [], "002 003", well_formed=False),
        row("gone", "Next: Genre 1.", 1, [], "002", target="unknown"),
    ]
    path = tmp_path / "traces.parquet"
    pq.write_table(pa.Table.from_pylist(rows), path)
    shown, missing = gallery(path, reader, dataset, each=2)
    assert [(one.kind, one.user) for one in shown] == [
        ("good", "first"),
        ("good", "late"),
        ("bad", "lies"),
        ("bad", "cut"),
    ]
    assert missing == ["1 traces are of items that this run lacks"]
    first, _, lies, cut = shown
    assert first.verdict == "2 of 2 facts true; what came is at rank 1"
    assert first.newest == ["Film 1", "Film 6"] and first.target == "Film 11"
    assert lies.untrue == ["Genre 4"] and "✗ untrue" in lies.html and "✗ untrue" not in first.html
    assert cut.verdict == "no fact named; not a whole trace; what came is not in the list"
    pq.write_table(pa.table({"user": ["x"]}), path)
    assert "cannot be read" in gallery(path, reader, dataset)[1][0]


def test_words_and_numbers() -> None:
    assert [figure_text(v) for v in (0.05, 12345, 2.5, 0.0, 1.0, None, True, -0.25)] == [
        *(".0500", "12,345", "2.5", "0", "1", "–", "yes", "-.2500"),
    ]
    assert html_prose("`a` <b>") == "<code>a</code> &lt;b&gt;"
    assert markdown_cell("a|b\n<i>_x_") == r"a\|b &lt;i>\_x\_"


def test_of_the_released_checkpoint(released_run: Path, tmp_path: Path) -> None:
    recorded = Path(__file__).resolve().parents[2] / "eval" / "results" / "ml-100k"
    for written in report(released_run, results=[recorded], output=tmp_path):
        text = written.read_text(encoding="utf-8")
        assert "1,349" in text and "Co-visitation counts" in text and ".2174" in text
        assert "whyrec activate" in text  # what the run lacks, and how to make it
