"""Owns the constants that published policies are tuned over in a replay: as many for each. Pure."""

from collections.abc import Mapping

from gateway.routing.policies import Dynamo, LlmD, Policy, dynamo, llm_d

TUNING_SEED = 1000
"""No figure that is reported is of it."""
TUNING_LOAD = 1.1
"""Of the goodput that a policy has with its own constants: there a better choice shows."""

_DYNAMO = (
    Dynamo(0.25, 1.0),
    Dynamo(0.5, 1.0),
    Dynamo(2.0, 1.0),
    Dynamo(4.0, 1.0),
    Dynamo(16.0, 1.0),
    Dynamo(1.0, 2.0),
    Dynamo(2.0, 2.0),
    Dynamo(4.0, 0.5),
)
_LLM_D = (
    LlmD(1.0, 1.0, 6.0),
    LlmD(4.0, 1.0, 3.0),
    LlmD(2.0, 0.0, 3.0),
    LlmD(0.0, 2.0, 6.0),
    LlmD(max_penalty_s=2.0),
    LlmD(max_penalty_s=20.0),
    LlmD(affine_share=0.5),
    LlmD(affine_share=0.95, max_penalty_s=10.0),
)

TUNABLE: Mapping[str, Mapping[str, Policy]] = {
    "dynamo": {f"scale {c.prefill_load_scale:g}, credit {c.overlap_credit:g}": dynamo(c) for c in _DYNAMO},
    "llm-d": {
        f"weights {c.queue_weight:g}/{c.kv_weight:g}/{c.prefix_weight:g}, affine {c.affine_share:g}, "
        f"penalty {c.max_penalty_s:g} s": llm_d(c)
        for c in _LLM_D
    },
}
"""By policy and by what the constants are called, beside its own. The other policies have no constants, ours too."""
