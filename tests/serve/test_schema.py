"""The schema: what is refused before anything is computed, and settings between processes."""

import pytest
from pydantic import ValidationError

from whyrec.serve.schema import RecommendationRequest
from whyrec.serve.settings import Limits, ServeSettings


@pytest.mark.parametrize(
    ("think", "mode"), [(True, "on"), (False, "off"), ("on", "on"), ("off", "off")]
)
def test_thinking_is_a_switch_or_a_word(think, mode) -> None:
    assert RecommendationRequest(history=[], think=think).mode == mode


def test_ahead_needs_a_user() -> None:
    assert RecommendationRequest(user="u", think="ahead").mode == "ahead"
    with pytest.raises(ValidationError, match="needs the user"):
        RecommendationRequest(history=[], think="ahead")


@pytest.mark.parametrize(
    "body",
    [
        {},
        {"history": None},
        {"history": "item001"},
        {"history": [""]},
        {"history": [1]},
        {"history": [{}]},
        {"history": [{"item_id": "a", "title": "b"}]},
        {"history": [{"item_id": "a", "timestamp": float("inf")}]},
        {"history": [], "think": "maybe"},
        {"history": [], "think": 1},
        {"history": [], "k": 0},
        {"history": [], "k": 2.5},
        {"history": [], "beam_width": 0},
        {"history": [], "stream": "yes"},
        {"history": [], "exclude": "item001"},
        {"history": [], "filter": {"colour": "red"}},
        {"history": [], "unknown": 1},
        {"history": ["x" * 600]},
        {"user": ""},
    ],
)
def test_what_makes_no_sense_is_refused(body) -> None:
    with pytest.raises(ValidationError):
        RecommendationRequest.model_validate(body)


def test_settings_reach_the_other_process_without_the_key(monkeypatch) -> None:
    settings = ServeSettings(limits=Limits(k=7), run="r", ahead="a", api_key="secret", parent=3)
    assert "secret" not in settings.dumps()
    monkeypatch.setenv("WHYREC_SERVE", settings.dumps())
    monkeypatch.setenv("VLLM_API_KEY", "secret")
    assert ServeSettings.from_environment() == settings
    monkeypatch.delenv("WHYREC_SERVE")
    monkeypatch.delenv("VLLM_API_KEY")
    assert ServeSettings.from_environment() == ServeSettings()
