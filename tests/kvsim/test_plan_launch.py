"""What a plan is run by: engines in their own names, with the bytes and tokens of the plan in their units."""

import json
import shlex
from typing import Any

import pytest

from kvsim import Setup, load_gpu, load_host, load_model
from kvsim.planning.candidates import Family
from kvsim.planning.launch import engines, simulate_command
from kvsim.planning.prices import Prices
from policies import Full, parse_policy


def family(policy: str = "full", share: float | None = None, **options: Any) -> Family:
    setup = Setup(
        model=load_model("llama-3.1-8b"),
        policy=parse_policy(policy),
        gpu=load_gpu("h100-sxm"),
        host=load_host("ddr5-dual-xeon"),
        **{"gpus": 2, "tp": 2, **options},
    )
    price = Prices().of("h100-sxm")
    return Family(gpu="h100-sxm", policy=policy, setup=setup, price=price, prefill_share=share)


def started(replicas: int, policy: str = "full", **options: Any) -> dict[str, Any]:
    one = family(policy, **options)
    return engines(one, one.fleet(replicas), "m", 9000)


def value(words: list[str], flag: str) -> str:
    return words[words.index(flag) + 1]


def test_host_memory_for_prefixes_is_shared_by_the_replicas_of_a_host() -> None:
    found = started(8, prefix_cache_ddr_bytes=1 << 40)  # four replicas of two GPUs on a host
    vllm, sglang = (shlex.split(found[name]["commands"][0]["command"]) for name in ("vLLM", "SGLang"))
    assert value(vllm, "--kv-offloading-size") == "256"  # GiB of a server
    assert value(sglang, "--hicache-size") == str((1 << 40) // 4 // 2 // 10**9)  # GB of a rank
    assert "--enable-hierarchical-cache" in sglang
    assert value(vllm, "--max-model-len") == value(sglang, "--context-length") == "9000"


def test_pools_are_servers_of_two_kinds() -> None:
    found = started(4, share=0.75, prefix_cache_ddr_bytes=1 << 40)
    assert [(one["servers"], one["for"]) for one in found["vLLM"]["commands"]] == [(3, "prompts"), (1, "decoding")]
    prompts, decoding = (shlex.split(one["command"]) for one in found["vLLM"]["commands"])
    connectors = json.loads(value(prompts, "--kv-transfer-config"))["kv_connector_extra_config"]["connectors"]
    assert [one["kv_connector"] for one in connectors] == ["NixlConnector", "OffloadingConnector"]
    assert connectors[1]["kv_connector_extra_config"]["cpu_bytes_to_use"] == 1 << 38
    assert json.loads(value(decoding, "--kv-transfer-config"))["kv_connector"] == "NixlConnector"
    modes = [value(shlex.split(one["command"]), "--disaggregation-mode") for one in found["SGLang"]["commands"]]
    assert modes == ["prefill", "decode"]


@pytest.mark.parametrize("policy", ["shadowkv", "retroinfer", "quest"])
def test_what_no_engine_has_is_said(policy: str) -> None:
    for name, engine in started(1, policy).items():
        assert engine["commands"] == []
        assert name in engine["why_not"]
        assert policy in engine["why_not"]


def test_without_a_cache_none_is_left_on() -> None:
    found = started(1)
    assert "--no-enable-prefix-caching" in found["vLLM"]["commands"][0]["command"]
    assert "--disable-radix-cache" in found["SGLang"]["commands"][0]["command"]
    assert isinstance(family().setup.policy, Full)


def test_the_command_says_each_option_as_its_flag_takes_it() -> None:
    given = {
        "trace": "a b.jsonl",
        "limit": 3,
        "skip_bad_rows": True,
        "prefix_cache_prefetch": False,
        "tenants": {"x": {"weight": 2, "slo_class": "chat"}},
        "counts": {"hits": 0.5},
        "acceptance": (0.8, 0.6),
    }
    pools = family(share=0.5)
    text = simulate_command(given, pools, pools.fleet(4), {"ttft_s": 1.5}, {"chat": {"tpot_s": 0.05}})
    words = shlex.split(text)
    assert value(words, "--trace") == "a b.jsonl"
    assert "--skip-bad-rows" in words
    assert "--prefix-cache-prefetch" not in words
    assert value(words, "--tenant") == "x:weight=2,slo_class=chat"
    assert value(words, "--counts") == "hits=0.5"
    assert value(words, "--acceptance") == "0.8,0.6"
    assert (value(words, "--gpus"), value(words, "--prefill-gpus")) == ("8", "4")
    assert value(words, "--slo") == "ttft=1.5s"
    assert value(words, "--slo-class") == "chat:tpot=0.05s"
