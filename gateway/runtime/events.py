"""Owns the words the runtime's driver process and the launcher exchange: one JSON line per event."""

import msgspec


class DeploymentState(msgspec.Struct, frozen=True):
    """One Serve deployment: its status, how many replicas run, how many there are, and why it is not healthy."""

    name: str
    status: str
    running: int
    replicas: int
    message: str


class RayStarted(msgspec.Struct, frozen=True, tag="ray"):
    """Ray runs; `pids` are the processes without which it is dead, by name."""

    pids: dict[str, int]


class AppStatus(msgspec.Struct, frozen=True, tag="status"):
    """The Serve application: `status` is one of Serve's ApplicationStatus values."""

    status: str
    message: str
    deployments: list[DeploymentState]


class PoliciesSwitched(msgspec.Struct, frozen=True, tag="policies"):
    """The gateways were told what decides placements from now on; each follows in its turn."""

    policy: str
    shadow_policy: str | None


class DriverFailed(msgspec.Struct, frozen=True, tag="failed"):
    """The driver gives up; `message` is what the user reads first."""

    message: str


Event = RayStarted | AppStatus | PoliciesSwitched | DriverFailed

_encoder = msgspec.json.Encoder()
_decoder: msgspec.json.Decoder[Event] = msgspec.json.Decoder(Event)


def encode(event: Event) -> bytes:
    return _encoder.encode(event) + b"\n"


def decode(line: bytes) -> Event:
    return _decoder.decode(line)
