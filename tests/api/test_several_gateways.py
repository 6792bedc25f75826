"""What a gateway's routes say when it is one of several: it answers for all, or says who is missing."""

import dataclasses
from typing import Any

from fastapi import FastAPI
from httpx import ASGITransport, AsyncClient, Response
from prometheus_client import CollectorRegistry, Counter, Metric
from prometheus_client.parser import text_string_to_metric_families

from gateway.peers import Answers, PoliciesInUse
from tests.api.live import is_openai_error
from tests.api.test_routes import POLICIES_IN_USE, app_of, config


def counted(requests: int) -> list[Metric]:
    registry = CollectorRegistry()
    Counter("baton_requests", "Prompts", ["status", "split"], registry=registry).labels("finished", "no").inc(requests)
    return list(registry.collect())


class Others:
    """Two other gateways; `silent` ones do not answer."""

    own_id = "gateway-1"

    def __init__(self, *silent: str) -> None:
        self.silent = silent
        self.present = ("gateway-1", "gateway-2", "gateway-3")
        self.receipts: dict[str, dict[str, Any] | None] = {"gateway-2": None, "gateway-3": {"request_id": "theirs"}}

    def members(self) -> tuple[str, ...]:
        return self.present

    async def metrics(self) -> Answers[list[Metric]]:
        counts = {"gateway-2": counted(20), "gateway-3": counted(300)}
        return Answers({name: metrics for name, metrics in counts.items() if name not in self.silent}, self.silent)

    async def receipt(self, request_id: str) -> Answers[dict[str, Any] | None]:
        found = {
            name: receipt if receipt and receipt["request_id"] == request_id else None
            for name, receipt in self.receipts.items()
            if name not in self.silent
        }
        return Answers(found, self.silent)

    async def policies(self) -> Answers[PoliciesInUse]:
        in_use = {name: PoliciesInUse(f"of {name}", None, 7.0) for name in ("gateway-2", "gateway-3")}
        return Answers({name: one for name, one in in_use.items() if name not in self.silent}, self.silent)


async def get(app: FastAPI, path: str) -> Response:
    async with AsyncClient(transport=ASGITransport(app), base_url="http://baton") as client:
        return await client.get(path)


def values(response: Response, sample_name: str) -> dict[str, float]:
    families = text_string_to_metric_families(response.text)
    return {s.labels["gateway"]: s.value for family in families for s in family.samples if s.name == sample_name}


async def test_a_scrape_holds_what_every_gateway_counts_and_vllms_metrics_of_this_one():
    response = await get(await app_of(config(), Others()), "/metrics")
    assert response.status_code == 200
    assert response.headers["content-type"] == "text/plain; version=0.0.4; charset=utf-8"
    requests = values(response, "baton_requests_total")
    assert requests["gateway-2"] == 20
    assert requests["gateway-3"] == 300
    assert set(values(response, "vllm:num_requests_running")) == {"gateway-1"}
    assert values(response, "baton_gateway_up") == {"gateway-1": 1, "gateway-2": 1, "gateway-3": 1}


async def test_a_scrape_without_one_gateway_is_a_scrape_and_says_so():
    response = await get(await app_of(config(), Others("gateway-2")), "/metrics")
    assert response.status_code == 200
    assert "gateway-2" not in values(response, "baton_requests_total")
    assert values(response, "baton_gateway_up") == {"gateway-1": 1, "gateway-2": 0, "gateway-3": 1}


async def test_a_gateway_that_was_there_at_the_last_scrape_is_counted_as_gone():
    others = Others()
    app = await app_of(config(), others)
    before = values(await get(app, "/metrics"), "baton_gateways_gone_total")["gateway-1"]
    others.present = ("gateway-1", "gateway-3", "gateway-4")
    for _ in range(2):
        assert values(await get(app, "/metrics"), "baton_gateways_gone_total")["gateway-1"] == before + 1


async def test_a_receipt_comes_from_whoever_has_it():
    response = await get(await app_of(config(), Others("gateway-2")), "/baton/receipts/theirs")
    assert response.status_code == 200
    assert response.json() == {"request_id": "theirs"}


async def test_a_receipt_that_nobody_has_is_404_only_when_everybody_was_heard():
    heard = await get(await app_of(config(), Others()), "/baton/receipts/nobodys")
    assert heard.status_code == 404
    assert is_openai_error(404, heard.json())
    unsure = await get(await app_of(config(), Others("gateway-3")), "/baton/receipts/theirs")
    assert unsure.status_code == 503
    assert unsure.headers["retry-after"] == "1"
    assert is_openai_error(503, unsure.json())
    assert "gateway-3 did not answer" in unsure.json()["error"]["message"]


async def test_status_says_who_answers_and_who_else_there_is():
    status = (await get(await app_of(config(), Others()), "/baton/status")).json()
    assert status["gateway"] == "gateway-1"
    assert status["gateways"] == ["gateway-1", "gateway-2", "gateway-3"]


async def test_any_gateway_tells_the_policies_of_all_and_who_did_not_answer():
    answer = (await get(await app_of(config(), Others("gateway-2")), "/baton/policies")).json()
    own = dataclasses.asdict(POLICIES_IN_USE)
    theirs = {"policy": "of gateway-3", "shadow_policy": None, "since_s": 7.0}
    assert answer == {"gateways": {"gateway-1": own, "gateway-3": theirs}, "missing": ["gateway-2"]}
    assert (await get(await app_of(config()), "/baton/status")).json()["policies"] == own
