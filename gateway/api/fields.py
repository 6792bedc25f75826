"""Owns the allow-list of what clients may send: body fields, headers and routes. Pure.

Every field that vLLM's request models know is here, either allowed or refused with a reason; a contract test compares
the lists with vLLM's models, so that a new field of a new version cannot slip through. Fields that vLLM does not know
are dropped before vLLM sees them.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

_SAMPLING = {
    "allowed_token_ids", "bad_words", "frequency_penalty", "ignore_eos", "include_stop_str_in_output",
    "length_penalty", "logit_bias", "logprob_token_ids", "logprobs", "max_tokens", "min_p", "min_tokens", "n",
    "presence_penalty", "prompt_logprobs", "repetition_detection", "repetition_penalty", "seed",
    "skip_special_tokens", "spaces_between_special_tokens", "stop", "stop_token_ids", "structured_outputs",
    "temperature", "thinking_token_budget", "top_k", "top_p", "truncate_prompt_tokens", "truncation_side",
}  # fmt: skip
_OUTPUT = {
    "echo", "model", "response_format", "return_prompt_text", "return_token_ids", "return_token_offsets",
    "return_tokens_as_token_ids", "session_id", "stream", "stream_interval", "stream_options", "user",
}  # fmt: skip
_CHAT = {
    "add_generation_prompt", "add_special_tokens", "chat_template_kwargs", "continue_final_message",
    "include_reasoning", "max_completion_tokens", "messages", "parallel_tool_calls", "reasoning_effort",
    "tool_choice", "tools", "top_logprobs",
}  # fmt: skip

_TRANSFER = "is set by the gateway; clients cannot reach the KV-transfer layer"
_INTERNAL = "is set by the gateway"
_MULTIMODAL = "is for multimodal input, which Baton does not serve yet"
REFUSED: Mapping[str, str] = {
    "background": "is not supported: Baton keeps no responses; use stream instead",
    "cache_salt": _INTERNAL,
    "chat_template": "is not taken from requests; the operator sets it in the configuration",
    "documents": "is not supported; put documents into messages",
    "ec_transfer_params": _TRANSFER,
    "enable_response_messages": "is not supported",
    "kv_transfer_params": _TRANSFER,
    "media_io_kwargs": _MULTIMODAL,
    "mm_payload": _MULTIMODAL,
    "mm_processor_kwargs": _MULTIMODAL,
    "previous_input_messages": "is not supported: Baton keeps no responses; send the whole conversation",
    "previous_response_id": "is not supported: Baton keeps no responses; send the whole conversation",
    "priority": "above the default is not allowed",
    "prompt_embeds": "is not supported; send text or token ids",
    "request_id": "is set by the gateway; send the X-Request-Id header instead",
    "return_mm_kwargs": _MULTIMODAL,
    "routed_experts_prompt_start": "is not supported",
    "store": "is not supported: Baton keeps no responses",
    "use_beam_search": "is not supported",
    "vllm_xargs": "is not allowed: engine arguments are set by the gateway",
    "watermarking": _INTERNAL,
}

# What a refused field may hold without being refused: it asks for nothing.
_HARMLESS: Mapping[str, tuple[Any, ...]] = {
    "background": (False,), "enable_response_messages": (False,), "priority": (0,), "store": (False,),
    "use_beam_search": (False,), "return_mm_kwargs": (False,),
}  # fmt: skip

_SHAPES: Mapping[str, type] = {
    "messages": list, "response_format": dict, "structured_outputs": dict, "text": dict, "tools": list,
}  # fmt: skip
_NAMES = {dict: "an object", list: "a list"}

ALLOWED: Mapping[str, frozenset[str]] = {
    "/v1/chat/completions": frozenset(_SAMPLING | _OUTPUT | _CHAT),
    "/v1/completions": frozenset(
        (_SAMPLING | _OUTPUT | {"add_special_tokens", "prompt", "suffix"}) - {"return_prompt_text"}
    ),
    "/v1/responses": frozenset(
        {
            "chat_template_kwargs",
            "frequency_penalty",
            "ignore_eos",
            "include",
            "include_reasoning",
            "include_stop_str_in_output",
            "input",
            "instructions",
            "logit_bias",
            "max_output_tokens",
            "max_tool_calls",
            "metadata",
            "min_p",
            "model",
            "parallel_tool_calls",
            "presence_penalty",
            "prompt",
            "prompt_cache_key",
            "reasoning",
            "repetition_penalty",
            "seed",
            "service_tier",
            "session_id",
            "skip_special_tokens",
            "stop",
            "stop_token_ids",
            "stream",
            "structured_outputs",
            "temperature",
            "text",
            "tool_choice",
            "tools",
            "top_k",
            "top_logprobs",
            "top_p",
            "truncation",
            "user",
        }
    ),
    "/v1/messages": frozenset(
        {
            "chat_template_kwargs",
            "max_tokens",
            "messages",
            "metadata",
            "model",
            "output_config",
            "stop_sequences",
            "stream",
            "system",
            "temperature",
            "thinking",
            "tool_choice",
            "tools",
            "top_k",
            "top_p",
        }
    ),
    "/v1/messages/count_tokens": frozenset(
        {"chat_template_kwargs", "messages", "model", "output_config", "system", "thinking", "tool_choice", "tools"}
    ),
    "/tokenize": frozenset(
        {
            "add_generation_prompt",
            "add_special_tokens",
            "chat_template_kwargs",
            "continue_final_message",
            "messages",
            "model",
            "prompt",
            "return_token_strs",
            "tools",
        }
    ),
    "/detokenize": frozenset({"model", "tokens"}),
}

ROUTES: frozenset[tuple[str, str]] = frozenset(
    {("POST", path) for path in ALLOWED}
    | {
        ("GET", "/health"),
        ("GET", "/metrics"),
        ("GET", "/v1/models"),
        ("GET", "/baton/status"),
        ("GET", "/baton/policies"),
        ("GET", "/baton/receipts/{request_id}"),
    }
)

_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,128}")


@dataclass(frozen=True, slots=True)
class Refused:
    """Why a request is not let through: becomes a 400."""

    message: str
    param: str | None = None


def check_headers(headers: Mapping[str, str]) -> Refused | None:
    """Headers (lower-case names) that would steer an engine are refused."""
    if "x-data-parallel-rank" in headers:
        return Refused("the header X-data-parallel-rank is not allowed: the gateway chooses the engine")
    if headers.get("x-vllm-priority", "0") != "0":
        return Refused("the header X-Vllm-Priority above the default is not allowed")
    request_id = headers.get("x-request-id")
    if request_id is not None and not _REQUEST_ID.fullmatch(request_id):
        return Refused("the header X-Request-Id must be 1 to 128 letters, digits, '.', '_' or '-'")
    return None


def check_body(path: str, body: Mapping[str, Any], max_choices: int) -> dict[str, Any] | Refused:
    """The body with nothing but allowed fields, or why it is refused."""
    for name, reason in REFUSED.items():
        value = body.get(name)
        if name == "vllm_xargs" and _is_agentic(value):
            continue
        if value is not None and not any(value is h or (type(value) is int and value == h) for h in _harmless(name)):
            return Refused(f"{name} {reason}", name)
    if refused := _check_shapes(path, body):
        return refused
    choices = body.get("n")
    if _as_number(choices) > max_choices:
        return Refused(f"n is too large; at most {max_choices} choices are allowed", "n")
    prompt = body.get("prompt")
    if isinstance(prompt, list) and prompt and not isinstance(prompt[0], int) and len(prompt) > max_choices:
        return Refused(f"prompt holds {len(prompt)} prompts; at most {max_choices} are allowed", "prompt")
    allowed = ALLOWED[path]
    kept = {name: value for name, value in body.items() if name in allowed}
    if path == "/v1/responses":
        kept["store"] = False
    return kept


def _is_agentic(xargs: Any) -> bool:
    """Whether engine arguments hold nothing but what agents say of themselves: that is read, and goes no further."""
    return isinstance(xargs, dict) and list(xargs) == ["agentic_context"]


def _harmless(name: str) -> tuple[Any, ...]:
    return _HARMLESS.get(name, ())


def _check_shapes(path: str, body: Mapping[str, Any]) -> Refused | None:
    """Refuses what vLLM's own validators look into before they know that it has the right type."""
    for name, expected in _SHAPES.items():
        value = body.get(name)
        if value is not None and not isinstance(value, expected):
            return Refused(f"{name} must be {_NAMES[expected]}", name)
    if path == "/v1/chat/completions":
        for position, tool in enumerate(body.get("tools") or ()):
            function = tool.get("function") if isinstance(tool, dict) else None
            if not isinstance(function, dict) or not isinstance(function.get("name"), str):
                return Refused("a tool must be an object with a function that has a name", f"tools.{position}")
    return None


def _as_number(value: Any) -> float:
    """The number that a lenient reader would see in `value`; 0 if none."""
    try:
        return float(value)
    except OverflowError:
        return math.inf
    except (TypeError, ValueError):
        return 0
