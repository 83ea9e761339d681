"""The page on the released checkpoint, as the README shows it."""

from pathlib import Path

import pytest
from page_fixtures import Visit, add, expect, names, recommend
from test_real_server import Server

from whyrec import Recommender

pytest_plugins = ("page_fixtures",)
pytestmark = [pytest.mark.timeout(600), pytest.mark.xdist_group("page")]
FILMS = ["Star Wars (1977)", "Alien (1979)", "Godfather, The (1972)"]


def test_the_page_recommends_films(visit: Visit, released_run: Path, tmp_path: Path) -> None:
    folder = released_run / "model" / "aligned"
    server = Server(folder, tmp_path / "log.txt", "--max-model-len", "2048")
    try:
        page = visit(server.url)
        expect(page.locator("#about")).to_contain_text("1,349 items")
        for film in FILMS:
            add(page, film)
        (card,) = recommend(page)
        recommender = Recommender.from_pretrained(folder)
        by_title = {item.title: item.item_id for item in recommender.items}
        found = recommender.recommend([by_title[film] for film in FILMS], k=10)
        assert names(card, ".items") == [item.title for item in found]
    finally:
        server.process.terminate()
        server.process.wait(60)
