"""Every internal of NIXL that Baton touches, by name: when an upgrade breaks one, the failing test says which."""

import inspect
import uuid


def test_the_pinned_version_is_installed():
    from importlib.metadata import version

    assert version("nixl") == "1.5.1"


def test_the_wrapper_sets_the_delay_to_zero_just_before_it_makes_the_agent():
    from nixl_cu12 import _api

    source = inspect.getsource(_api.nixl_agent.__init__)
    assert "agent_config.pthrDelay = 0" in source, "a setting upstream? then engine/vllm_nixl.py may go"
    assert "self.agent = nixlBind.nixlAgent(agent_name, agent_config)" in source


def test_vllm_takes_its_agent_from_the_module_we_patch():
    from nixl._api import nixl_agent
    from nixl_cu12 import _api

    assert nixl_agent is _api.nixl_agent


def test_agents_made_in_our_context_get_the_delay_and_later_ones_do_not(monkeypatch):
    from nixl_cu12 import _api

    from engine.vllm_nixl import progress_thread_delay

    delays = []
    make_agent = _api.nixlBind.nixlAgent

    def record(name, config):
        delays.append(config.pthrDelay)
        return make_agent(name, config)

    monkeypatch.setattr(_api.nixlBind, "nixlAgent", record)
    with progress_thread_delay(100):
        _api.nixl_agent(str(uuid.uuid4()), _api.nixl_agent_config(backends=[]))
    _api.nixl_agent(str(uuid.uuid4()), _api.nixl_agent_config(backends=[]))
    assert delays == [100, 0]
