"""Owns the order in which engines take the requests that wait for them: a rank in time that never has to change. Pure.

The rank is when a request came, put off by as much as others may be taken before it. Engines take the lowest rank first
(`EngineRequest.priority`). So an order by class, slack and service needs no queue that is shared by gateways or pools,
and nobody starves: whoever comes more than `starvation_s` after a request is behind it, whatever either is.

Everything is a share of the deadline that is usual: who is admitted is predicted to have its first token in good time
without being overtaken, and must still have it then.
"""

import math

from gateway.routing.types import Priority, RequestView

CLASS_SHARE = 0.25
"""Of the usual deadline, from one class to the next: as long as the lower one has not waited for so long, the higher is
before it. Slack and service together put off as much."""
SLACK_SHARE = 0.75
"""Of that for the slack: all of it with the usual deadline or a later one, in proportion with an earlier one. The rest
is for the service."""
LONG_SERVICE_S = 1024.0
"""Engine time of a trajectory that is put off the most; others in proportion to the logarithm."""
LONGEST_DEADLINE_S = 60.0
"""Later usual deadlines do not put off any further."""


def starvation_s(usual_deadline_s: float) -> float:
    """The longest that a request is put off."""
    return (len(Priority) * CLASS_SHARE) * min(usual_deadline_s, LONGEST_DEADLINE_S)


def rank_ms(request: RequestView, arrived_s: float, read_s: float, usual_deadline_s: float) -> int:
    """By class, then the slack to the deadline, then the attained service of the trajectory, each as far as the bound
    on starvation allows. `arrived_s`: seconds since the epoch, so that gateways agree; `read_s`: the predicted reading,
    which uses up slack; `usual_deadline_s`: of those that name none."""
    usual_s = min(usual_deadline_s, LONGEST_DEADLINE_S)
    class_s = CLASS_SHARE * usual_s
    slack = 1.0
    if request.deadline_s is not None and request.deadline_s < usual_s:
        used_s = request.waited_s + read_s
        slack = max(request.deadline_s - used_s, 0.0) / (usual_s - used_s) if used_s < usual_s else 0.0
    service = math.log2(1 + min(request.attained_s, LONG_SERVICE_S)) / math.log2(1 + LONG_SERVICE_S)
    put_off = Priority.HIGH.urgency - request.priority.urgency + SLACK_SHARE * slack + (1 - SLACK_SHARE) * service
    return round((arrived_s + class_s * put_off) * 1000)
