"""Published files are read into sessions that go on as recorded; what is wrong in a file is said with its place."""

import itertools
import json
from pathlib import Path

import pytest

from bench.trace_files import read
from bench.traces import Session, Trace, TraceError, Trajectory, Turn, arrivals, cut_trace, linked
from tests.unit.bench.traces import agent, request, write_mooncake, write_session, write_sessions


def test_a_turn_keeps_prompt_and_answer_of_the_one_before_where_it_has_grown_by_them(tmp_path: Path) -> None:
    grown = request(9.0, range(1, 8), 10, 4.0)
    first, second = (
        read(write_session(tmp_path / "one.json", [request(0.0, range(1, 6), 64, extra_tokens=9), grown]))
        .trajectories[0]
        .root.turns
    )
    assert (first.keeps_of, first.num_kept_tokens, first.num_prompt_tokens) == (None, 0, 5 * 64 + 9)
    assert (second.keeps_of, second.num_kept_tokens, second.pause_s) == (0, 5 * 64 + 9 + 64, 4.0)
    assert len(first.block_ids) == 6, "the tokens behind the last full block have a block of their own"


def test_without_room_for_the_answer_the_prompt_is_kept_and_else_the_common_blocks() -> None:
    before = Turn(130, 100, (0, 1, 2))
    kept = [
        linked([before, turn], 64)[1].num_kept_tokens
        for turn in (Turn(200, 1, (0, 1, 7, 8)), Turn(200, 1, (0, 9, 9, 9)))
    ]
    assert kept == [130, 64]


def test_a_turn_goes_on_with_the_earlier_one_it_shares_most_with() -> None:
    turns = linked([Turn(192, 1, (0, 1, 2)), Turn(64, 1, (9,)), Turn(256, 1, (0, 1, 2, 3))], 64)
    assert [turn.keeps_of for turn in turns] == [None, None, 0]


def test_blocks_of_tools_and_system_prompt_are_shared_by_files_of_equal_lengths(tmp_path: Path) -> None:
    write_session(tmp_path / "a.json", [request(0.0, [1, 2, 3, 4], 1)])
    write_session(tmp_path / "b.json", [request(0.0, [7, 8, 9, 4], 1)])
    write_session(tmp_path / "c.json", [request(0.0, [1, 2, 3, 4], 1)], system_tokens=128)
    a, b, c = (trajectory.root.turns[0].block_ids for trajectory in read(tmp_path).trajectories)
    assert a[:3] == b[:3]
    assert max(a[:3]) < 0 <= a[3]
    assert c[:2] == a[:2], "tools come first"
    assert c[2] != a[2], "another system prompt is another block"


def test_a_child_starts_after_its_parents_turn_and_the_next_turn_waits_for_it(tmp_path: Path) -> None:
    child = agent(19.0, 9.0, [request(0.0, [5], 10)])
    requests = [request(0.0, [1], 5), request(7.0, [1, 2], 5, 5.0), child, request(21.0, [1, 2, 3], 5, 12.0)]
    root = read(write_session(tmp_path / "one.json", requests)).trajectories[0].root
    (started,) = root.children
    assert (started.after_turn, started.joined_by, started.delay_s) == (1, 2, 1.0)
    assert root.turns[2].pause_s == 2.0, "what is left of the pause after the child's end"
    assert root.num_turns == 4


def test_a_child_that_outlives_its_parent_is_waited_for_by_nobody(tmp_path: Path) -> None:
    requests = [request(0.0, [1], 5), agent(60.0, 57.0, [request(0.0, [5], 10)]), request(9.0, [1, 2], 5, 7.0)]
    root = read(write_session(tmp_path / "one.json", requests)).trajectories[0].root
    assert root.children[0].joined_by is None
    assert root.turns[1].pause_s == 7.0


def test_requests_without_names_are_sessions_by_their_prefixes(tmp_path: Path) -> None:
    common = [0]
    rows = [
        (0, 1100, 10, [*common, 1, 2]),
        (1000, 700, 10, [*common, 3]),
        (5000, 1600, 10, [*common, 1, 4, 5]),
        (6000, 1600, 10, [*common, 1, 6, 7]),
        *((7000 + i, 600, 1, [*common, 100 + i]) for i in range(400)),
    ]
    trace = read(write_mooncake(tmp_path / "t.jsonl", rows))
    sessions = [trajectory.root.turns for trajectory in trace.trajectories]
    first = next(turns for turns in sessions if len(turns) == 2)
    assert [turn.num_prompt_tokens for turn in first] == [1100, 1600]
    assert [turn.arrives_s for turn in first] == [0.0, 5.0]
    # Two full blocks of the first prompt, its tail and its answer.
    assert first[1].num_kept_tokens == 1110
    assert sum(len(turns) for turns in sessions) == len(rows)
    assert len(sessions) == len(rows) - 1, "a system prompt alone makes no session, and a prompt goes on but once"
    assert all(turns[0].block_ids[0] == first[0].block_ids[0] < 0 for turns in sessions)


def test_a_session_ends_before_the_first_turn_that_does_not_fit_the_model(tmp_path: Path) -> None:
    trace = read(write_sessions(tmp_path / "t", 2))
    fits = max(turn.num_tokens for turn in trace.trajectories[0].root.turns[:2])
    cut = cut_trace(trace, fits)
    assert [len(one.root.turns) for one in cut.trajectories] == [2, 1]
    # The last turn of the first; the last two, and both turns of the child in between, of the second.
    assert cut.num_cut_turns == 1 + 2 + 2
    assert cut.trajectories[0].root.children[0].joined_by is None
    assert cut_trace(trace, 10).trajectories == ()


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ({"in": 640}, r"hash_ids of 64 tokens do not fit in=640"),
        ({"out": "many"}, r"out is 'many'"),
        ({"hash_ids": [1, -2]}, r"hash_ids is not a list of block ids"),
        ({"t": float("nan")}, r"t is nan"),
    ],
)
def test_what_is_wrong_is_said_with_its_place(tmp_path: Path, line: dict[str, object], words: str) -> None:
    path = write_session(tmp_path / "one.json", [request(0.0, [1, 2], 5), {**request(9.0, [1, 2], 5), **line}])
    with pytest.raises(TraceError, match=rf"one\.json, requests\[1\]: .*{words}"):
        read(path)


def test_a_wrong_line_of_a_file_of_lines_is_named(tmp_path: Path) -> None:
    path = write_mooncake(tmp_path / "t.jsonl", [(0, 600, 1, [0, 1]), (1, 600, 1, [0])])
    with pytest.raises(TraceError, match="line 2: 1 hash_ids of 512 tokens do not fit input_length 600"):
        read(path)
    path.write_text("{")
    with pytest.raises(TraceError, match="line 1: not JSON"):
        read(path)


def test_a_folder_without_traces_and_one_with_several_say_so(tmp_path: Path) -> None:
    with pytest.raises(TraceError, match="holds neither"):
        read(tmp_path)
    for name in ("a", "b"):
        write_mooncake(tmp_path / f"{name}.jsonl", [(0, 600, 1, [0, 1])])
    with pytest.raises(TraceError, match="holds several traces"):
        read(tmp_path)


def test_a_session_only_of_children_is_refused(tmp_path: Path) -> None:
    path = write_session(tmp_path / "one.json", [agent(9.0, 5.0, [request(0.0, [1], 1)])])
    with pytest.raises(TraceError, match="no request but those of sub-agents"):
        read(path)
    path.write_text(json.dumps({"block_size": 64, "requests": []}))
    with pytest.raises(TraceError, match="requests is not a list of requests"):
        read(path)


def write_azure(path: Path, *rows: str) -> Path:
    path.write_text("\n".join(("TIMESTAMP,ContextTokens,GeneratedTokens", *rows)) + "\n")
    return path


def test_azure_requests_are_sessions_of_their_own(tmp_path: Path) -> None:
    trace = read(write_azure(tmp_path / "a.csv", "2023-11-16 18:17:03,130,10", "2023-11-16 18:17:04,64,0"))
    first, second = (trajectory.root.turns for trajectory in trace.trajectories)
    assert first == (Turn(130, 10, (0, 1, 2)),)
    assert second == (Turn(64, 1, (0,)),)
    assert [trajectory.num_own_ids for trajectory in trace.trajectories] == [3, 1]


@pytest.mark.parametrize(
    ("name", "content", "error"),
    [
        ("a.csv", b"TIMESTAMP,ContextTokens,GeneratedTokens\n", "holds no request"),
        ("a.csv", b"TIMESTAMP,ContextTokens\nx,1\n", "line 2: there is no column GeneratedTokens"),
        ("a.csv", b"TIMESTAMP,ContextTokens,GeneratedTokens\nx,many,1\n", "line 2: ContextTokens is 'many'"),
        ("a.csv", b"TIMESTAMP,ContextTokens,GeneratedTokens\nx,1\n", "line 2: GeneratedTokens is None"),
        ("a.json", b"", "is empty"),
        ("a.jsonl", b"", "is empty"),
        ("a.jsonl", b"\n\n", "holds no request"),
        ("a.bin", b"\xff\xfe\x00", "is no text"),
    ],
)
def test_an_empty_trace_and_a_wrong_format_are_said_in_one_line(
    tmp_path: Path, name: str, content: bytes, error: str
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(TraceError, match=error) as raised:
        read(tmp_path / name)
    assert "\n" not in str(raised.value)


def test_arrivals_keep_their_order_at_every_rate_and_come_at_it() -> None:
    trace = read_many(50)
    slow, fast = (list(itertools.islice(arrivals(trace, rate, "seed"), 1000)) for rate in (1.0, 4.0))
    assert [one for _, one in slow] == [one for _, one in fast]
    assert [at_s for at_s, _ in slow] == pytest.approx([4 * at_s for at_s, _ in fast])
    assert slow[-1][0] == pytest.approx(1000, rel=0.1)
    assert len({one.name for _, one in slow[:50]}) == 50, "each once before any comes again"
    assert next(arrivals(trace, 1.0, "other")) != slow[0]


def read_many(number: int) -> Trace:
    return Trace("t", 64, tuple(Trajectory(str(index), Session((Turn(1, 1, (0,)),)), 1) for index in range(number)))
