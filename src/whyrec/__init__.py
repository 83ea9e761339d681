"""WhyRec: a recommender that reasons, made out of a pretrained LLM and semantic IDs."""

from typing import Any

__version__ = "0.1.0"
__all__ = ["Recommender"]


def __getattr__(name: str) -> Any:
    """Import `Recommender` when it is asked for: `import whyrec` stays fast."""
    if name == "Recommender":
        from whyrec.decode.recommender import Recommender

        return Recommender
    raise AttributeError(f"module 'whyrec' has no attribute {name!r}")
