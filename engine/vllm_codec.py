"""Owns the opaque parts of the wire that only vLLM's two ends read: sampling parameters and raw logprobs."""

from typing import Any, NamedTuple

import msgspec
from vllm.sampling_params import SamplingParams, SamplingType
from vllm.v1.outputs import LogprobsLists, LogprobsTensors
from vllm.v1.serial_utils import MsgpackDecoder, MsgpackEncoder


class SamplingPayload(msgspec.Struct, array_like=True):
    """What `EngineRequest.sampling` holds: vLLM's parameters and what its grammar needs of the reasoning state."""

    params: SamplingParams
    reasoning_ended: bool | None = None
    reasoning_parser_kwargs: dict[str, Any] | None = None


class LogprobsPayload(NamedTuple):
    """What `TokenDelta.logprobs` holds: raw logprobs of the new tokens and, once, of the prompt."""

    new: LogprobsLists | None = None
    prompt: LogprobsTensors | None = None


def encode_sampling(payload: SamplingPayload) -> bytes:
    return _join(MsgpackEncoder().encode(payload))


def decode_sampling(data: bytes) -> SamplingPayload:
    """Raises msgspec.ValidationError or msgspec.DecodeError on bytes that are no payload."""
    return MsgpackDecoder(SamplingPayload).decode(_split(data))


def encode_logprobs(payload: LogprobsPayload) -> bytes:
    return _join(MsgpackEncoder().encode(payload))


def decode_logprobs(data: bytes) -> LogprobsPayload:
    return MsgpackDecoder(LogprobsPayload).decode(_split(data))


def drop_logprobs(data: bytes, num_tokens: int) -> bytes:
    """The logprobs of a delta without its first `num_tokens` tokens, and without the prompt's."""
    new = decode_logprobs(data).new
    if new is None:
        return encode_logprobs(LogprobsPayload())
    return encode_logprobs(LogprobsPayload(new.slice_request(num_tokens, len(new.logprobs) - num_tokens)))


def _join(frames: Any) -> bytes:
    # vLLM puts large arrays into frames of their own; the worker protocol wants one piece.
    return msgspec.msgpack.encode([bytes(memoryview(frame)) for frame in frames])


def _split(data: bytes) -> list[bytes]:
    return msgspec.msgpack.decode(data, type=list[bytes])


def is_resumable(params: SamplingParams) -> bool:
    """Whether prompt and tokens so far alone decide how an answer goes on (docs/adr/0010).

    Not so with a seeded generator, a grammar, or anything that looks at the answer's earlier tokens: their state would
    start anew on another engine.
    """
    is_greedy = params.sampling_type is SamplingType.GREEDY
    looks_back = (
        params.presence_penalty or params.frequency_penalty or params.repetition_penalty != 1.0
        or params.bad_words or params.repetition_detection or params.thinking_token_budget is not None
    )  # fmt: skip
    return (is_greedy or params.seed is None) and not looks_back and params.structured_outputs is None
