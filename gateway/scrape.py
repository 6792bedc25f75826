"""Owns the merging of all gateways' metrics into one Prometheus exposition. Pure."""

from collections.abc import Iterator, Mapping, Sequence

from prometheus_client import CONTENT_TYPE_PLAIN_0_0_4, Metric, generate_latest
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

CONTENT_TYPE = CONTENT_TYPE_PLAIN_0_0_4
LABEL = "gateway"


class Merged(Collector):
    """Every family once, with the samples of every gateway, each labelled with the gateway it comes from.

    The label is there with one gateway too: series must not change their names when a second one starts. `missing` are
    gateways that did not answer. Where versions differ, a family has the help and type of the first gateway by id.
    """

    def __init__(self, by_gateway: Mapping[str, Sequence[Metric]], missing: Sequence[str] = ()):
        self._by_gateway = by_gateway
        self._missing = missing

    def collect(self) -> Iterator[Metric]:
        families: dict[str, Metric] = {}
        for gateway, metrics in sorted(self._by_gateway.items()):
            for metric in metrics:
                family = families.get(metric.name)
                if family is None:
                    family = families[metric.name] = Metric(metric.name, metric.documentation, metric.type, metric.unit)
                family.samples += [s._replace(labels={**s.labels, LABEL: gateway}) for s in metric.samples]
        yield self._up()
        yield from families.values()

    def _up(self) -> Metric:
        up = GaugeMetricFamily(
            "baton_gateway_up",
            "1: this scrape holds the gateway replica's metrics; 0: it did not answer in time and is left out. "
            "Add them up to count the gateways that answer",
            labels=[LABEL],
        )
        for gateway in sorted({*self._by_gateway, *self._missing}):
            up.add_metric([gateway], 1.0 if gateway in self._by_gateway else 0.0)
        return up


def exposition(by_gateway: Mapping[str, Sequence[Metric]], missing: Sequence[str] = ()) -> bytes:
    """The text of one scrape, in the format that `CONTENT_TYPE` names."""
    return generate_latest(Merged(by_gateway, missing))
