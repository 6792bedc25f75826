"""Other load generators: that all are told the same workload, and what is read from their exports."""

import json
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest

from bench.outside_clients import AIPERF, CLIENTS, GUIDELLM, OURS, Ask, ExportError, Workload, read_export

ASK = Ask(Workload(250, 64, 4, 5.0, 60.0), "http://there", "m", Path("/tokenizer"), seed=7, folder=Path("/out"))
Json = dict[str, Any]


def metric(avg: float, **percentiles: float) -> Json:
    return {"unit": "ms", "avg": avg, **percentiles}


OUR_EXPORT: Json = {
    "complete": True,
    "figures": {
        "num_answered": 2,
        "num_refused": 1,
        "num_failed": 2,
        "tokens_per_s": 150.0,
        "cached_share": 0.25,
        "ttft_ms": {"p50": 30.0, "p90": 40.0, "p99": 50.0},
        "tpot_ms": {"p50": 6.0, "p90": 7.0, "p99": 8.0},
    },
    "use": {"ran_s": 10.0, "generator_cpu_s": 2.0},
    "turns": [
        {"prompt_tokens": 250, "output_tokens": 64},
        {"prompt_tokens": 252, "output_tokens": 60},
        {"prompt_tokens": 999, "output_tokens": 0},
    ],
}
AIPERF_EXPORT: Json = {
    "schema_version": "1.4",
    "start_time": "2026-11-30T07:00:00",
    "end_time": "2026-11-30T07:01:00.500000",
    "request_count": metric(2.0),
    "error_request_count": metric(3.0),
    "time_to_first_token": metric(31.0, p50=30.0, p99=50.0),
    "inter_token_latency": metric(6.5, p50=6.0),
    "output_token_throughput": metric(150.0),
    "usage_prompt_tokens": metric(251.0),
    "usage_completion_tokens": metric(62.0),
    "usage_prompt_cache_read_tokens": metric(62.75),
}


def distribution(mean: float, p50: float = 0.0, p99: float = 0.0) -> Json:
    whole = {"mean": mean, "percentiles": {"p50": p50, "p90": 0.0, "p99": p99}}
    nothing = {"mean": 0.0, "percentiles": {"p50": 0.0, "p90": 0.0, "p99": 0.0}}
    return {"successful": whole, "incomplete": nothing, "errored": nothing, "total": whole}


GUIDELLM_EXPORT: Json = {
    "metadata": {},
    "benchmarks": [
        {
            "metrics": {
                "request_totals": {"successful": 2, "incomplete": 4, "errored": 3, "total": 9},
                "time_to_first_token_ms": distribution(31.0, p50=30.0, p99=50.0),
                "inter_token_latency_ms": distribution(6.5, p50=6.0),
                "output_tokens_per_second": distribution(1.0) | {"total": distribution(150.0)["total"]},
                "prompt_token_count": distribution(251.0),
                "output_token_count": distribution(62.0),
            },
            "scheduler_metrics": {"measure_start_time": 100.0, "measure_end_time": 160.5},
            "requests": {
                "successful": [
                    {"prompt_tokens": 250, "cached_tokens": 100},
                    {"prompt_tokens": 150, "cached_tokens": 0},
                    {"prompt_tokens": 250, "cached_tokens": None},
                ],
                "incomplete": [],
                "errored": [],
            },
        }
    ],
}
EXPORTS = {OURS: OUR_EXPORT, AIPERF.name: AIPERF_EXPORT, GUIDELLM.name: GUIDELLM_EXPORT}


@pytest.mark.parametrize("name", CLIENTS)
def test_an_export_gives_the_same_figures_whoever_wrote_it(name: str) -> None:
    found = read_export(CLIENTS[name], json.dumps(EXPORTS[name]).encode())
    assert (found.num_requests, found.num_failed) == (2, 3)
    assert (found.ttft_p50_ms, found.ttft_p99_ms, found.itl_p50_ms, found.tokens_per_s) == (30.0, 50.0, 6.0, 150.0)
    assert (found.prompt_tokens, found.output_tokens, found.cached_share) == (251.0, 62.0, 0.25)


def test_a_client_tells_when_it_measured_or_how_many_cores_it_used() -> None:
    ours, aiperf, guidellm = (read_export(CLIENTS[name], json.dumps(EXPORTS[name]).encode()) for name in CLIENTS)
    assert (ours.cores, ours.window) == (0.2, None)
    assert aiperf.window is not None
    assert aiperf.window[0] == datetime(2026, 11, 30, 7).timestamp()
    assert aiperf.window[1] - aiperf.window[0] == 60.5
    assert guidellm.window == (100.0, 160.5)


def test_a_server_that_tells_no_cached_tokens_has_no_share_of_them() -> None:
    without = {name: value for name, value in AIPERF_EXPORT.items() if "cache" not in name and "error" not in name}
    found = read_export(CLIENTS[AIPERF.name], json.dumps(without).encode())
    assert (found.cached_share, found.num_failed) == (None, 0)


@pytest.mark.parametrize("name", CLIENTS)
@pytest.mark.parametrize("data", [b"{", b"{}", b'{"benchmarks": []}', b'{"figures": null, "use": {}, "turns": []}'])
def test_an_export_of_another_shape_is_refused_by_name(name: str, data: bytes) -> None:
    with pytest.raises(ExportError, match=f"the export of {name} is not as expected"):
        read_export(CLIENTS[name], data)


def test_an_export_of_nothing_is_refused() -> None:
    empty = AIPERF_EXPORT | {"time_to_first_token": metric(31.0)}
    with pytest.raises(ExportError, match="a percentile is missing"):
        read_export(CLIENTS[AIPERF.name], json.dumps(empty).encode())


def options(arguments: list[str]) -> dict[str, str]:
    return {
        option: value for option, value in zip(arguments, [*arguments[1:], ""], strict=True) if option.startswith("--")
    }


def test_all_are_told_the_same_workload() -> None:
    ours, aiperf, guidellm = (options(CLIENTS[name].command(ASK)) for name in (OURS, AIPERF.name, GUIDELLM.name))
    assert CLIENTS[OURS].command(ASK)[:2] == ["load", "fixed:250/64"]
    assert (aiperf["--isl"], aiperf["--osl"]) == ("250", "64")
    assert guidellm["--data"] == "kind=synthetic_text,prompt_tokens=250,output_tokens=64"
    assert (ours["--concurrency"], aiperf["--concurrency"]) == ("4", "4")
    assert guidellm["--profile"] == "kind=concurrent,streams=4,warmup=5"
    assert (ours["--warm-up-s"], ours["--duration-s"]) == ("5", "65")
    assert (aiperf["--warmup-duration"], aiperf["--benchmark-duration"]) == ("5", "60")
    assert guidellm["--constraint"] == "kind=max_duration,seconds=65"
    assert (ours["--seed"], aiperf["--random-seed"], guidellm["--seed"]) == ("7", "7", "kind=static,value=7")
    assert ours["--url"] == aiperf["--url"] == "http://there"
    assert guidellm["--backend"] == "kind=openai_http,target=http://there,model=m,request_format=/v1/completions"
    assert (aiperf["--request-rate"], aiperf["--arrival-pattern"]) == ("500", "constant"), "it would spin without"
    assert "--no-first-in-line" in ours
    assert "--text" in ours, "as the others"
    assert (aiperf["--endpoint-type"], aiperf["--extra-inputs"]) == ("completions", "ignore_eos:true")


def test_each_leaves_its_export_where_it_is_looked_for() -> None:
    assert options(CLIENTS[OURS].command(ASK))["--json"] == f"/out/{CLIENTS[OURS].export}"
    assert options(CLIENTS[AIPERF.name].command(ASK))["--output-artifact-dir"] == "/out"
    assert (
        options(CLIENTS[GUIDELLM.name].command(ASK))["--output"]
        == f"kind=json,path=/out/{CLIENTS[GUIDELLM.name].export}"
    )


def test_aiperf_has_more_prompts_than_it_can_send() -> None:
    assert int(options(CLIENTS[AIPERF.name].command(ASK))["--num-dataset-entries"]) == 4 * 65 * 10
