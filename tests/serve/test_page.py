"""The page at `/` of a real server, in a real browser: vLLM on the CPU and a tiny model."""

import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from page_fixtures import Visit, add, expect, names, recommend
from served_models import make_served
from test_real_server import Server

from whyrec.catalog.dataset import Item, read_items, write_items

pytest_plugins = ("page_fixtures",)
# One server for all of them: `--dist loadgroup` keeps a group on one process.
pytestmark = [pytest.mark.timeout(600), pytest.mark.xdist_group("page")]

EVIL = "<img src=x onerror=document.body.remove()> & <b>bold</b>"
THOUGHTS = {"samples": 1, "max_tokens": 160, "temperature": 0.0}
CONTRASTS = Path(__file__).with_name("contrasts.js").read_text()


@pytest.fixture(scope="module")
def server(chromium, prepared_run, tokenizer, tmp_path_factory) -> Iterator[Server]:
    """A model that thinks; one item has a spiteful title, one has none."""
    folder = make_served(tmp_path_factory.mktemp("page") / "tiny", prepared_run, tokenizer)
    settings = json.loads((folder / "whyrec.json").read_text()) | {"thoughts": THOUGHTS}
    (folder / "whyrec.json").write_text(json.dumps(settings))
    items = read_items(folder / "items.parquet")
    items[5], items[6] = Item("item005", EVIL, "", ("<i>Genre</i>",)), Item("item006")
    write_items(folder / "items.parquet", items)
    server = Server(folder, tmp_path_factory.mktemp("log") / "log.txt", "--run", str(prepared_run))
    yield server
    server.process.terminate()
    server.process.wait(60)


def test_a_thought_streams_and_is_compared_with_none(server: Server, visit: Visit) -> None:
    page = visit(server.url)
    expect(page.locator("#about")).to_contain_text("tiny · 30 items · reads the newest 8")
    for name in ("Film 3", "Film 4"):
        add(page, name)
    # How often the thought grows, token by token.
    page.evaluate("""() => {
      window.growths = 0;
      const count = () => { window.growths += document.querySelector(".thought") ? 1 : 0; };
      new MutationObserver(count).observe(document.body, {childList: true, subtree: true});
    }""")
    thinking, plain = recommend(page)
    expected = [
        server.client.recommend(["item003", "item004"], k=10, beam_width=20, think=think)
        for think in (True, False)
    ]
    assert page.evaluate("window.growths") > 20
    assert thinking.locator(".thought").text_content() == expected[0]["trace"] != ""
    assert plain.locator(".thought").count() == 0
    for card, answer in zip((thinking, plain), expected, strict=True):
        titles = [item["title"] or item["id"] for item in answer["items"]]
        assert names(card, ".items") == titles
        first = card.locator(".items li").first
        expect(first).to_contain_text(f"{answer['items'][0]['score']:.2f}".replace("-", "−"))
    before = [item["id"] for item in expected[1]["items"]]
    came_in = sum(item["id"] not in before for item in expected[0]["items"])
    assert thinking.locator(".move.in").count() == came_in
    expect(page.get_by_role("status")).to_contain_text(f"{came_in} item")
    log = thinking.get_by_role("log")
    assert log.get_attribute("aria-live") == "polite"
    page.get_by_label("Off").check()
    (alone,) = recommend(page)
    assert names(alone, ".items") == names(alone, ".items") != []


def test_the_tree_opens_and_has_titles_at_its_leaves(server: Server, visit: Visit) -> None:
    page = visit(server.url)
    page.get_by_label("Off").check()
    add(page, "Film 12")
    page.get_by_label("Beam width").fill("29")
    (card,) = recommend(page)
    tree = card.locator(".beam")
    assert not tree.locator(".tree").first.is_visible()
    tree.locator("summary").first.click()
    leaves = names(tree, ".leaf")
    assert len(leaves) == 29 and {"Film 3", EVIL, "item006"} < set(leaves)
    assert tree.locator(".leaf.listed").count() == 10
    ranks = [int(text.split()[-1]) for text in tree.locator(".listed .rank").all_inner_texts()]
    found = dict(zip(ranks, names(tree, ".listed"), strict=True))
    assert [found[rank] for rank in range(1, 11)] == names(card, ".items")
    inner = tree.locator("details:not(.beam)").first
    assert inner.locator("code").first.is_visible()
    inner.locator("summary").first.click()
    assert not inner.locator(".tree").first.is_visible()


def test_titles_are_text(server: Server, visit: Visit) -> None:
    page = visit(server.url)
    add(page, "item005", EVIL)
    assert names(page, ".history") == [EVIL]
    expect(page.locator(".history")).to_contain_text("<i>Genre</i>")
    add(page, "Film 12")
    page.get_by_role("button", name=f"Remove: {EVIL}").click()
    page.get_by_label("Off").check()
    page.get_by_label("Items", exact=True).fill("29")
    (card,) = recommend(page)
    assert EVIL in names(card, ".items") and "item006" in names(card, ".items")
    assert page.locator("img, main b, main i").count() == 0


def test_the_keyboard_is_enough(server: Server, visit: Visit) -> None:
    page = visit(server.url)
    keys = page.keyboard

    def tab_to(name: str) -> None:
        for _ in range(40):
            keys.press("Tab")
            here = page.locator(":focus")
            outline = here.evaluate("e => getComputedStyle(e).outlineStyle")
            assert outline != "none", f"no focus to be seen on {here.inner_html()}"
            label = here.evaluate("e => e.ariaLabel ?? e.labels?.[0]?.innerText ?? e.innerText")
            if label.strip().startswith(name):
                return
        raise AssertionError(f"no way to {name}")

    tab_to("Skip")
    tab_to("Add an item")
    keys.type("film 2")
    expect(page.get_by_role("option")).to_have_count(8)
    keys.press("ArrowDown")
    chosen = page.locator("#search").get_attribute("aria-activedescendant")
    expect(page.locator(f"#{chosen}")).to_have_attribute("aria-selected", "true")
    keys.press("Enter")
    keys.type("item003")
    keys.press("Enter")  # before anything is suggested
    expect(page.locator(".history li")).to_have_count(2)
    assert names(page, ".history") == ["Film 20", "Film 3"]
    keys.type("film 9")
    expect(page.get_by_role("option").first).to_contain_text("Film 9")
    keys.press("Escape")
    expect(page.get_by_role("option")).to_have_count(0)
    tab_to("Later: Film 20")
    keys.press("Enter")
    assert names(page, ".history") == ["Film 3", "Film 20"]
    tab_to("Remove: Film 20")
    keys.press("Space")
    assert names(page, ".history") == ["Film 3"]
    tab_to("Compare")
    keys.press("ArrowDown")
    assert page.get_by_label("On", exact=True).is_checked()
    tab_to("Recommend")
    keys.press("Enter")
    expect(page.locator(".items li")).to_have_count(10)
    tab_to("Beam tree")
    keys.press("Enter")
    assert page.locator(".tree").first.is_visible()


@pytest.mark.parametrize("width", [320, 390, 1000])
def test_nothing_is_wider_than_the_window(server: Server, visit: Visit, width: int) -> None:
    page = visit(server.url, width=width)
    add(page, "item005", EVIL)
    add(page, "Film 12")
    for card in recommend(page):
        card.locator(".beam > summary").click()
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    boxes = [button.bounding_box() for button in page.get_by_role("button").all()]
    assert all(box is None or (box["width"] >= 24 and box["height"] >= 24) for box in boxes)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_all_text_can_be_read(server: Server, visit: Visit, scheme: str) -> None:
    page = visit(server.url, scheme=scheme)
    page.get_by_text("Paste a list").click()
    page.get_by_label("One item id or title a line").fill("\n".join(["item001"] * 12))
    page.get_by_role("button", name="Use this list").click()
    for card in recommend(page):
        card.locator(".beam > summary").click()
    add(page, "item006")
    page.get_by_placeholder("User id").fill("nobody")
    page.get_by_role("button", name="Load").click()
    expect(page.locator("#history-error")).to_be_visible()
    page.get_by_label("Add an item").fill("film")
    expect(page.get_by_role("option")).to_have_count(8)
    ground = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (int(re.findall(r"\d+", ground)[0]) < 100) == (scheme == "dark")
    found = page.evaluate(CONTRASTS)
    assert len(found) > 100
    assert [text for contrast, text in found if contrast < 4.5] == []


def test_a_user_is_known_and_what_is_unknown_says_so(server: Server, visit: Visit) -> None:
    page = visit(server.url)
    error = page.locator("#history-error")
    page.get_by_placeholder("User id").fill("nobody")
    page.get_by_role("button", name="Load").click()
    expect(error).to_have_text("This server does not know that user; send the history too.")
    page.get_by_placeholder("User id").fill("u03")
    page.get_by_placeholder("User id").press("Enter")
    expect(page.locator(".history li")).to_have_count(13)
    expect(error).to_be_hidden()
    expect(page.locator("#history-note")).to_contain_text("The model reads the newest 8; the 5")
    page.get_by_role("button", name="Clear").click()
    page.get_by_text("Paste a list").click()
    page.get_by_label("One item id or title a line").fill("item003\nFilm 4\nno such film")
    page.get_by_role("button", name="Use this list").click()
    expect(page.locator(".history li")).to_have_count(3)
    page.get_by_label("Off").check()
    (card,) = recommend(page)
    expect(card.get_by_role("alert")).to_contain_text("The catalogue has no item 'no such film';")
    assert card.get_by_role("alert").text_content().count(".") == 1
    expect(page.locator(".history .wrong")).to_contain_text("no such film")
    page.get_by_role("button", name="Remove: no such film").click()
    (card,) = recommend(page)
    expect(card.locator(".items li")).to_have_count(10)
