"""What agents ask: conversations that only grow, equal work in every block, nothing that another block has cached."""

from itertools import pairwise

from bench.agent_asks import PAUSE_S, START_WITHIN_S, TURNS, Agent, ToolCall, body, shared_messages


def run(agent: Agent, calls: list[ToolCall] | None = None) -> list[list[dict[str, object]]]:
    """What the agent asked in each turn, if the model answers the same to all."""
    asked = []
    while not agent.has_ended:
        asked.append(list(agent.messages))
        assert PAUSE_S[0] <= agent.took("an answer", calls or []) <= PAUSE_S[1]
    return asked


def test_each_turn_begins_with_the_one_before_and_what_the_model_said_to_it() -> None:
    agent = Agent(3, "a", 1)
    turns = run(agent)
    assert TURNS[0] <= len(turns) <= TURNS[1]
    for before, after in pairwise(turns):
        assert after[: len(before)] == before
        assert after[len(before)] == {"role": "assistant", "content": "an answer"}


def test_a_called_tool_answers_its_call() -> None:
    agent = Agent(0, "a", 1)
    agent.took("", [ToolCall("c1", "get_weather", '{"city": "Oslo"}'), ToolCall("c2", "calculator", "{}")])
    answer, *results = agent.messages[2:]
    assert [call["id"] for call in answer["tool_calls"]] == ["c1", "c2"]
    assert [(result["role"], result["tool_call_id"]) for result in results] == [("tool", "c1"), ("tool", "c2")]


def test_blocks_differ_in_the_first_words_and_in_nothing_else() -> None:
    one, other = (run(Agent(5, name, 7)) for name in ("one", "two"))
    assert len(one) == len(other)
    firsts = {turn[0]["content"] for turns in (one, other) for turn in turns}
    assert sorted(str(first)[:10] for first in firsts) == ["Block one.", "Block two."]
    assert [turn[1:] for turn in one] == [turn[1:] for turn in other]
    assert one[0][0] == shared_messages("one", 7)[0]


def test_agents_of_a_block_share_its_beginning_and_have_tasks_and_times_of_their_own() -> None:
    agents = [Agent(number, "a", 1) for number in range(20)]
    assert len({str(agent.messages[0]) for agent in agents}) == 1
    assert len({str(agent.messages[1]) for agent in agents}) == 20
    assert len({agent.session for agent in agents}) == 20
    assert all(0 <= agent.start_s <= START_WITHIN_S for agent in agents)
    assert len({agent.num_turns for agent in agents}) > 1


def test_an_answer_is_bounded() -> None:
    assert body([], 5)["max_tokens"] == 5
