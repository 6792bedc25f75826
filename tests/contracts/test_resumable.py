"""Which of vLLM's sampling parameters let another engine go on with an answer (docs/adr/0010)."""

import pytest
from vllm.sampling_params import RepetitionDetectionParams, SamplingParams, StructuredOutputsParams

from engine.vllm_codec import is_resumable

GREEDY = {"temperature": 0.0}


@pytest.mark.parametrize(
    "arguments",
    [
        GREEDY,
        {"temperature": 0.7, "top_p": 0.9, "top_k": 40, "min_p": 0.1},
        {**GREEDY, "seed": 5},
        {**GREEDY, "logprobs": 3, "min_tokens": 4, "stop": ["a"], "ignore_eos": True, "logit_bias": {5: 1.0}},
    ],
)
def test_what_depends_on_prompt_and_tokens_alone_is_resumable(arguments):
    assert is_resumable(SamplingParams(**arguments))


@pytest.mark.parametrize(
    "arguments",
    [
        {"temperature": 0.7, "seed": 5},
        {**GREEDY, "presence_penalty": 0.5},
        {**GREEDY, "frequency_penalty": 0.5},
        {**GREEDY, "repetition_penalty": 1.1},
        {**GREEDY, "bad_words": ["no"]},
        {**GREEDY, "structured_outputs": StructuredOutputsParams(regex="[a-z]+")},
        {**GREEDY, "thinking_token_budget": 10},
        {**GREEDY, "repetition_detection": RepetitionDetectionParams(max_pattern_size=3, min_count=3)},
    ],
)
def test_what_keeps_a_state_of_its_own_is_not(arguments):
    assert not is_resumable(SamplingParams(**arguments))


def test_a_new_sampling_parameter_is_looked_at_before_it_is_called_resumable():
    known = {
        "n", "presence_penalty", "frequency_penalty", "repetition_penalty", "temperature", "watermarking", "top_p",
        "top_k", "min_p", "seed", "stop", "stop_token_ids", "ignore_eos", "max_tokens", "min_tokens", "logprobs",
        "prompt_logprobs", "prompt_logprob_token_ids", "prompt_logprob_start", "logprob_token_ids", "flat_logprobs",
        "detokenize", "skip_special_tokens", "spaces_between_special_tokens", "include_stop_str_in_output",
        "output_kind", "stream_interval", "skip_clone", "output_text_buffer_length", "_eos_token_id",
        "_all_stop_token_ids", "_watermarking_skipped", "structured_outputs", "logit_bias", "allowed_token_ids",
        "extra_args", "bad_words", "_bad_words_token_ids", "skip_reading_prefix_cache", "thinking_token_budget",
        "repetition_detection", "routed_experts_prompt_start", "trace_decode_token_ids",
    }  # fmt: skip
    assert set(SamplingParams.__struct_fields__) == known
