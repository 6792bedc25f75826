"""Deadlines and priorities over real engines: a refusal has its own status, also of a stream, and says when to come."""

from typing import Any

import pytest

from tests.api.live import MODEL, Live, is_anthropic_error, is_openai_error, unique_tokens

COMPLETIONS = "/v1/completions"
HELLO = [{"role": "user", "content": "Hello"}]
BODIES: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {"model": MODEL, "messages": HELLO, "max_tokens": 4},
    COMPLETIONS: {"model": MODEL, "prompt": "Hello", "max_tokens": 4},
    "/v1/responses": {"model": MODEL, "input": "Hello", "max_output_tokens": 4},
    "/v1/messages": {"model": MODEL, "messages": HELLO, "max_tokens": 4},
}
HURRY = {"x-baton-ttft-deadline-ms": "1"}


@pytest.fixture(scope="module", autouse=True)
def prefill_has_been_measured(live: Live) -> None:
    for _ in range(3):
        body = {"model": MODEL, "prompt": unique_tokens(800), "max_tokens": 1}
        assert live.http.post(COMPLETIONS, json=body).status_code == 200
    live.quiet()


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("path", list(BODIES))
def test_a_request_that_would_be_late_is_refused_with_429_and_a_time_to_try_again(
    live: Live, path: str, stream: bool
) -> None:
    response = live.http.post(path, json=BODIES[path] | {"stream": stream}, headers=HURRY)
    assert response.status_code == 429, response.text
    assert 1 <= int(response.headers["retry-after"]) <= 60
    error = response.json()
    assert is_anthropic_error(error) if path == "/v1/messages" else is_openai_error(429, error)
    assert "the predicted time to the first token" in error["error"]["message"]
    live.quiet()


def test_a_request_with_time_enough_is_served_whatever_its_priority(live: Live) -> None:
    for priority in ("low", "normal", "high"):
        headers = {"x-baton-priority": priority, "x-baton-ttft-deadline-ms": "60000"}
        response = live.http.post(COMPLETIONS, json=BODIES[COMPLETIONS], headers=headers)
        assert response.status_code == 200, response.text
        receipt = live.receipt(response)
        hints = receipt["request"]["hints"]
        assert (hints["priority"], hints["ttft_deadline_s"], hints["session"]) == (priority, 60.0, None)
        assert 0 < receipt["admission"]["predicted_ttft_s"] < receipt["admission"]["budget_s"] <= 60.0


def test_a_refusal_is_counted_by_cause_and_priority(live: Live) -> None:
    labels = ('cause="deadline"', 'priority="low"', 'status="429"')
    headers = HURRY | {"x-baton-priority": "low"}
    assert live.http.post(COMPLETIONS, json=BODIES[COMPLETIONS], headers=headers).status_code == 429
    text = live.http.get("/metrics").text
    samples = [line for line in text.splitlines() if line.startswith("baton_rejections_total{")]
    assert any(all(label in sample for label in labels) for sample in samples), samples
