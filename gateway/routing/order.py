"""Owns the order in which engines take the requests that wait for them: a rank in time that never has to change. Pure.

The rank is when a request came, put off by as much as others may be taken before it. Engines take the lowest rank first
(`EngineRequest.priority`). So an order by class, slack and service needs no queue that is shared by gateways or pools,
and nobody starves: whoever comes more than `STARVATION_S` after a request is behind it, whatever either is.
"""

import math

from gateway.routing.types import Priority, RequestView

STARVATION_S = 60.0
"""The longest that a request is put off."""
CLASS_S = STARVATION_S / 3
"""From one class to the next, and what slack and service together can put off: a class is before the next one as long
as the lower one has not waited for so long."""
SLACK_S = CLASS_S * 0.75
"""For requests that have `LONG_SLACK_S` or more until their deadline; in proportion for less."""
LONG_SLACK_S = 30.0
SERVICE_S = CLASS_S - SLACK_S
"""For trajectories that have had `LONG_SERVICE_S` of engine time or more; in proportion to the logarithm for less."""
LONG_SERVICE_S = 1024.0

CLASSES = {Priority.HIGH: 0, Priority.NORMAL: 1, Priority.LOW: 2}


def rank_ms(request: RequestView, arrived_s: float, read_s: float) -> int:
    """By class, then the slack to the deadline, then the attained service of the trajectory, each as far as the bound
    on starvation allows. `arrived_s`: seconds since the epoch, so that gateways agree; `read_s`: the predicted reading,
    which uses up slack."""
    put_off_s = CLASSES[request.urgency] * CLASS_S
    deadline_s = request.deadline_s
    slack_s = LONG_SLACK_S if deadline_s is None else deadline_s - request.waited_s - read_s
    put_off_s += SLACK_S * min(max(slack_s / LONG_SLACK_S, 0.0), 1.0)
    service_s = min(request.attained_s, LONG_SERVICE_S)
    put_off_s += SERVICE_S * math.log2(1 + service_s) / math.log2(1 + LONG_SERVICE_S)
    return round((arrived_s + put_off_s) * 1000)
