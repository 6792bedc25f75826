"""The official Anthropic client gets what it would get from Anthropic: messages, streams, tools, counts, errors."""

from types import ModuleType
from typing import Any

import anthropic
import pytest

from tests.api.live import MODEL, Live, is_anthropic_error, unique_text

QUESTION: list[Any] = [{"role": "user", "content": "What is Baton?"}]
# This client has no temperature of its own any more.
GREEDY: dict[str, Any] = {"model": MODEL, "max_tokens": 24, "extra_body": {"temperature": 0.0}}


@pytest.fixture(scope="module")
def client(live: Live):
    with anthropic.Anthropic(base_url=live.url, api_key="any", max_retries=0, timeout=60) as client:
        yield client


@pytest.fixture(scope="module")
async def async_client(live: Live):
    async with anthropic.AsyncAnthropic(base_url=live.url, api_key="any", max_retries=0, timeout=60) as client:
        yield client


def text_of(message: anthropic.types.Message) -> str:
    return "".join(block.text for block in message.content if block.type == "text")


def test_a_message_answers_with_its_usage(client):
    answer = client.messages.create(messages=QUESTION, **GREEDY)
    assert answer.role == "assistant"
    assert text_of(answer)
    assert answer.stop_reason in ("end_turn", "max_tokens")
    assert 0 < answer.usage.output_tokens <= 24


def test_a_streamed_message_is_the_same_text_in_pieces(client):
    whole = client.messages.create(messages=QUESTION, **GREEDY)
    with client.messages.stream(messages=QUESTION, **GREEDY) as stream:
        pieces = list(stream.text_stream)
        final = stream.get_final_message()
    assert "".join(pieces) == text_of(whole) == text_of(final)
    assert len(pieces) > 1
    assert final.stop_reason == whole.stop_reason
    assert final.usage.output_tokens == whole.usage.output_tokens


async def test_the_async_client_gets_the_same_text_whole_and_in_pieces(client, async_client):
    expected = text_of(client.messages.create(messages=QUESTION, **GREEDY))
    assert text_of(await async_client.messages.create(messages=QUESTION, **GREEDY)) == expected
    async with async_client.messages.stream(messages=QUESTION, **GREEDY) as stream:
        assert "".join([piece async for piece in stream.text_stream]) == expected


def test_a_stop_sequence_ends_the_text_before_it(client):
    whole = text_of(client.messages.create(messages=QUESTION, **GREEDY))
    stop = whole[len(whole) // 2 : len(whole) // 2 + 3]
    answer = client.messages.create(messages=QUESTION, stop_sequences=[stop], **GREEDY)
    assert text_of(answer) == whole[: whole.index(stop)]


def test_a_system_prompt_is_read(client):
    without = client.messages.create(messages=QUESTION, **GREEDY).usage.input_tokens
    answer = client.messages.create(messages=QUESTION, system="Answer in one sentence.", **GREEDY)
    assert answer.usage.input_tokens > without


def test_usage_says_which_tokens_were_read_from_the_cache(client):
    messages = [{"role": "user", "content": unique_text(60)}]
    first = client.messages.create(messages=messages, **GREEDY).usage
    again = client.messages.create(messages=messages, **GREEDY).usage
    assert not first.cache_read_input_tokens
    assert again.cache_read_input_tokens >= 64


def test_count_tokens_counts_what_a_message_takes(client):
    counted = client.messages.count_tokens(model=MODEL, messages=QUESTION)
    assert counted.input_tokens == client.messages.create(messages=QUESTION, **GREEDY).usage.input_tokens


@pytest.mark.parametrize("stream", [False, True])
def test_an_agent_loops_over_its_tools_for_five_turns_and_more(client, live, dialogues: ModuleType, stream):
    tools: list[Any] = [
        {"name": s["function"]["name"], "description": s["function"]["description"],
         "input_schema": s["function"]["parameters"]}
        for s in dialogues.TOOL_SCHEMAS
    ]  # fmt: skip
    for script in dialogues.AGENT_SCRIPTS:
        messages: list[Any] = [{"role": "user", "content": script.tasks[0]}]
        turns = []
        while True:
            arguments = {**GREEDY, "max_tokens": 160, "messages": messages, "tools": tools}
            if stream:
                with client.messages.stream(**arguments) as events:
                    answer = events.get_final_message()
            else:
                answer = client.messages.create(**arguments)
            calls = [block for block in answer.content if block.type == "tool_use"]
            if not calls:
                break
            assert answer.stop_reason == "tool_use"
            turns.append([(call.name, call.input) for call in calls])
            assert len(turns) <= len(script.steps), turns
            results = [
                {"type": "tool_result", "tool_use_id": call.id,
                 "content": dialogues.run_canned_tool(call.name, call.input)}
                for call in calls
            ]  # fmt: skip
            blocks = [block.model_dump(exclude_none=True, include={"type", "text", "id", "name", "input"})
                      for block in answer.content if block.type == "tool_use" or block.text]  # fmt: skip
            messages += [{"role": "assistant", "content": blocks}, {"role": "user", "content": results}]
        assert turns == [[(call.tool, call.arguments) for call in step.calls] for step in script.steps], script.name
        assert text_of(answer) == script.final_answer
        assert len(turns) + 1 >= 5
    live.quiet()


@pytest.mark.parametrize("choice", [{"type": "any"}, {"type": "tool", "name": "get_weather"}])
def test_a_required_or_named_tool_is_called(client, choice):
    schema = {"type": "object", "properties": {"city": {"enum": ["Paris", "Rome"]}}, "required": ["city"]}
    answer = client.messages.create(
        messages=[{"role": "user", "content": "What is the weather in Paris?"}],
        tools=[{"name": "get_weather", "input_schema": schema}], tool_choice=choice, **{**GREEDY, "max_tokens": 200},
    )  # fmt: skip
    call = next(block for block in answer.content if block.type == "tool_use")
    assert call.name == "get_weather"
    assert call.input["city"] in ("Paris", "Rome")


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("wrong", "error"),
    [
        ({"model": "another-model"}, anthropic.NotFoundError),
        ({"max_tokens": 0}, anthropic.BadRequestError),
        ({"max_tokens": 1_000_000}, anthropic.BadRequestError),
        ({"extra_body": {"temperature": -1}}, anthropic.BadRequestError),
        ({"messages": []}, anthropic.BadRequestError),
        ({"tools": [{"name": "f", "input_schema": {}}], "tool_choice": {"type": "tool", "name": "g"}},
         anthropic.BadRequestError),
        ({"extra_body": {"kv_transfer_params": {"do_remote_prefill": True}}}, anthropic.BadRequestError),
        ({"extra_body": {"output_config": {"format": {"type": "json_schema", "schema": {"type": "nonsense"}}}}},
         anthropic.BadRequestError),
    ],
)  # fmt: skip
def test_errors_come_as_the_clients_own_classes_in_anthropics_shape(client, wrong, error, stream):
    with pytest.raises(error) as caught:
        client.messages.create(**{**GREEDY, "messages": QUESTION, "stream": stream, **wrong})
    assert is_anthropic_error(caught.value.body)


def test_a_body_that_is_too_large_is_a_413_in_anthropics_shape(client):
    messages = [{"role": "user", "content": "x" * 300_000}]
    with pytest.raises(anthropic.APIStatusError) as caught:
        client.messages.create(messages=messages, **GREEDY)
    assert caught.value.status_code == 413
    assert is_anthropic_error(caught.value.body)


def test_after_the_errors_the_server_is_unharmed(live):
    live.is_unharmed()
