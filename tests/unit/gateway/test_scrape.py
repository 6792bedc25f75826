"""One exposition for all gateways: every family once, every sample named after its gateway, nothing lost."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Metric
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.samples import Sample

from gateway import scrape


def metrics_of(requests: int) -> list[Metric]:
    registry = CollectorRegistry()
    counter = Counter("baton_requests", "Prompts by\nwhat became of them", ["status"], registry=registry)
    counter.labels('fin"ished').inc(requests)
    histogram = Histogram("baton_ttft_seconds", "Time", buckets=(0.1, 1.0), registry=registry)
    for _ in range(requests):
        histogram.observe(0.5)
    Gauge("vllm:running", "Running", registry=registry).set(requests)
    return list(registry.collect())


def parsed(text: bytes) -> list[Metric]:
    return list(text_string_to_metric_families(text.decode()))


def samples_of(text: bytes, gateway: str) -> set[tuple[str, tuple[tuple[str, str], ...], float]]:
    """What a gateway's part says, without the label that names it."""
    return {
        (s.name, tuple(sorted((k, v) for k, v in s.labels.items() if k != "gateway")), s.value)
        for family in parsed(text)
        for s in family.samples
        if s.labels["gateway"] == gateway and family.name != "baton_gateway_up"
    }


def plain(metrics: list[Metric]) -> set[tuple[str, tuple[tuple[str, str], ...], float]]:
    return {(s.name, tuple(sorted(s.labels.items())), s.value) for metric in metrics for s in metric.samples}


def test_every_sample_of_every_gateway_is_there_and_named_after_it() -> None:
    one, two = metrics_of(1), metrics_of(2)
    text = scrape.exposition({"one": one, "two": two})
    assert samples_of(text, "one") == plain(one)
    assert samples_of(text, "two") == plain(two)


def test_each_family_comes_once_with_its_type_and_all_its_samples_together() -> None:
    text = scrape.exposition({"one": metrics_of(1), "two": metrics_of(2)}).decode()
    types: dict[str, str] = {}
    name = ""
    for line in text.splitlines():
        if line.startswith("# TYPE "):
            _, _, name, kind = line.split(" ")
            assert name not in types, f"{name} comes twice"
            types[name] = kind
        elif not line.startswith("#"):
            assert line.startswith(name), f"{line} is not below its family"
    assert types == {
        "baton_gateway_up": "gauge",
        "baton_requests_total": "counter",
        "baton_requests_created": "gauge",
        "baton_ttft_seconds": "histogram",
        "baton_ttft_seconds_created": "gauge",
        "vllm:running": "gauge",
    }


def test_a_histograms_buckets_stay_in_order_within_a_gateway() -> None:
    (histogram,) = (
        family
        for family in parsed(scrape.exposition({"one": metrics_of(1), "two": metrics_of(2)}))
        if family.name == "baton_ttft_seconds"
    )
    buckets = [(s.labels["gateway"], s.labels["le"], s.value) for s in histogram.samples if s.name.endswith("_bucket")]
    assert buckets == [
        ("one", "0.1", 0.0), ("one", "1.0", 1.0), ("one", "+Inf", 1.0),
        ("two", "0.1", 0.0), ("two", "1.0", 2.0), ("two", "+Inf", 2.0),
    ]  # fmt: skip


def test_a_gateway_that_did_not_answer_is_shown_as_down_and_has_no_samples() -> None:
    text = scrape.exposition({"one": metrics_of(1)}, missing=["two"])
    (up,) = (family for family in parsed(text) if family.name == "baton_gateway_up")
    assert {s.labels["gateway"]: s.value for s in up.samples} == {"one": 1.0, "two": 0.0}
    assert samples_of(text, "two") == set()


def test_a_gateway_on_its_own_has_the_same_series_as_among_others() -> None:
    one = metrics_of(1)
    alone = scrape.exposition({"one": one})
    assert samples_of(alone, "one") == samples_of(scrape.exposition({"one": one, "two": metrics_of(2)}), "one")
    assert b'baton_gateway_up{gateway="one"} 1.0' in alone


def test_a_scrape_reads_the_same_whichever_gateway_answers() -> None:
    one, two = metrics_of(1), metrics_of(2)
    assert scrape.exposition({"one": one, "two": two}) == scrape.exposition({"two": two, "one": one})


def test_gateways_of_different_versions_share_a_family_as_the_first_knows_it() -> None:
    older, newer = Metric("load", "Load", "gauge"), Metric("load", "Load, in tokens", "counter")
    older.samples, newer.samples = [Sample("load", {}, 1.0)], [Sample("load", {}, 2.0)]
    text = scrape.exposition({"one": [older], "two": [newer]}).decode()
    assert text.count("# TYPE load") == 1
    assert 'load{gateway="one"} 1.0\nload{gateway="two"} 2.0\n' in text


def test_merging_leaves_what_it_is_given_as_it_was() -> None:
    one = metrics_of(1)
    before = plain(one)
    scrape.exposition({"one": one, "two": metrics_of(2)})
    assert plain(one) == before
