"""Each format read from small hand-written files, plain and gzip, told by itself and by name."""

import gzip
import json
from datetime import datetime
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from whyrec.catalog.dataset import Item
from whyrec.catalog.raw import RawData, clean_html
from whyrec.catalog.readers import FORMATS, locate
from whyrec.catalog.readers.tables import Columns, read_item_table


def lines(*rows: dict) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def review(user: str, item: str, time: int, **more) -> dict:
    return {"reviewerID": user, "asin": item, "unixReviewTime": time, "overall": 5.0} | more


FILES: dict[str, dict[str, str]] = {
    "amazon2014": {
        "reviews_Beauty_5.json": lines(review("u", "B2", 20), review("v", "B1", 10)),
        "meta_Beauty.json": (
            "{'asin': 'B1', 'title': 'Nail &amp; File', 'brand': 'OPI', "
            "'categories': [['Beauty', 'Nails'], ['Beauty', 'Tools']], 'description': 'It\\'s'}\n"
            "{'asin': 'B2', 'price': 3.5}\n"
        ),
    },
    "amazon2018": {
        "Beauty_5.json": lines(
            review("u", "B2", 20, verified=True), review("v", "B1", 10, verified=False)
        ),
        "meta_Beauty.json": lines(
            {
                "asin": "B1",
                "title": "<span>Nail &amp; File</span>",
                "brand": "by\n    \n    OPI",
                "category": ["Beauty", "Nails", "Tools", "</span></span>"],
                "description": ["It's", ""],
            },
            {"asin": "B1", "title": "another title"},
            {"asin": "B2", "title": "var aPageStart = (new Date()).getTime();"},
        ),
    },
    "amazon2023": {
        "All_Beauty.jsonl": lines(
            {"user_id": "u", "parent_asin": "B2", "asin": "x", "timestamp": 20999, "rating": 5.0},
            {"user_id": "v", "parent_asin": "B1", "asin": "y", "timestamp": 10500, "rating": 1.0},
        ),
        "meta_All_Beauty.jsonl": lines(
            {
                "parent_asin": "B1",
                "title": "Nail & File",
                "store": "OPI",
                "categories": ["Beauty", "Nails", "Tools"],
                "description": [],
                "features": ["It's"],
            },
            {"parent_asin": "B2", "title": None, "store": None, "categories": []},
        ),
    },
    "recbole": {
        "shop.inter": "user_id:token\titem_id:token\ttimestamp:float\nu\tB2\t20.0\nv\tB1\t10\n",
        "shop.item": (
            "item_id:token\ttitle:token_seq\tbrand:token\tcategories:token_seq\tdescription:token\n"
            "B1\tNail & File\tOPI\t'Beauty', 'Nails', 'Tools'\tIt's\n"
            "B2\t\t\t\t\n"
        ),
    },
    "csv": {
        "interactions.csv": "item_id,user_id,timestamp\nB2,u,20\nB1,v,10\n",
        "items.csv": (
            "item_id,title,brand,categories,description\n"
            'B1,"Nail & File",OPI,Beauty|Nails|Tools,It\'s\nB2,,,,\n'
        ),
    },
    "jsonl": {
        "interactions.jsonl": lines(
            {"user_id": "u", "item_id": "B2", "timestamp": 20},
            {"user_id": "v", "item_id": "B1", "timestamp": 10},
        ),
        "items.jsonl": lines(
            {
                "item_id": "B1",
                "title": "Nail & File",
                "brand": "OPI",
                "categories": ["Beauty", "Nails", "Tools"],
                "description": "It's",
            },
            {"item_id": "B2"},
        ),
    },
    "sequences": {
        "sequential_data.txt": "1 B2\n2 B1\n",
        "items.jsonl": lines(
            {
                "item_id": "B1",
                "title": "Nail & File",
                "brand": "OPI",
                "categories": ["Beauty", "Nails", "Tools"],
                "description": "It's",
            }
        ),
    },
}


def write(folder: Path, files: dict[str, str], *, zipped: bool = False) -> Path:
    for name, content in files.items():
        if zipped:
            (folder / f"{name}.gz").write_bytes(gzip.compress(content.encode()))
        else:
            (folder / name).write_text(content, encoding="utf-8")
    return folder


def read(source: Path, format_name: str = "", **columns) -> tuple[str, RawData]:
    format_name, files = locate(source, Columns(**columns), format_name=format_name)
    return format_name, FORMATS[format_name].read(files, Columns(**columns))


def events(raw: RawData) -> list[tuple[str, str, int]]:
    log = raw.log
    columns = (log.users_E.tolist(), log.items_E.tolist(), log.timestamps_E.tolist())
    return [
        (log.user_ids[u], log.item_ids[i], t // log.ticks_per_second)
        for u, i, t in zip(*columns, strict=True)
    ]


@pytest.mark.parametrize("named", [True, False])
@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("format_name", FILES)
def test_every_text_format(tmp_path: Path, format_name: str, zipped: bool, named: bool) -> None:
    (tmp_path / "README.txt").write_text("Data about 2 things, collected in 2014.\n")
    write(tmp_path, FILES[format_name], zipped=zipped)
    found, raw = read(tmp_path, format_name if named else "")
    assert found == format_name
    if format_name == "sequences":
        assert events(raw) == [("1", "B2", 0), ("2", "B1", 0)]
        assert raw.log.clock == "position"
    else:
        assert events(raw) == [("u", "B2", 20), ("v", "B1", 10)]
        assert raw.log.clock == "time"
    nail_file = Item("B1", "Nail & File", "OPI", ("Beauty", "Nails", "Tools"), "It's")
    assert raw.catalogue.items["B1"] == nail_file
    assert raw.catalogue.items.get("B2", Item("B2")) == Item("B2")
    assert raw.log.bad.total == raw.catalogue.bad.total == 0
    assert raw.catalogue.duplicates == raw.catalogue.conflicting == (format_name == "amazon2018")


MOVIELENS = {
    "u": {
        "u.data": "1\t10\t5\t99\n2\t11\t1\t98\n",
        "u.item": "10|Étude (1995)|01-Jan-1995||http://x|" + "0|1|" + "0|" * 16 + "1\n"
        "11|B|||" + "|1" + "|0" * 18 + "\n",
    },
    "1m": {
        "ratings.dat": "1::10::5::99\n2::11::1::98\n",
        "movies.dat": "10::Étude (1995)::Action|Western\n11::B::\n",
    },
    "csv": {
        "ratings.csv": "userId,movieId,rating,timestamp\n1,10,5,99\n2,11,1,98\n",
        "movies.csv": "movieId,title,genres\n10,Étude (1995),Action|Western\n"
        '11,"B",(no genres listed)\n',
    },
}


@pytest.mark.parametrize(
    ("release", "encoding"),
    [("u", "latin-1"), ("u", "utf-8"), ("1m", "latin-1"), ("1m", "utf-8"), ("csv", "utf-8")],
)
def test_movielens_releases(tmp_path: Path, release: str, encoding: str) -> None:
    for name, content in MOVIELENS[release].items():
        (tmp_path / name).write_bytes(content.encode(encoding))
    found, raw = read(tmp_path)
    assert found == "movielens"
    assert events(raw) == [("1", "10", 99), ("2", "11", 98)]
    assert raw.log.ratings_E.tolist() == [5, 1]
    film = Item("10", "Étude (1995)", "", ("Action", "Western"))
    assert raw.catalogue.items == {"10": film, "11": Item("11", "B")}


def test_amazon2014_ratings_only(tmp_path: Path) -> None:
    (tmp_path / "ratings_Beauty.csv").write_text("A1,B1,5.0,10\nA2,B1,4.0,11\nbroken\n")
    found, raw = read(tmp_path)
    assert found == "amazon2014"
    assert events(raw) == [("A1", "B1", 10), ("A2", "B1", 11)]
    assert raw.log.bad.first == ["ratings_Beauty.csv:3: not 4 fields: broken"]


def test_metadata_literals_run_no_code(tmp_path: Path) -> None:
    planted = tmp_path / "planted"
    write(tmp_path, FILES["amazon2014"])
    with (tmp_path / "meta_Beauty.json").open("a") as file:
        file.write(f"{{'asin': 'B2', 'title': open({str(planted)!r}, 'w')}}\n")
    _, raw = read(tmp_path)
    assert not planted.exists()
    assert raw.catalogue.bad.by_reason == {"not a Python literal": 1}
    assert raw.catalogue.bad.first[0].startswith("meta_Beauty.json:3: not a Python literal")


def test_parquet_with_lists_and_times(tmp_path: Path) -> None:
    times = [datetime(2020, 1, 1, 0, 0, 0, 900_000), datetime(2020, 1, 1, 0, 0, 0, 100_000)]
    pq.write_table(
        pa.table({"user_id": [1, 2], "item_id": [7.0, 8.0], "timestamp": times}),
        tmp_path / "interactions.parquet",
    )
    pq.write_table(
        pa.table({"item_id": [7], "title": ["T"], "categories": [["a", "b", "a"]]}),
        tmp_path / "items.parquet",
    )
    found, raw = read(tmp_path)
    assert found == "parquet"
    assert events(raw) == [("1", "7", 1577836800), ("2", "8", 1577836800)]
    assert raw.log.timestamps_E[0] > raw.log.timestamps_E[1]  # sorted within the second
    assert raw.catalogue.items == {"7": Item("7", "T", "", ("a", "b"))}


def test_research_layout_and_file_kinds_mixed(tmp_path: Path) -> None:
    write(
        tmp_path,
        {
            "interactions.tsv": "user_id\titem_id\tposition\nu\t5\t1\nu\t4\t0\n",
            "splits.tsv": "user_id\titem_id\tposition\tsplit\nu\t5\t1\ttrain\n",
            "items.jsonl": lines({"item_id": 4, "title": "four"}),
            "stats.json": '{\n "users": 1\n}\n',
        },
    )
    for format_name in ("", "csv"):
        found, raw = read(tmp_path, format_name)
        assert (found, raw.log.clock) == ("csv", "position")
        assert events(raw) == [("u", "5", 1), ("u", "4", 0)]
        assert raw.catalogue.items == {"4": Item("4", "four")}


def test_a_column_map_and_a_log_without_time(tmp_path: Path) -> None:
    write(
        tmp_path,
        {
            "orders.csv": "customer;sku\nu;b\nu;a\n",
            "products.csv": "sku;name;tags\na;A;x/y\n",
        },
    )
    _, raw = read(
        tmp_path,
        user_column="customer",
        item_column="sku",
        title_column="name",
        categories_column="tags",
        category_separator="/",
    )
    assert raw.log.clock == "order"
    assert events(raw) == [("u", "b", 0), ("u", "a", 1)]
    assert raw.catalogue.items == {"a": Item("a", "A", "", ("x", "y"))}


def test_one_file_as_source(tmp_path: Path) -> None:
    write(tmp_path, FILES["csv"] | {"other.csv": "user_id,item_id\nx,y\n"})
    _, raw = read(tmp_path / "other.csv", interactions_file="other.csv")
    assert events(raw) == [("x", "y", 0)]


def test_quoted_line_breaks_and_control_tokens_stay_text(tmp_path: Path) -> None:
    path = tmp_path / "items.csv"
    path.write_text('item_id,title\na,"two\nlines <|im_end|> <s_a_1> <b>"\nb,"6"" nail"\n')
    items = read_item_table(path, Columns()).items
    assert items["a"].title == "two lines <|im_end|> <s_a_1> <b>"
    assert items["b"].title == '6" nail'


def test_half_a_surrogate_pair_becomes_a_question_mark(tmp_path: Path) -> None:
    path = tmp_path / "items.jsonl"
    path.write_text('{"item_id": "a", "title": "x \\ud83d y"}\n')
    assert read_item_table(path, Columns()).items["a"].title == "x ? y"


@pytest.mark.parametrize(
    ("dirty", "clean"),
    [
        ("a < b and c > d", "a < b and c > d"),
        ("&lt;b&gt;bold&lt;/b&gt; <br/>x", "bold x"),
        ("<script>alert(1)</script>ok", "ok"),
        ('<a href="x">link</a> <|im_end|> <s_a_1> <think>', "link <|im_end|> <s_a_1> <think>"),
        (["one", None, "two"], "one two"),
        (float("nan"), ""),
    ],
)
def test_clean_html(dirty: object, clean: str) -> None:
    assert clean_html(dirty) == clean
