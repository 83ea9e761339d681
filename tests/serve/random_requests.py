"""Random requests over an OpenAPI schema, by schemathesis: none may find a 5xx."""

from collections import Counter
from typing import Any

from hypothesis import HealthCheck, Phase, given, settings

OURS = (
    "/v1/recommendations", "/v1/items", "/v1/items/{item_id}", "/v1/items/encode",
    "/v1/items/retire", "/v1/about", "/v1/users/{user_id}", "/health",
)  # fmt: skip


def send_random(
    openapi: dict[str, Any], address: str, *, examples: int
) -> dict[tuple[str, str], Counter[int]]:
    """So many requests to each of our operations; the statuses by method and path.

    Fails on a 5xx, and on an error that is not in OpenAI's format.
    """
    import schemathesis

    schema = schemathesis.openapi.from_dict(openapi)
    operations = [result.ok() for result in schema.get_all_operations()]
    return {
        (one.method.upper(), one.path): _send(one, address, examples=examples)
        for one in operations
        if one.path in OURS
    }


def _send(operation: Any, address: str, *, examples: int) -> Counter[int]:
    statuses: Counter[int] = Counter()

    @settings(
        max_examples=examples,
        deadline=None,
        derandomize=True,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(operation.as_strategy())
    def run(case: Any) -> None:
        answer = case.call(base_url=address)
        statuses[answer.status_code] += 1
        assert answer.status_code < 500, (case.as_curl_command(), answer.text)
        # A path or a method that the router does not know is not ours to word.
        if 400 <= answer.status_code < 500 and answer.status_code not in (404, 405):
            assert set(answer.json()["error"]) == {"message", "type", "param", "code"}

    run()
    return statuses
