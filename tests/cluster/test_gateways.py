"""Two gateways before real engines, as a user starts them: it does not show which of them answers."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.samples import Sample

from tests.api.live import KNOWN_CHAT, local_config, served
from tests.cluster.running import wait_until

pytestmark = [pytest.mark.engines, pytest.mark.timeout(480)]

DEADLINE_S = 60.0


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    config = local_config()
    config["gateway"] = {"replicas": 2, "num_cpus": 0.5}
    with served(config, tmp_path_factory.mktemp("two-gateways")) as url:
        yield url


def get(url: str, path: str) -> httpx.Response:
    """Over a connection of its own, so that HAProxy chooses a gateway anew."""
    return httpx.get(f"{url}{path}", timeout=DEADLINE_S)


def ask(url: str) -> str:
    response = httpx.post(f"{url}/v1/chat/completions", json=KNOWN_CHAT, timeout=DEADLINE_S)
    assert response.status_code == 200, response.text
    return response.headers["x-baton-request-id"]


def scraped(url: str, sample_name: str) -> list[Sample]:
    response = get(url, "/metrics")
    assert response.status_code == 200, response.text
    families = text_string_to_metric_families(response.text)
    return [sample for family in families for sample in family.samples if sample.name == sample_name]


def by_gateway(samples: list[Sample]) -> dict[str, float]:
    """The sum of each gateway's samples."""
    sums: dict[str, float] = {}
    for sample in samples:
        sums[sample.labels["gateway"]] = sums.get(sample.labels["gateway"], 0.0) + sample.value
    return sums


def test_both_gateways_answer_and_each_names_both(url: str) -> None:
    views: dict[str, list[str]] = {}

    def agree() -> bool:
        status = get(url, "/baton/status").json()
        views[status["gateway"]] = status["gateways"]
        return len(views) == 2 and all(view == sorted(views) for view in views.values())

    wait_until(agree, f"two gateways that name each other: {views}", DEADLINE_S)


def test_a_receipt_is_found_through_either_gateway_whichever_made_it(url: str) -> None:
    before = by_gateway(scraped(url, "baton_requests_total"))
    receipts = [ask(url) for _ in range(4)]
    after = by_gateway(scraped(url, "baton_requests_total"))
    assert all(after[gateway] > before.get(gateway, 0.0) for gateway in after), "one gateway made all the receipts"
    for request_id in receipts:
        for _ in range(20):
            response = get(url, f"/baton/receipts/{request_id}")
            assert response.status_code == 200, response.text
            assert response.json()["request_id"] == request_id
            assert response.json()["outcome"]["status"] == "finished"
    assert get(url, "/baton/receipts/nobodys").status_code == 404


def test_every_scrape_counts_every_request_once(url: str) -> None:
    before = sum(by_gateway(scraped(url, "baton_requests_total")).values())
    for num_sent in range(1, 9):
        ask(url)
        for _ in range(3):
            counts = by_gateway(scraped(url, "baton_requests_total"))
            assert sum(counts.values()) - before == num_sent
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda _: ask(url), range(16)))
    counts = by_gateway(scraped(url, "baton_requests_total"))
    assert sum(counts.values()) - before == 8 + 16
    assert len(counts) == 2
    assert set(by_gateway(scraped(url, "baton_gateway_up")).values()) == {1.0}


def test_vllms_metrics_of_both_front_ends_are_in_one_scrape(url: str) -> None:
    finished = by_gateway(scraped(url, "vllm:request_success_total"))
    assert finished == by_gateway(scraped(url, "baton_requests_total"))
    assert len(finished) == 2


def test_scrapes_at_once_are_all_whole(url: str) -> None:
    with ThreadPoolExecutor(8) as pool:
        scrapes = list(pool.map(lambda _: by_gateway(scraped(url, "baton_gateway_up")), range(32)))
    assert all(len(up) == 2 and set(up.values()) == {1.0} for up in scrapes)
