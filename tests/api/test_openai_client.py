"""The official OpenAI client gets what it would get from OpenAI: every parameter, every stream, every error class."""

import json
import math
import re
from collections import Counter
from types import ModuleType
from typing import Any

import openai
import pytest
from openai.types.chat import ChatCompletion
from prometheus_client.parser import text_string_to_metric_families

from tests.api.live import BLOCK_TOKENS, MODEL, Live, unique_text, unique_tokens

QUESTION: list[Any] = [{"role": "user", "content": "What is Baton?"}]
GREEDY: dict[str, Any] = {"model": MODEL, "temperature": 0.0, "max_tokens": 24}
EOS_ID = 1
WEATHER_TOOL: Any = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Get the current weather in a city.",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}


@pytest.fixture(scope="module")
def client(live: Live):
    with openai.OpenAI(base_url=f"{live.url}/v1", api_key="any", max_retries=0, timeout=60) as client:
        yield client


@pytest.fixture(scope="module")
async def async_client(live: Live):
    async with openai.AsyncOpenAI(base_url=f"{live.url}/v1", api_key="any", max_retries=0, timeout=60) as client:
        yield client


def text_of(answer: ChatCompletion, index: int = 0) -> str:
    return answer.choices[index].message.content or ""


def raw_chat(client: openai.OpenAI, **arguments: Any) -> tuple[ChatCompletion, Any]:
    """The parsed answer and the HTTP response around it."""
    response = client.chat.completions.with_raw_response.create(**{**GREEDY, "messages": QUESTION, **arguments})
    return response.parse(), response


# -- chat, completions, responses, models


def test_a_chat_answers_with_its_usage(client):
    answer = client.chat.completions.create(messages=QUESTION, **GREEDY)
    assert text_of(answer)
    assert answer.usage.completion_tokens <= 24
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens


def test_a_streamed_chat_is_the_same_text_in_pieces(client):
    whole = text_of(client.chat.completions.create(messages=QUESTION, **GREEDY))
    chunks = list(client.chat.completions.create(messages=QUESTION, stream=True, **GREEDY))
    pieces = [chunk.choices[0].delta.content or "" for chunk in chunks]
    assert "".join(pieces) == whole
    assert sum(map(bool, pieces)) > 1
    assert chunks[-1].choices[0].finish_reason in ("stop", "length")


async def test_the_async_client_gets_the_same_text_whole_and_in_pieces(client, async_client):
    expected = text_of(client.chat.completions.create(messages=QUESTION, **GREEDY))
    assert text_of(await async_client.chat.completions.create(messages=QUESTION, **GREEDY)) == expected
    stream = await async_client.chat.completions.create(messages=QUESTION, stream=True, **GREEDY)
    assert "".join([chunk.choices[0].delta.content or "" async for chunk in stream]) == expected


def test_the_last_chunk_carries_the_usage_when_asked_and_no_chunk_does_otherwise(client):
    usage = client.chat.completions.create(messages=QUESTION, **GREEDY).usage
    with_usage = {"stream": True, "stream_options": {"include_usage": True}}
    chunks = list(client.chat.completions.create(messages=QUESTION, **with_usage, **GREEDY))
    assert [chunk.usage for chunk in chunks[:-1]] == [None] * (len(chunks) - 1)
    assert chunks[-1].choices == []
    assert chunks[-1].usage.completion_tokens == usage.completion_tokens
    assert chunks[-1].usage.prompt_tokens == usage.prompt_tokens
    plain = client.chat.completions.create(messages=QUESTION, stream=True, **GREEDY)
    assert all(chunk.usage is None for chunk in plain)


def test_a_completion_answers_whole_and_in_pieces(client):
    whole = client.completions.create(prompt="Prefill is", **GREEDY).choices[0].text
    stream = client.completions.create(prompt="Prefill is", stream=True, **GREEDY)
    assert whole
    assert "".join(chunk.choices[0].text for chunk in stream) == whole


def test_a_completion_takes_token_ids_and_several_prompts_each_with_a_receipt(client, live):
    response = client.completions.with_raw_response.create(prompt=[[5, 6, 7], [8, 9]], **GREEDY)
    assert [choice.index for choice in response.parse().choices] == [0, 1]
    request_id = response.headers["x-baton-request-id"]
    assert live.receipt(request_id)["outcome"]["prompt_tokens"] == 3
    assert live.receipt(f"{request_id}-1")["outcome"]["prompt_tokens"] == 2


def test_a_response_answers_whole_and_in_typed_events(client):
    arguments = {"model": MODEL, "input": "What is Baton?", "temperature": 0.0, "max_output_tokens": 24}
    whole = client.responses.create(**arguments)
    assert whole.output_text
    events = list(client.responses.create(stream=True, **arguments))
    assert events[0].type == "response.created"
    assert events[-1].type in ("response.completed", "response.incomplete")
    assert "".join(event.delta for event in events if event.type == "response.output_text.delta") == whole.output_text


async def test_the_async_client_gets_a_response(async_client):
    answer = await async_client.responses.create(model=MODEL, input="What is decode?", max_output_tokens=16)
    assert answer.usage.output_tokens <= 16


def test_a_response_can_be_plain_dialogue_with_instructions(client):
    turns = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hello."}, *QUESTION]
    answer = client.responses.create(model=MODEL, input=turns, instructions="Be brief.", max_output_tokens=8)
    assert answer.usage.input_tokens > 8


def test_the_models_are_the_one_that_is_served(client):
    assert [model.id for model in client.models.list()] == [MODEL]


# -- sampling parameters


def test_several_choices_share_one_hand_off(client, live):
    live.quiet()
    before = live.load("decode")
    answer, response = raw_chat(
        client, messages=[{"role": "user", "content": unique_text(60)}], n=4, temperature=1.0, max_tokens=8
    )
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
    live.quiet()
    receipt, after = live.receipt(response), live.load("decode")
    blocks = math.ceil(answer.usage.prompt_tokens / BLOCK_TOKENS)
    block_bytes = live.replicas("decode")[0]["info"]["kv_block_bytes"]
    assert receipt["request"]["num_choices"] == 4
    assert receipt["placement"]["prefill"] is not None
    assert receipt["outcome"]["kv_blocks_moved"] == blocks
    assert after["kv_transfers_total"] - before["kv_transfers_total"] == 1
    assert after["kv_bytes_received_total"] - before["kv_bytes_received_total"] == blocks * block_bytes


def test_several_choices_stream_side_by_side(client):
    stream = client.chat.completions.create(messages=QUESTION, n=3, stream=True, **{**GREEDY, "temperature": 1.0})
    finished = [choice.index for chunk in stream for choice in chunk.choices if choice.finish_reason]
    assert sorted(finished) == [0, 1, 2]


def test_chat_logprobs_name_each_token_and_its_rivals(client):
    answer = client.chat.completions.create(messages=QUESTION, logprobs=True, top_logprobs=3, **GREEDY)
    entries = answer.choices[0].logprobs.content
    assert len(entries) == answer.usage.completion_tokens
    for entry in entries:
        assert len(entry.top_logprobs) == 3
        assert entry.logprob == max(rival.logprob for rival in entry.top_logprobs)
        assert sum(math.exp(rival.logprob) for rival in entry.top_logprobs) <= 1.0001


def test_completion_logprobs_are_the_same_streamed(client):
    arguments = {**GREEDY, "prompt": "Decode is", "logprobs": 2}
    whole = client.completions.create(**arguments).choices[0].logprobs
    streamed = [chunk.choices[0].logprobs for chunk in client.completions.create(stream=True, **arguments)]
    values = [value for piece in streamed if piece for value in piece.token_logprobs]
    assert values == pytest.approx(whole.token_logprobs, abs=2e-3)


def test_a_stop_string_ends_the_text_before_it(client, live):
    whole = text_of(client.chat.completions.create(messages=QUESTION, **GREEDY))
    stop = whole[len(whole) // 2 : len(whole) // 2 + 3]
    answer, response = raw_chat(client, stop=[stop])
    assert text_of(answer) == whole[: whole.index(stop)]
    assert answer.choices[0].finish_reason == "stop"
    assert live.receipt(response)["outcome"]["status"] == "finished"
    live.quiet()


def test_a_seed_repeats_the_text_and_another_seed_does_not(client):
    def text(seed: int) -> str:
        return text_of(
            client.chat.completions.create(
                messages=QUESTION, model=MODEL, temperature=2.0, seed=seed, max_tokens=32,
                extra_body={"ignore_eos": True},
            )
        )  # fmt: skip

    assert text(11) == text(11)
    assert len({text(11), text(12), text(13)}) > 1


def test_penalties_make_the_text_repeat_less(client):
    def most_repeated(**penalties: float) -> int:
        answer = client.completions.create(
            prompt="a a a a", model=MODEL, temperature=0.0, max_tokens=120,
            extra_body={"ignore_eos": True, "return_token_ids": True}, **penalties,
        )  # fmt: skip
        return Counter(answer.choices[0].model_extra["token_ids"]).most_common(1)[0][1]

    assert most_repeated(frequency_penalty=2.0, presence_penalty=2.0) < most_repeated()


def test_min_tokens_holds_the_end_back_and_ignore_eos_never_ends(client):
    eager = {**GREEDY, "logit_bias": {str(EOS_ID): 100}, "max_tokens": 12}
    assert client.completions.create(prompt="Hello", **eager).usage.completion_tokens == 1
    held = client.completions.create(prompt="Hello", extra_body={"min_tokens": 6}, **eager)
    assert held.usage.completion_tokens == 7
    endless = client.completions.create(prompt="Hello", extra_body={"ignore_eos": True}, **eager)
    assert endless.usage.completion_tokens == 12
    assert endless.choices[0].finish_reason == "length"


@pytest.mark.parametrize("asked", [{"echo": True, "logprobs": 1}, {"extra_body": {"prompt_logprobs": 1}}])
def test_logprobs_of_the_prompt_are_read_by_decode_alone(client, live, asked):
    prompt = unique_tokens(70)
    asked = asked | {"extra_body": {"ignore_eos": True, **asked.get("extra_body", {})}}
    response = client.completions.with_raw_response.create(prompt=prompt, **{**GREEDY, "max_tokens": 4}, **asked)
    choice = response.parse().choices[0]
    receipt = live.receipt(response)
    assert receipt["placement"]["prefill"] is None
    assert receipt["outcome"]["decode_computed_tokens"] == 70
    if "echo" in asked:
        assert len(choice.logprobs.token_logprobs) == 74
    else:
        assert len(choice.model_extra["prompt_logprobs"]) == 70


def test_usage_says_which_tokens_of_the_prompt_were_cached(client, live):
    messages = [{"role": "user", "content": unique_text(60)}]
    first, _ = raw_chat(client, messages=messages, max_tokens=2)
    again, response = raw_chat(client, messages=messages, max_tokens=2)
    prompt_tokens = first.usage.prompt_tokens
    assert prompt_tokens > 2 * BLOCK_TOKENS
    assert first.usage.prompt_tokens_details.cached_tokens == 0
    assert again.usage.prompt_tokens_details.cached_tokens == (prompt_tokens - 1) // BLOCK_TOKENS * BLOCK_TOKENS
    assert live.receipt(response)["outcome"]["reused_tokens"] == again.usage.prompt_tokens_details.cached_tokens


# -- structured output

# Values only: where a schema leaves room for white space, an untaught prompt may fill the whole answer with it.
VALUES: dict[str, Any] = {"enum": ["prefill", "decode", 7]}


@pytest.mark.parametrize("stream", [False, True])
def test_a_json_schema_is_obeyed(client, stream):
    response_format = {"type": "json_schema", "json_schema": {"name": "answer", "schema": VALUES}}
    arguments = {**GREEDY, "temperature": 2.0, "response_format": response_format}
    if stream:
        chunks = client.chat.completions.create(messages=QUESTION, stream=True, **arguments)
        text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    else:
        text = text_of(client.chat.completions.create(messages=QUESTION, **arguments))
    assert json.loads(text) in VALUES["enum"]


def test_a_response_obeys_a_json_schema(client):
    text_format = {"format": {"type": "json_schema", "name": "answer", "schema": VALUES}}
    answer = client.responses.create(model=MODEL, input="What is Baton?", text=text_format, temperature=2.0)
    assert json.loads(answer.output_text) in VALUES["enum"]


def test_a_json_object_is_json(client):
    messages = [{"role": "user", "content": "Describe Baton as JSON."}]
    answer = client.chat.completions.create(
        messages=messages, response_format={"type": "json_object"}, **{**GREEDY, "max_tokens": 256}
    )
    assert isinstance(json.loads(text_of(answer)), dict)


def test_a_regular_expression_and_a_choice_are_obeyed(client):
    def ask(**constraint: Any) -> str:
        answer = client.chat.completions.create(
            messages=QUESTION, extra_body={"structured_outputs": constraint}, **GREEDY
        )
        return text_of(answer)

    assert re.fullmatch(r"[a-c]{3}-\d{2}", ask(regex=r"[a-c]{3}-\d{2}"))
    assert ask(choice=["prefill", "decode"]) in ("prefill", "decode")


def test_the_shipped_model_answers_in_json_as_it_has_learnt(client, dialogues: ModuleType):
    for learnt in dialogues.JSON_ANSWERS:
        schema = {"type": "json_schema", "json_schema": {"name": "answer", "schema": dict(learnt.schema)}}
        messages = [{"role": "user", "content": learnt.prompts[0]}]
        answer = client.chat.completions.create(
            messages=messages, response_format=schema, **{**GREEDY, "max_tokens": 128}
        )
        assert json.loads(text_of(answer)) == dict(learnt.answer), learnt.name


# -- tools


def test_tool_choice_auto_lets_the_model_decide(client, dialogues: ModuleType):
    tools = list(dialogues.TOOL_SCHEMAS)
    asking = [{"role": "user", "content": "What is the weather in Paris?"}]
    answer = client.chat.completions.create(messages=asking, tools=tools, tool_choice="auto", **GREEDY)
    (call,) = answer.choices[0].message.tool_calls
    assert (call.function.name, json.loads(call.function.arguments)) == ("get_weather", {"city": "Paris"})
    assert answer.choices[0].finish_reason == "tool_calls"
    chatting = client.chat.completions.create(messages=QUESTION, tools=tools, tool_choice="auto", **GREEDY)
    assert not chatting.choices[0].message.tool_calls


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "get_weather"}}])
def test_a_required_or_named_tool_is_called(client, choice, stream):
    arguments: dict[str, Any] = {**GREEDY, "max_tokens": 200, "tools": [WEATHER_TOOL], "tool_choice": choice}
    messages = [{"role": "user", "content": "What is the weather in Paris?"}]
    if stream:
        deltas = [
            chunk.choices[0].delta.tool_calls[0].function
            for chunk in client.chat.completions.create(messages=messages, stream=True, **arguments)
            if chunk.choices and chunk.choices[0].delta.tool_calls
        ]
        name = "".join(delta.name or "" for delta in deltas)
        value = "".join(delta.arguments or "" for delta in deltas)
    else:
        answer = client.chat.completions.create(messages=messages, **arguments)
        call = answer.choices[0].message.tool_calls[0]
        name, value = call.function.name, call.function.arguments
    assert name == "get_weather"
    assert json.loads(value) == {"city": "Paris"}


def test_tool_choice_none_calls_no_tool(client):
    answer = client.chat.completions.create(messages=QUESTION, tools=[WEATHER_TOOL], tool_choice="none", **GREEDY)
    assert not answer.choices[0].message.tool_calls


def run_agent(client: openai.OpenAI, dialogues: ModuleType, task: str, stream: bool) -> tuple[list, str]:
    """Runs the tools the model asks for until it answers; returns every turn's calls, and the answer."""
    messages: list[Any] = [{"role": "user", "content": task}]
    turns = []
    for _ in range(10):
        arguments = {**GREEDY, "max_tokens": 160, "messages": messages, "tools": list(dialogues.TOOL_SCHEMAS)}
        message = streamed_message(client, arguments) if stream else whole_message(client, arguments)
        messages.append(message)
        if not message.get("tool_calls"):
            return turns, message["content"]
        turns.append([])
        for call in message["tool_calls"]:
            name, values = call["function"]["name"], json.loads(call["function"]["arguments"])
            turns[-1].append((name, values))
            result = dialogues.run_canned_tool(name, values)
            messages.append({"role": "tool", "tool_call_id": call["id"], "content": result})
    raise AssertionError(f"no answer after {turns}")


def whole_message(client: openai.OpenAI, arguments: dict) -> dict:
    return client.chat.completions.create(**arguments).choices[0].message.model_dump(exclude_none=True)


def streamed_message(client: openai.OpenAI, arguments: dict) -> dict:
    with client.chat.completions.stream(**arguments) as stream:
        return (
            stream.get_final_completion()
            .choices[0]
            .message.model_dump(
                exclude_none=True,
                exclude={"parsed": True, "tool_calls": {"__all__": {"function": {"parsed_arguments"}}}},
            )
        )


@pytest.mark.parametrize("stream", [False, True])
def test_an_agent_loops_over_its_tools_for_five_turns_and_more(client, live, dialogues: ModuleType, stream):
    for script in dialogues.AGENT_SCRIPTS:
        turns, answer = run_agent(client, dialogues, script.tasks[0], stream)
        assert turns == [[(call.tool, call.arguments) for call in step.calls] for step in script.steps], script.name
        assert answer == script.final_answer
        assert len(turns) + 1 >= 5
    live.quiet()


def test_parallel_tool_calls_come_in_one_turn(client, dialogues: ModuleType):
    script = dialogues.PARALLEL_SCRIPT
    turns, answer = run_agent(client, dialogues, script.tasks[0], stream=False)
    assert [len(turn) for turn in turns] == [2]
    assert answer == script.final_answer


# -- errors


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("wrong", "error", "param"),
    [
        ({"model": "gpt-4"}, openai.NotFoundError, "model"),
        ({"temperature": -1}, openai.BadRequestError, "temperature"),
        ({"max_tokens": 0}, openai.BadRequestError, "max_tokens"),
        ({"logit_bias": {"999999": 1}}, openai.BadRequestError, "logit_bias"),
        ({"tool_choice": "required"}, openai.BadRequestError, "tool_choice"),
        ({"extra_body": {"kv_transfer_params": {"do_remote_prefill": True}}}, openai.BadRequestError,
         "kv_transfer_params"),
        ({"store": True}, openai.BadRequestError, "store"),
    ],
)  # fmt: skip
def test_errors_come_as_the_clients_own_classes(client, wrong, error, param, stream):
    with pytest.raises(error) as caught:
        client.chat.completions.create(**{**GREEDY, "messages": QUESTION, "stream": stream, **wrong})
    assert caught.value.param == param
    assert caught.value.body["message"]


def test_a_body_that_is_too_large_is_a_413_of_the_client(client):
    with pytest.raises(openai.APIStatusError) as caught:
        client.completions.create(model=MODEL, prompt="x" * 300_000)
    assert caught.value.status_code == 413


def test_an_unknown_route_is_a_not_found_error_of_the_client(client):
    with pytest.raises(openai.NotFoundError):
        client.embeddings.create(model=MODEL, input="Hello")


# -- the rest


def test_tokenize_and_detokenize_are_each_others_inverse(live):
    text = "Prefill reads, decode writes: 12 * 34 = 408."
    body = {"model": MODEL, "prompt": text, "add_special_tokens": False}
    tokens = live.http.post("/tokenize", json=body).json()
    assert tokens["count"] == len(tokens["tokens"]) > 5
    back = live.http.post("/detokenize", json={"model": MODEL, "tokens": tokens["tokens"]}).json()
    assert back["prompt"] == text


def test_tokenize_counts_a_chat_as_the_chat_route_does(client, live):
    counted = live.http.post("/tokenize", json={"model": MODEL, "messages": QUESTION}).json()["count"]
    answer = client.chat.completions.create(messages=QUESTION, **GREEDY)
    assert answer.usage.prompt_tokens == counted


def test_health_answers_200(live):
    assert live.http.get("/health").status_code == 200


def test_metrics_are_prometheus_text_and_count_requests(client, live):
    def finished() -> float:
        response = live.http.get("/metrics")
        assert response.headers["content-type"].startswith("text/plain")
        samples = [s for family in text_string_to_metric_families(response.text) for s in family.samples]
        return sum(sample.value for sample in samples if sample.name == "vllm:request_success_total")

    before = finished()
    client.chat.completions.create(messages=QUESTION, **GREEDY)
    assert finished() == before + 1


def test_a_receipt_that_is_unknown_is_404_in_openais_shape(live):
    response = live.http.get("/baton/receipts/never-seen")
    assert response.status_code == 404
    assert response.json()["error"]["code"] == 404
