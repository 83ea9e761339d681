"""The released MovieLens-100K checkpoint, served."""

import subprocess
from pathlib import Path

import pytest

pytest.importorskip("vllm")

from test_real_server import Server

from whyrec import Recommender

pytestmark = pytest.mark.timeout(600)


def test_it_recommends_what_the_recommender_does(released_run: Path, tmp_path: Path) -> None:
    folder = released_run / "model" / "aligned"
    options = ["--max-model-len", "2048", "--run", str(released_run)]
    server = Server(folder, tmp_path / "log.txt", *options)
    try:
        recommender = Recommender.from_pretrained(folder, device="cpu")
        for history in (["50", "172", "181"], ["1", "95", "588", "71"], []):
            wanted = recommender.recommend(history, k=10)
            answer = server.client.recommend(history, k=10)
            assert [item["id"] for item in answer["items"]] == [e.item_id for e in wanted]
            scores = [item["score"] for item in answer["items"]]
            assert scores == pytest.approx([e.score for e in wanted], abs=1e-3)
        known = server.client.recommend(user="1", k=5)
        assert len(known["items"]) == 5 and known["think"] == "off"
    finally:
        server.process.terminate()
        try:
            server.process.wait(60)
        except subprocess.TimeoutExpired:
            server.process.terminate()
            server.process.wait(60)
