"""Owns Baton's subclass of vLLM's CPU worker: seeded requests survive prompts that are prefilled in chunks, and SIGTERM
ends the engine at once.

vLLM's model runner samples a throw-away token after every chunk but the last and then winds the request's random
generator back by CUDA's offset, which a CPU generator does not have: the call raises and the engine dies
(docs/adr/0004). Here the generator's whole state is put back instead.
"""

from typing import Any

import numpy as np
from vllm.v1.worker.cpu_model_runner import CPUModelRunner
from vllm.v1.worker.cpu_worker import CPUWorker

from engine.termination import end_at_sigterm


class RewindingCPUModelRunner(CPUModelRunner):
    """CPUModelRunner that restores the generators of requests whose sampled token is thrown away."""

    def _discarded(self) -> dict[int, Any]:
        rows = np.nonzero(self.discard_request_mask.np[: self.input_batch.num_reqs])[0]
        generators = self.input_batch.generators
        return {int(row): generators[int(row)] for row in rows if int(row) in generators}

    def _sample(self, *args: Any, **kwargs: Any) -> Any:
        states = [(generator, generator.get_state()) for generator in self._discarded().values()]
        output = super()._sample(*args, **kwargs)
        for generator, state in states:
            generator.set_state(state)
        return output

    def _bookkeeping_sync(self, *args: Any, **kwargs: Any) -> Any:
        held_back = self._discarded()
        for row in held_back:
            del self.input_batch.generators[row]
        try:
            return super()._bookkeeping_sync(*args, **kwargs)
        finally:
            self.input_batch.generators.update(held_back)


class BatonCPUWorker(CPUWorker):
    """CPUWorker with a RewindingCPUModelRunner (vLLM's model runner V1 only; V2 draws by seed and position)."""

    def init_device(self) -> None:
        # EngineCore's own handler lets it take requests for seconds that it never looks at, or fails.
        end_at_sigterm()
        super().init_device()
        if type(self.model_runner) is CPUModelRunner:
            # The subclass adds behaviour, no state; vLLM constructs the runner by a name of its own.
            self.model_runner.__class__ = RewindingCPUModelRunner
