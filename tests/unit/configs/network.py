"""Owns what network policies allow, decided as Kubernetes decides it, as far as configs/kuberay goes (pure)."""

import ipaddress
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

Labels = Mapping[str, str]


@dataclass(frozen=True)
class Pod:
    labels: Labels
    namespace: str
    namespace_labels: Labels = field(default_factory=dict)


Peer = Pod | str
"""A pod, or the IP address of something that is none."""


def may_connect(policies: Iterable[Any], source: Peer, target: Peer, port: int, protocol: str = "TCP") -> bool:
    """Whether the source may leave for the target, and the target lets it in."""
    policies = list(policies)
    ways = (("Egress", "egress", "to", source, target), ("Ingress", "ingress", "from", target, source))
    return all(
        _allows(policies, kind, rules, peers, pod, other, port, protocol)
        for kind, rules, peers, pod, other in ways
        if isinstance(pod, Pod)
    )


def selects(selector: Any, labels: Labels) -> bool:
    """Of a LabelSelector with `In` as the only operator."""
    for expression in selector.get("matchExpressions", []):
        assert expression["operator"] == "In"
        if labels.get(expression["key"]) not in expression["values"]:
            return False
    return all(labels.get(name) == value for name, value in selector.get("matchLabels", {}).items())


def _allows(
    policies: list[Any], kind: str, rules: str, peers: str, pod: Pod, other: Peer, port: int, protocol: str
) -> bool:
    of_pod = [
        policy
        for policy in policies
        if policy["metadata"]["namespace"] == pod.namespace
        and kind in policy["spec"]["policyTypes"]
        and selects(policy["spec"]["podSelector"], pod.labels)
    ]
    if not of_pod:
        return True
    return any(
        _is_peer(peer, policy["metadata"]["namespace"], other) and _has_port(rule, port, protocol)
        for policy in of_pod
        for rule in policy["spec"].get(rules, [])
        for peer in rule[peers]
    )


def _is_peer(peer: Any, namespace: str, other: Peer) -> bool:
    if (block := peer.get("ipBlock")) is not None:
        if isinstance(other, Pod):
            return False
        address = ipaddress.ip_address(other)
        return address in ipaddress.ip_network(block["cidr"]) and not any(
            address in ipaddress.ip_network(part) for part in block.get("except", [])
        )
    if not isinstance(other, Pod):
        return False
    if (selector := peer.get("namespaceSelector")) is None:
        in_namespace = other.namespace == namespace
    else:
        in_namespace = selects(selector, other.namespace_labels)
    return in_namespace and selects(peer.get("podSelector", {}), other.labels)


def _has_port(rule: Any, port: int, protocol: str) -> bool:
    return "ports" not in rule or any(
        one["port"] == port and one.get("protocol", "TCP") == protocol for one in rule["ports"]
    )
