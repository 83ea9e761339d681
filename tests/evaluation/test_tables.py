"""Tables show what the records say, and a README knows whether it is stale."""

import json
from pathlib import Path

import pytest

from whyrec.evaluation import tables
from whyrec.evaluation.results import record

REPOSITORY = Path(__file__).parents[2]


def ranking(model: str, history: str, *values: float) -> dict[str, float]:
    keys = [f"{model}/test/{history}/{metric}" for metric in tables.METRICS]
    return dict(zip(keys, values, strict=True))


def write(folder: Path, seed: int, figures: dict[str, float]) -> None:
    path = folder / f"seed-{seed}.json"
    record(path, name="n", command="whyrec evaluate m", seed=seed, figures=figures)


@pytest.fixture
def home(tmp_path: Path) -> Path:
    results = tmp_path / "eval" / "results"
    for seed, shift in ((0, 0.0), (1, 0.002)):
        figures = ranking("popularity", "excluded", 0.01, 0.02, 0.005, 0.008)
        figures |= ranking("whyrec", "excluded", *(x + shift for x in (0.05, 0.08, 0.03, 0.04)))
        figures |= ranking("whyrec", "kept", 0.04, 0.07, 0.02, 0.03)
        figures |= {"whyrec/test/excluded/R@10/low": 0.07, "whyrec/valid/kept/R@10": 0.5}
        figures |= {"gain_over/popularity/test/excluded/R@10": 0.06, "prior/weight": 0.3}
        write(results / "toy", seed, figures)
    write(results / "toy" / "ablations", 2, ranking("whyrec", "kept", 1, 1, 1, 1))
    write(results / "trie", 0, {"trie/10m/bytes_per_item": 20.0, "trie/10m/build_s": 71.25})
    published = tmp_path / "eval" / "published"
    published.mkdir()
    row = {"model": "TIGER", "source": "paper", "figures": {"R@10": 0.9}}
    (published / "toy.json").write_text(json.dumps({"rows": [row]}))
    (tmp_path / "README.md").write_text(
        "# Top\n<!-- table:toy published:toy -->\n<!-- /table -->\nbetween\n"
        "<!-- table:trie -->\nold\n<!-- /table -->\nend\n"
    )
    return tmp_path


def test_a_marker_may_name_one_record(home: Path) -> None:
    write(home / "eval" / "results" / "trie", 1, {"trie/other": 1.0})
    readme = home / "README.md"
    readme.write_text("<!-- table:trie/seed-0.json trie/10m/build_s -->\n<!-- /table -->\n")
    assert tables.main([str(readme)]) == 0
    assert "| `trie/10m/build_s` | 71.25 |" in readme.read_text()
    readme.write_text("<!-- table:trie/seed-7.json -->\n<!-- /table -->\n")
    assert tables.main([str(readme)]) == 2


def test_a_readme_is_filled_once_and_then_up_to_date(home: Path) -> None:
    readme = home / "README.md"
    assert tables.main([str(readme), "--check"]) == 1
    assert "old" in readme.read_text()
    assert tables.main([str(readme)]) == 0
    filled = readme.read_text()
    assert filled.splitlines() == [
        "# Top",
        "<!-- table:toy published:toy -->",
        "| Model | | R@5 | R@10 | N@5 | N@10 |",
        "|---|---|---:|---:|---:|---:|",
        "| Popularity | history excluded | .0100 | .0200 | .0050 | .0080 |",
        "| WhyRec | history excluded | **.0510 ± .0014** | **.0810 ± .0014** | **.0310 ± .0014** "
        "| **.0410 ± .0014** |",
        "| WhyRec | history kept | **.0400** | **.0700** | **.0200** | **.0300** |",
        "| TIGER (paper) | as published | – | **.9000** | – | – |",
        "",
        filled.splitlines()[9],
        "<!-- /table -->",
        "between",
        "<!-- table:trie -->",
        "| Figure | Value |",
        "|---|---:|",
        "| `trie/10m/build_s` | 71.25 |",
        "| `trie/10m/bytes_per_item` | 20 |",
        "",
        filled.splitlines()[18],
        "<!-- /table -->",
        "end",
    ]
    assert filled.splitlines()[9].startswith("Measured by `whyrec evaluate m`; seeds 0, 1; ")
    assert tables.main([str(readme), "--check"]) == 0
    assert tables.main([str(readme)]) == 0
    assert readme.read_text() == filled


def test_a_new_result_makes_the_readme_stale(home: Path) -> None:
    readme = home / "README.md"
    tables.main([str(readme)])
    write(home / "eval" / "results" / "toy", 3, ranking("sasrec", "kept", 0.9, 0.9, 0.9, 0.9))
    assert tables.main([str(readme), "--check"]) == 1
    tables.main([str(readme)])
    lines = [line for line in readme.read_text().splitlines() if "history kept" in line]
    assert lines[0].startswith("| SASRec, full softmax |") and lines[0].count("**") == 8
    assert lines[1].startswith("| WhyRec |") and "**" not in lines[1]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("<!-- table:toy -->\n", "needs a <!-- /table -->"),
        ("<!-- table:none -->\n<!-- /table -->\n", "holds no results"),
        ("<!-- table:toy published:no -->\n<!-- /table -->\n", "no published figures at"),
        ("<!-- table:trie published:toy -->\n<!-- /table -->\n", "published rows stand beside"),
    ],
)
def test_a_readme_that_cannot_be_filled_stays_as_it_is(
    home: Path, capsys: pytest.CaptureFixture[str], text: str, message: str
) -> None:
    readme = home / "README.md"
    readme.write_text(text)
    assert tables.main([str(readme)]) == 2
    assert message in capsys.readouterr().err
    assert readme.read_text() == text
    assert tables.main([str(home / "absent.md")]) == 2


def test_a_marker_can_name_the_figures_to_show(home: Path) -> None:
    readme = home / "README.md"
    readme.write_text("<!-- table:trie trie/10m/build_s -->\n<!-- /table -->\n")
    assert tables.main([str(readme)]) == 0
    text = readme.read_text()
    assert "`trie/10m/build_s` | 71.25" in text and "bytes_per_item" not in text
    assert tables.main([str(readme), "--check"]) == 0


def test_published_rows_come_where_a_marker_asks_for_them_alone(home: Path) -> None:
    readme = home / "README.md"
    readme.write_text(
        "<!-- table:toy -->\n<!-- /table -->\n"
        "<!-- table:toy/ablations published:toy -->\n<!-- /table -->\n"
    )
    assert tables.main([str(readme)]) == 0
    ours, ablations = readme.read_text().split("<!-- /table -->\n")[:2]
    assert "as published" not in ours and "TIGER" not in ours
    rows = [line for line in ablations.splitlines() if line.startswith("| ")][1:]
    assert rows[0].startswith("| WhyRec | history kept | **1.0000** |")
    assert rows[1:] == ["| TIGER (paper) | as published | – | **.9000** | – | – |"]


def test_a_row_with_the_prior_has_a_name_and_can_be_marked(home: Path) -> None:
    figures = ranking("whyrec+prior", "excluded", 0.1, 0.2, 0.05, 0.1)
    write(home / "eval" / "results" / "mixed", 0, figures)
    readme = home / "README.md"
    key = "whyrec+prior/test/excluded/R@10"
    readme.write_text(
        f"<!-- table:mixed -->\n<!-- /table -->\n<!-- table:mixed {key} -->\n<!-- /table -->\n"
    )
    assert tables.main([str(readme)]) == 0
    whole, marked = readme.read_text().split("<!-- /table -->\n")[:2]
    row = "| WhyRec with a co-visitation prior | history excluded |"
    assert f"{row} **.1000** | **.2000** | **.0500** | **.1000** |" in whole
    assert f"{row} – | **.2000** | – | – |" in marked


def test_a_marker_that_names_an_unknown_figure_is_refused(
    home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    readme = home / "README.md"
    readme.write_text("<!-- table:trie trie/nothing -->\n<!-- /table -->\n")
    assert tables.main([str(readme)]) == 2
    assert "no figure 'trie/nothing'" in capsys.readouterr().err


def test_the_published_rows_that_ship_are_sound() -> None:
    files = sorted((REPOSITORY / "eval" / "published").glob("*.json"))
    assert {file.stem for file in files} >= {"beauty", "sports", "toys"}
    for file in files:
        for row in json.loads(file.read_text(encoding="utf-8"))["rows"]:
            assert row["model"] and row["source"] and row["figures"]
            found = row["figures"]
            assert set(found) <= set(tables.METRICS)
            assert all(0 < value < 0.2 for value in found.values())
            for cutoff in (5, 10):  # N@k <= R@k for a single target
                if {f"N@{cutoff}", f"R@{cutoff}"} <= set(found):
                    assert found[f"N@{cutoff}"] <= found[f"R@{cutoff}"]


def test_rows_that_are_no_seeds_stand_each_by_itself(home: Path) -> None:
    folder = home / "eval" / "results" / "toy" / "rows"
    for number, (n10, ratio) in enumerate([(0.1, None), (0.3, 1.084), (0.2, 50.0)]):
        figures = {f"whyrec/valid/excluded/{m}": n10 for m in ("R@5", "R@10", "N@5", "N@10")}
        write(folder, number, figures | ({"language/perplexity_ratio": ratio} if ratio else {}))
        path = folder / f"seed-{number}.json"
        entry = json.loads(path.read_text()) | {"name": f"row-{number} valid", "seed": 0}
        path.write_text(json.dumps(entry))
    readme = home / "README.md"
    readme.write_text("<!-- table:toy/rows each -->\n<!-- /table -->\n")
    assert tables.main([str(readme)]) == 0
    rows = [line for line in readme.read_text().splitlines() if line.startswith("| row")]
    assert [row.split(" | ")[0] for row in rows] == ["| row 1", "| row 2", "| row 0"]
    assert rows[0].endswith("| .3000 | × 1.08 |") and rows[2].endswith("| .1000 | – |")
    readme.write_text("<!-- table:trie each -->\n<!-- /table -->\n")
    assert tables.main([str(readme)]) == 2
