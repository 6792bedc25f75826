"""The roofline follows from the figures of its GPU and model."""

import pytest

from engine.latency import LatencyModel, StepWork
from engine.roofline import H100, LLAMA_3_1_8B, QWEN3_CODER_30B_A3B_FP8, ROOFLINES, Roofline

QWEN = Roofline(H100, QWEN3_CODER_30B_A3B_FP8)
LLAMA = Roofline(H100, LLAMA_3_1_8B)


def test_the_work_of_a_step_is_summed_over_its_batch() -> None:
    work = StepWork.of([(3, 10), (1, 20), (1, 5)])
    assert (work.num_prefill_tokens, work.num_decode_requests, work.num_tokens) == (3, 2, 5)
    assert work.num_kv_tokens == 13 + 21 + 6
    assert work.num_attended_tokens == (11 + 12 + 13) + 21 + 6


def test_a_decode_step_some_steps_later_has_grown_by_a_token_of_each_sequence_and_step() -> None:
    assert StepWork.of([(1, 20), (1, 5)]).after(3) == StepWork.of([(1, 23), (1, 8)])


def test_a_token_of_kv_is_as_large_as_the_model_makes_it() -> None:
    assert QWEN.model.kv_bytes_per_token == 98_304
    assert LLAMA.model.kv_bytes_per_token == 131_072
    assert QWEN.num_kv_tokens == pytest.approx(381_000, rel=0.01)
    assert QWEN.num_kv_blocks * 64 <= QWEN.num_kv_tokens


def test_a_dense_model_reads_all_its_weights_in_every_step() -> None:
    assert LLAMA.weight_bytes(1) == LLAMA.weight_bytes(100) == 8.03e9 * 2


def test_a_mixture_of_experts_reads_those_that_are_touched() -> None:
    # One token uses what is active; very many use everything.
    assert QWEN.weight_bytes(1) == pytest.approx(3.3e9)
    assert QWEN.weight_bytes(10_000) == pytest.approx(30.5e9)
    assert QWEN.weight_bytes(1) < QWEN.weight_bytes(8) < 8 * QWEN.weight_bytes(1)


def test_a_decode_step_is_bound_by_memory() -> None:
    expected = (LLAMA.weight_bytes(1) + 131_072 * 1001) / (3.35e12 * 0.8) + 0.003
    assert LLAMA.step_s(StepWork.of([(1, 1000)])) == pytest.approx(expected)


def test_a_chunk_of_prefill_is_bound_by_arithmetic_in_the_weights_format() -> None:
    chunk, before = 8192, 50_000
    pairs = chunk * before + chunk * (chunk + 1) / 2
    attention = 4 * 48 * 32 * 128 * pairs / (989e12 * 0.45)
    expected = 2 * 3.3e9 * chunk / (1979e12 * 0.45) + attention + 0.003
    assert QWEN.step_s(StepWork.of([(chunk, before)])) == pytest.approx(expected)
    assert LLAMA.compute_s(1, 0) == pytest.approx(2 * 8.03e9 / (989e12 * 0.45))


def test_a_hand_off_takes_its_bytes_over_the_port_and_a_fixed_time() -> None:
    assert QWEN.handoff_s(1000) == pytest.approx(0.003 + 1000 * 64 * 98_304 / 40e9)


def test_every_preset_holds_a_request_of_the_whole_context() -> None:
    assert all(one.num_kv_tokens >= one.model.max_model_len for one in ROOFLINES.values())


def test_straight_lines_count_a_sequence_of_one_token_as_decode() -> None:
    lines = LatencyModel(0.001, 0.01, 0.02, 0.002, 0.05, 0.004)
    assert lines.step_s(StepWork.of([(1, 500)])) == pytest.approx(0.022)
    assert lines.step_s(StepWork.of([(30, 0), (1, 9), (1, 9)])) == pytest.approx(0.04 + 0.024)
