"""The page where something is missing or wrong: a key, thoughts, the engine, room for a history."""

from collections.abc import Iterator

import pytest

pytest.importorskip("fastapi")
pytest.importorskip("vllm")  # the engine's requests lie beside what talks to vLLM

from page_fixtures import Visit, add, expect, names, recommend
from serving_fixtures import LocalEngine, listening, wait_for

from whyrec.decode.model_folder import load_model_folder
from whyrec.serve.app import make_app

pytest_plugins = ("page_fixtures", "serving_fixtures")


@pytest.fixture
def address(make) -> Iterator[str]:
    """A model that thinks, at an address."""
    with listening(make()) as address:
        yield address


def test_a_model_without_thoughts_shows_the_rest(saved_model, visit: Visit) -> None:
    engine = LocalEngine(load_model_folder(saved_model, device="cpu"))
    with listening(make_app(engine, saved_model)) as address:
        page = visit(address)
        expect(page.locator("#about")).to_contain_text("does not think")
        expect(page.locator("#think-note")).to_contain_text("has not learnt to think")
        assert page.get_by_label("Off").is_checked() and page.get_by_label("Compare").is_disabled()
        assert not page.locator("#user").is_visible()  # there is no run either
        add(page, "Film 3")
        (card,) = recommend(page)
        assert len(names(card, ".items")) == 10 and card.locator(".beam").count() == 1
        assert card.locator(".thoughts").count() == 0


def test_the_key_is_asked_for_and_sent(make, visit: Visit) -> None:
    with listening(make(api_key="secret")) as address:
        page = visit(address)
        dialog = page.get_by_role("dialog", name="This server asks for an API key")
        expect(dialog).to_be_visible()
        dialog.get_by_label("API key").fill("wrong")
        dialog.get_by_role("button", name="Continue").click()
        expect(dialog.get_by_role("alert")).to_have_text("The server refuses this key.")
        dialog.get_by_label("API key").fill("secret")
        dialog.get_by_label("API key").press("Enter")
        expect(dialog).to_be_hidden()
        expect(page.locator("#about")).to_contain_text("30 items")
        add(page, "Film 3")
        assert len(recommend(page)) == 2
        page.reload()
        expect(page.locator("#about")).to_contain_text("30 items")  # it is kept for the tab
        again = visit(address)
        again.get_by_role("button", name="Cancel").click()
        expect(again.locator("#about")).to_contain_text("asks for an API key")


def test_thoughts_are_shown_as_they_come_and_can_be_stopped(address, engine, visit: Visit) -> None:
    engine.delay = 0.3
    page = visit(address)
    page.get_by_label("On", exact=True).check()
    page.get_by_role("button", name="Recommend").click()
    expect(page.locator(".thought").last).not_to_be_empty()
    early = page.locator(".thought").all_text_contents()
    expect(page.locator(".thought").first).not_to_have_text(early[0])
    later = page.locator(".thought").all_text_contents()
    assert all(now.startswith(then) for then, now in zip(early, later, strict=False))
    assert page.locator(".items li").count() == 0 and engine.thinking == 2
    page.get_by_role("button", name="Stop").click()
    expect(page.get_by_role("status")).to_have_text("Stopped.")
    wait_for(lambda: engine.thinking == 0)
    engine.delay = 0.0
    (card,) = recommend(page)
    assert card.locator(".one.chosen").count() == 1 and card.locator(".one").count() == 2


def test_facts_of_a_thought_are_marked(address, engine, parts, visit: Visit) -> None:
    engine.says = parts.encoder.text("The history shares Genre 3; Genre 2. Next: Genre 4.")
    page = visit(address)
    for name in ("Film 3", "Film 8", "Film 4"):
        add(page, name)
    page.get_by_label("On", exact=True).check()
    (card,) = recommend(page)
    thought = card.locator(".one.chosen")
    assert thought.locator("mark.true").all_text_contents() == ["Genre 3\u00a0✓", "Genre 4\u00a0✓"]
    assert thought.locator("mark.false").all_text_contents() == ["Genre 2\u00a0✗\u00a0untrue"]
    thought.get_by_text("Its facts 1 of 3 untrue").click()
    first, second, last = thought.locator("li").all()
    expect(first).to_contain_text("Genre 3 of the history. In Film 8; Film 3.")
    expect(second).to_contain_text(
        "untrue: Genre 2 of the history. No item of the history bears it"
    )
    expect(last).to_contain_text("Genre 4 of what comes next. In Film 4.")
    listed = names(card, ".items")
    ranks = [n for n, name in enumerate(listed, 1) if int(name.split()[1]) % 5 == 4]
    expect(last).to_contain_text(
        "Recommended: " + ", ".join(map(str, ranks)) if ranks else "No rec"
    )


def test_a_very_long_history_works(address, visit: Visit) -> None:
    page = visit(address)
    page.get_by_text("Paste a list").click()
    ids = [f"item{n % 3:03d}" for n in range(300)]
    page.get_by_label("One item id or title a line").fill("\n".join(ids))
    page.get_by_role("button", name="Use this list").click()
    expect(page.locator(".history li")).to_have_count(300)
    note = page.locator("#history-note")
    expect(note).to_contain_text(
        "300 items, the oldest first. The model reads the newest 8; the 292"
    )
    expect(page.locator(".history .unread")).to_have_count(292)
    expect(page.locator(".history li").last).to_contain_text("Film 2")
    page.get_by_label("Off").check()
    (card,) = recommend(page)
    assert not {"Film 0", "Film 1", "Film 2"} & set(names(card, ".items"))


def test_a_failure_is_one_sentence(address, make, engine, visit: Visit) -> None:
    page = visit(address)
    engine.alive = False
    cards = recommend(page)
    for card in cards:
        expect(card.get_by_role("alert")).to_have_text(
            "The engine has stopped; ask again when /health is green."
        )
    expect(page.get_by_role("status")).to_have_text("No recommendation.")
    engine.alive = True
    with listening(make()) as gone:
        page = visit(gone)
        expect(page.locator("#about")).to_contain_text("30 items")
    page.get_by_label("Off").check()
    (card,) = recommend(page)
    expect(card.get_by_role("alert")).to_have_text(
        "The server cannot be reached; check that it still runs."
    )
