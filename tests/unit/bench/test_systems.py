"""How systems are started and stopped, with small processes in the place of servers."""

import sys
from dataclasses import replace
from pathlib import Path

import pytest

from bench import systems
from bench.systems import (
    SIMULATED_SYSTEM_NAMES,
    Command,
    LocalSystem,
    Recipe,
    StartFailed,
    check_comparable,
    check_simulated,
    flags,
    make_system,
)
from engine.ports import free_ports
from gateway.runtime import processes
from gateway.settings import load

CONFIGS = Path(__file__).resolve().parents[3] / "configs"
SERVER = """
import http.server, subprocess, sys
subprocess.Popen([sys.executable, "-c", "import signal; signal.pause()"], start_new_session=True)
address = ("127.0.0.1", int(sys.argv[1]))
http.server.ThreadingHTTPServer(address, http.server.SimpleHTTPRequestHandler).serve_forever()
"""


def command(script: str, *arguments: str, ready_url: str = "http://127.0.0.1:9/") -> Command:
    env = {processes.RUN_MARKER: str(processes.this_process())}
    return Command("server", [sys.executable, "-c", script, *arguments], env, ready_url)


def system(stage: Command, timeout_s: float = 30.0) -> LocalSystem:
    return LocalSystem("small", lambda _folder: Recipe("http://unused", ((stage,),)), timeout_s)


def test_a_system_that_ends_while_it_starts_fails_with_the_end_of_its_log() -> None:
    broken = system(command("print('no such model'); raise SystemExit(3)"))
    with pytest.raises(StartFailed, match="code 3") as failure:
        broken.start()
    assert failure.value.log_tail == "no such model"
    broken.stop()
    assert broken.processes() == []


def test_a_system_that_never_answers_fails_within_its_time_and_is_stopped_though_it_is_not_marked() -> None:
    silent = system(replace(command("import signal; signal.pause()"), env={}), timeout_s=0.0)
    with pytest.raises(StartFailed, match="did not answer within 0 s"):
        silent.start()
    assert len(silent.processes()) == 1
    silent.stop()
    assert silent.processes() == []


def test_stopping_ends_children_in_sessions_of_their_own_and_removes_the_folder() -> None:
    folders: list[Path] = []

    def recipe(folder: Path) -> Recipe:
        folders.append(folder)
        (port,) = free_ports("127.0.0.1")
        url = f"http://127.0.0.1:{port}"
        return Recipe(url, ((command(SERVER, str(port), ready_url=url),),))

    served = LocalSystem("small", recipe, 30.0)
    served.start()
    try:
        assert len(served.processes()) == 2
        assert folders[0].is_dir()
    finally:
        served.stop()
    assert served.processes() == []
    assert not folders[0].exists()


def test_a_system_that_answers_is_not_ready_before_it_says_so() -> None:
    (port,) = free_ports("127.0.0.1")
    server = replace(command(SERVER, str(port), ready_url=f"http://127.0.0.1:{port}"), ready_text="all is well")
    mute = system(server, timeout_s=3.0)
    with pytest.raises(StartFailed, match="did not answer within 3 s"):
        mute.start()
    mute.stop()
    saying = replace(server, argv=[*server.argv[:2], f"print('all is well', flush=True)\n{SERVER}", *server.argv[3:]])
    ready = system(saying)
    ready.start()
    ready.stop()


def test_stopping_what_was_never_started_does_nothing() -> None:
    system(command("")).stop()


def test_the_routers_ports_are_none_of_its_servers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(systems, "free_ports", lambda _host, count=1: [20_001, 20_002, 20_003, 20_004][:count])
    monkeypatch.setattr(systems, "_router_executable", lambda: Path("vllm-router"))
    config = CONFIGS / "simulated.yaml"
    recipe = systems.simulated_router(load(config), config, tmp_path)
    commands = [one for stage in recipe.stages for one in stage]
    used = [word for one in commands for word in one.argv if word.startswith("2000")]
    assert sorted(used) == ["20001", "20002", "20003", "20004"]


def test_engine_arguments_become_flags() -> None:
    arguments = {
        "max_model_len": 8192,
        "enforce_eager": True,
        "trust_remote_code": False,
        "kv_transfer_config": {"a": 1},
    }
    assert flags(arguments) == [
        "--max-model-len", "8192", "--enforce-eager", "--no-trust-remote-code", "--kv-transfer-config", '{"a": 1}',
    ]  # fmt: skip


def test_an_unknown_system_is_refused_with_the_names_there_are() -> None:
    config = CONFIGS / "local.yaml"
    with pytest.raises(ValueError, match="choose from bare, router-stock"):
        make_system("llm-d", load(config), config)


@pytest.mark.parametrize("name", ["local-2p2d.yaml", "aggregated.yaml", "gpu.yaml"])
def test_a_configuration_that_is_not_one_to_one_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match="must be one CPU engine"):
        check_comparable(load(CONFIGS / name))


def test_the_default_configuration_is_comparable() -> None:
    check_comparable(load(CONFIGS / "local.yaml"))


def test_real_and_simulated_engines_are_never_compared() -> None:
    simulated = load(CONFIGS / "simulated.yaml")
    check_simulated(simulated)
    with pytest.raises(ValueError, match="--engine simulated"):
        check_comparable(simulated)
    for settings in (load(CONFIGS / "local.yaml"), load(CONFIGS / "simulated.yaml", {"pools.decode.replicas": 2})):
        with pytest.raises(ValueError, match="one simulated engine"):
            check_simulated(settings)
    with pytest.raises(ValueError, match="choose from bare, router, baton"):
        make_system("router-equal", simulated, CONFIGS / "simulated.yaml")


def test_only_the_routers_simulated_engines_have_processes_of_their_own() -> None:
    config = CONFIGS / "simulated.yaml"
    made = {name: make_system(name, load(config), config) for name in SIMULATED_SYSTEM_NAMES}
    assert {name: system.engine_is_inside for name, system in made.items()} == {
        "bare": True, "router": False, "baton": True,
    }  # fmt: skip
    real = CONFIGS / "local.yaml"
    assert not make_system("baton", load(real), real).engine_is_inside
