"""The generator: arrivals wait for nothing, turns wait for what they need, and an interrupted run keeps what it has."""

import asyncio
import contextlib
from collections.abc import Callable
from dataclasses import replace

import pytest

from bench import cpu, load_server
from bench.load import LoadExperiment, Progress
from bench.load_plan import LoadPlan, ServerFacts, ServerKind, Slo
from bench.load_report import End, LoadReport
from bench.results import EngineKind
from bench.traces import Child, Session, Trace, Trajectory, Turn, linked
from tests.unit.bench.fake_server import STREAM, Body, FakeServer, event, http_chunk
from tests.unit.bench.test_results import SETTING

PLAN = LoadPlan("chat", 200.0, None, 0.2, 0.0, 5.0, 0, "salt", (Slo("own", 1e4, 1e4),), max_lateness_ms=1e4)
HELD_S = 10.0
SINGLE = Session((Turn(6, 3, (0, 1)),))


@pytest.fixture(autouse=True)
def _the_fake_server_is_no_baton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(load_server, "counters", lambda *_: None)
    monkeypatch.setattr(load_server, "local_processes", lambda _: [])


def trace(*roots: Session) -> Trace:
    return Trace("t", 4, tuple(Trajectory(str(index), root, 9) for index, root in enumerate(roots)))


async def answer(body: Body, writer: asyncio.StreamWriter) -> None:
    tokens = [1000 + place for place in range(body["max_tokens"])]
    data = event(body, tokens, first=True)[:-2].replace(b'"index": 0', b'"index": 0, "finish_reason": "length"')
    writer.write(STREAM + http_chunk(data + b"\n\ndata: [DONE]\n\n") + http_chunk(b""))
    await writer.drain()


def run(
    server: FakeServer, of: Trace, plan: LoadPlan = PLAN, progress: Callable[[Progress], None] = lambda _: None
) -> LoadReport:
    with server.serving_in_a_thread():
        facts = ServerFacts(server.url, "m", ServerKind.OTHER, EngineKind.SIMULATED)
        return LoadExperiment(plan, of, range(300, 900), facts, "key", SETTING, progress).run()


def held_until(is_here: Callable[[FakeServer], bool]) -> tuple[FakeServer, list[int]]:
    """A server that answers nobody until then, and the list of those it has waited for in vain."""
    server, here, in_vain = FakeServer(), asyncio.Event(), list[int]()

    async def hold(body: Body, writer: asyncio.StreamWriter) -> None:
        if is_here(server):
            here.set()
        try:
            await asyncio.wait_for(here.wait(), HELD_S)
        except TimeoutError:
            in_vain.append(len(server.bodies))
            here.set()
        await answer(body, writer)

    server.answer = hold
    return server, in_vain


def test_arrivals_do_not_wait_for_answers() -> None:
    server, in_vain = held_until(lambda server: len(server.bodies) >= 20)
    report = run(server, trace(SINGLE))
    assert not in_vain
    assert report.complete
    assert report.why_invalid == ()
    assert report.figures is not None
    assert report.figures.num_answered == len(server.bodies) >= 20
    assert len({tuple(body["prompt"]) for body in server.bodies}) == len(server.bodies), "no prompt comes twice"


def test_a_closed_loop_keeps_so_many_under_way_and_never_more() -> None:
    server, in_vain = held_until(lambda server: server.most_in_flight == 3)

    def until_others_follow(reached: Progress) -> None:
        if reached.num_turns > 3:
            raise KeyboardInterrupt

    plan = replace(PLAN, rate_per_s=None, concurrency=3, duration_s=3600.0)
    report = run(server, trace(SINGLE), plan, until_others_follow)
    assert not in_vain
    assert server.most_in_flight == 3
    assert report.figures is not None
    assert report.figures.num_answered > 3


def test_a_turn_goes_on_with_the_answer_to_the_one_before_and_names_its_session() -> None:
    server = FakeServer(answer)
    session = Session(linked([Turn(6, 3, (0, 1)), Turn(12, 2, (0, 2, 3))], 4))
    report = run(server, trace(session), replace(PLAN, rate_per_s=20.0))
    firsts = {tuple(body["prompt"]) for body in server.bodies if len(body["prompt"]) == 6}
    seconds = [body["prompt"] for body in server.bodies if len(body["prompt"]) == 12]
    assert firsts
    assert {tuple(prompt[:6]) for prompt in seconds} == firsts
    assert all(prompt[6:9] == [1000, 1001, 1002] for prompt in seconds)
    names = {line for head in server.heads for line in head.split("\r\n") if line.startswith("x-session-id")}
    assert len(names) == len(firsts)
    assert "authorization: bearer key" in server.heads[0].lower()
    body = server.bodies[0]
    assert (body["model"], body["max_tokens"], body["stream_options"]) == ("m", 3, {"include_usage": True})
    assert report.figures is not None
    assert report.figures.num_sessions == report.figures.num_trajectories == len(firsts)


def test_a_parent_waits_for_its_sub_agents_which_name_it() -> None:
    server = FakeServer(answer)
    child = Session((Turn(5, 1, (6, 7)),))
    parent = Session(linked([Turn(6, 3, (0, 1)), Turn(12, 2, (0, 2, 3))], 4), (Child(child, 0, 0.0, 1),))
    run(server, trace(parent), replace(PLAN, rate_per_s=None, concurrency=1, duration_s=0.01))
    assert [len(body["prompt"]) for body in server.bodies][:3] == [6, 5, 12]
    names, parents = (
        [line.partition(": ")[2] for line in server.heads[1].split("\r\n") if line.startswith(name)]
        for name in ("x-session-id", "x-parent-session-id")
    )
    assert names == [f"{parents[0]}.0"]


def test_a_session_that_is_refused_asks_no_more() -> None:
    async def refuse(_body: Body, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 429 Too Many Requests\r\nretry-after: 1\r\ncontent-length: 4\r\n\r\nbusy")

    server = FakeServer(refuse)
    report = run(server, trace(Session(linked([Turn(6, 3, (0, 1)), Turn(12, 2, (0, 2, 3))], 4))))
    figures = report.figures
    assert figures is not None
    assert figures.num_refused == figures.num_turns == figures.num_sessions_given_up == len(server.bodies) > 0
    assert figures.ttft_ms is None
    assert figures.slos[0].kept_share == 0
    assert {row.end for row in report.turns} == {End.REFUSED}


def test_an_agent_whose_sub_agent_is_refused_ends_there() -> None:
    async def refuse_children(body: Body, writer: asyncio.StreamWriter) -> None:
        if len(body["prompt"]) == 5:
            writer.write(b"HTTP/1.1 503 Service Unavailable\r\ncontent-length: 4\r\n\r\nbusy")
        else:
            await answer(body, writer)

    server, child = FakeServer(refuse_children), Session((Turn(5, 1, (6, 7)),))
    parent = Session(linked([Turn(6, 3, (0, 1)), Turn(12, 2, (0, 2, 3))], 4), (Child(child, 0, 0.0, 1),))
    figures = run(server, trace(parent), replace(PLAN, rate_per_s=20.0)).figures
    assert figures is not None
    assert {len(body["prompt"]) for body in server.bodies} == {5, 6}
    assert figures.num_sessions_given_up == len(server.bodies)
    assert figures.num_trajectories == 0


def test_a_turn_due_after_the_end_is_not_asked() -> None:
    server = FakeServer(answer)
    session = Session(linked([Turn(6, 3, (0, 1)), Turn(12, 2, (0, 2, 3), pause_s=60.0)], 4))
    plan = replace(PLAN, max_pause_s=60.0)
    figures = run(server, trace(session), plan).figures
    assert figures is not None
    assert {len(body["prompt"]) for body in server.bodies} == {6}
    assert figures.num_sessions_cut_off == len(server.bodies)
    assert figures.num_sessions == 0


def test_a_request_that_takes_too_long_has_failed() -> None:
    async def never(_body: Body, _writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.Event().wait()

    plan = replace(PLAN, rate_per_s=None, concurrency=1, duration_s=0.01, request_timeout_s=0.05)
    report = run(FakeServer(never), trace(SINGLE), plan)
    assert report.figures is not None
    assert report.figures.num_failed == 1
    assert "no complete answer after" in report.errors[0]


def test_what_the_servers_pages_tell_of_its_pools_is_kept() -> None:
    page = (
        "# TYPE vllm:num_requests_running gauge\nvllm:num_requests_running 3.0\n"
        "# TYPE vllm:num_requests_waiting gauge\nvllm:num_requests_waiting 1.0\n"
        "# TYPE vllm:kv_cache_usage_perc gauge\nvllm:kv_cache_usage_perc 0.5\n"
    )
    server = FakeServer(answer, page)

    def until_two_were_asked_for(_: Progress) -> None:
        if server.num_pages > 1:
            raise KeyboardInterrupt

    report = run(server, trace(SINGLE), replace(PLAN, duration_s=3600.0, rate_per_s=20.0), until_two_were_asked_for)
    first = report.pools[0]
    assert (first.pool, first.num_running, first.num_waiting, first.kv_use) == ("engines", 3.0, 1.0, 0.5)


def test_prompts_are_sent_as_text_where_that_is_asked_for() -> None:
    server = FakeServer(answer)
    with server.serving_in_a_thread():
        facts = ServerFacts(server.url, "m", ServerKind.OTHER, EngineKind.SIMULATED)
        LoadExperiment(
            PLAN, trace(SINGLE), range(300, 900), facts, "key", SETTING, lambda _: None, write=lambda ids: f"{len(ids)}"
        ).run()
    assert {body["prompt"] for body in server.bodies} == {"6"}


def test_an_interrupted_run_reports_what_was_measured_until_then() -> None:
    def interrupt(reached: Progress) -> None:
        assert reached.num_turns > 0
        raise KeyboardInterrupt

    report = run(FakeServer(answer), trace(SINGLE), replace(PLAN, duration_s=3600.0, rate_per_s=20.0), interrupt)
    assert not report.complete
    assert report.figures is not None
    assert report.figures.num_answered > 0
    assert report.figures.window_s < 3600


@pytest.mark.parametrize("first", [True, False])
def test_the_generator_is_first_in_line_unless_it_is_told_to_wait_like_others(
    first: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[None] = []

    def note() -> contextlib.AbstractContextManager[None]:
        asked.append(None)
        return contextlib.nullcontext()

    monkeypatch.setattr(cpu, "first_in_line", note)
    run(FakeServer(answer), trace(SINGLE), replace(PLAN, duration_s=0.01, first_in_line=first))
    assert asked == [None] * first
