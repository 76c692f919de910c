"""Scenarios: units, defaults, what overrides what, and one clear error for everything that is wrong."""

import re
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import traces
from kvsim.hardware.catalogue import gpu_names, load_host
from kvsim.models import load_model
from kvsim.run.simulate import Setup
from kvsim.scenario.scenario_file import Scenario, default_host, load_scenario
from kvsim.scenario.tenants import Tenant

NEEDED = {"trace": "mooncake-conversation", "model": "llama-3.1-8b", "gpu": "h100-sxm"}


def of(**options: Any) -> Scenario:
    return load_scenario({**NEEDED, **options})


def resolve(**options: Any) -> None:
    """Everything that a command does before it simulates."""
    asked = of(**options)
    asked.setups()
    asked.load_trace()


def file_with(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "scenario.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def test_every_default_is_that_of_a_setup() -> None:
    (setup,) = of().setups()
    bare = Setup(model=setup.model, policy=setup.policy, gpu=setup.gpu, host=setup.host)
    for field in fields(Setup):
        assert getattr(setup, field.name) == getattr(bare, field.name), field.name


def test_a_file_says_all_and_takes_units(tmp_path: Path) -> None:
    path = file_with(
        tmp_path,
        """
        trace: azure-2023-code
        model: llama-3.1-8b
        gpu: a100-80g-sxm@datasheet
        policy: [full, "shadowkv:budget_tokens=1024"]
        limit: 1k
        rate_scale: 2
        seed: 7
        gpus: 4
        tp: 2
        max_num_batched_tokens: 2Ki
        prefix_cache_hbm: 1GiB
        prefix_cache_ddr: 20GB
        weight_dtype: fp8
        kv_dtype: fp8
        counts: {miss: 0.25}
        slo: {ttft: 10s, tpot: 100ms}
        warmup: 1m
        """,
    )
    asked = load_scenario({}, path)
    full, shadow = asked.setups()
    assert [full.policy.name, shadow.policy.name] == ["full", "shadowkv"]
    assert getattr(shadow.policy, "budget_tokens") == 1024  # noqa: B009 - only this policy has it
    assert (full.gpus, full.tp, full.replicas) == (4, 2, 2)
    assert (full.gpu.parameter_set, full.host.name) == ("datasheet", "ddr4-dual-xeon")
    assert full.max_num_batched_tokens == 2048
    assert (full.prefix_cache_hbm_bytes, full.prefix_cache_ddr_bytes) == (2**30, 20 * 10**9)
    assert (full.model.kv_dtype, full.model.weight_dtype) == ("fp8", "fp8")
    assert full.counts == {"miss": 0.25}
    assert asked.slo_s == {"ttft_s": 10.0, "tpot_s": 0.1}
    assert asked.warmup == 60.0
    trace, recorded = asked.load_trace(), traces.load("azure-2023-code", limit=1000)
    assert len(trace) == 1000
    assert np.array_equal(trace.arrival_s, recorded.arrival_s / 2)
    assert asked.resolved()["limit"] == 1000


def test_a_file_says_what_tenants_have(tmp_path: Path) -> None:
    path = file_with(
        tmp_path,
        """
        trace: servegen-deepseek-r1
        model: llama-3.1-8b
        gpu: h100-sxm
        gpus: 4
        scheduler: fair
        output_token_weight: 4
        tenants:
          client-35: {weight: 2, priority: -1, slo_class: batch, quota: 0.5, replicas: 0-1}
          "client-*": {slo_class: chat, replicas: 3}
        slo_classes:
          chat: {ttft: 500ms, tpot: 50ms}
          batch: {e2e: 1m}
        """,
    )
    (setup,) = load_scenario({}, path).setups()
    assert setup.tenants == {
        "client-35": Tenant(weight=2, priority=-1, slo_class="batch", quota=0.5, replicas=(0, 1)),
        "client-*": Tenant(slo_class="chat", replicas=(3, 3)),
    }
    assert setup.slo_classes == {"chat": {"ttft_s": 0.5, "tpot_s": 0.05}, "batch": {"e2e_s": 60.0}}
    assert (setup.scheduler, setup.output_token_weight, setup.prompt_token_weight) == ("fair", 4.0, 1.0)


def test_options_win_over_the_file(tmp_path: Path) -> None:
    path = file_with(tmp_path, "trace: azure-2023-code\nmodel: llama-2-7b\ngpu: h100-sxm\ngpus: 4\npolicy: quest\n")
    asked = load_scenario({"gpus": 2, "model": "llama-3.1-8b"}, path)
    assert (asked.setup["gpus"], asked.model, asked.policy, asked.trace) == (
        2,
        "llama-3.1-8b",
        ("quest",),
        "azure-2023-code",
    )


def test_a_weight_dtype_holds_for_experts_too() -> None:
    # gpt-oss keeps its routed experts, most of its weights, in mxfp4.
    stored, asked = load_model("gpt-oss-20b"), of(model="gpt-oss-20b", weight_dtype="bf16").load_model()
    assert asked.weight_bytes == 2 * asked.params
    assert stored.weight_bytes < asked.weight_bytes / 2


def test_every_gpu_has_a_host_that_exists() -> None:
    hosts = {name: load_host(default_host(name)).name for name in gpu_names()}
    assert hosts["rtx-4090"] == "desktop-i9-10900x"
    assert hosts["gb200"] == "grace"
    assert hosts["h100-sxm"] == hosts["b200"] == hosts["mi300x"] == hosts["l40s"] == "ddr5-dual-xeon"
    assert hosts["a100-80g-pcie"] == hosts["t4"] == hosts["a10g"] == "ddr4-dual-xeon"
    assert of(host="grace").setups()[0].host.name == "grace"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"gpuz": 3}, "command line: unknown key 'gpuz'; did you mean 'gpu'?"),
        ({"gpus": True}, "command line: gpus=True: Input should be a valid integer"),
        ({"gpus": 1.5}, "command line: gpus=1.5: Input should be a valid integer"),
        ({"gpus": 10**9}, "command line: gpus=1000000000: Input should be less than or equal to 65536"),
        ({"gpus": 0}, "gpus=0 must be at least 1"),
        ({"gpus": 3, "tp": 2}, "gpus=3 is not a multiple of tp=2"),
        ({"seed": -1}, "command line: seed=-1: Input should be greater than or equal to 0"),
        ({"rate_scale": float("nan")}, "command line: rate_scale=nan: Input should be a finite number"),
        ({"rate_scale": 0}, "command line: rate_scale=0: Input should be greater than or equal to 0.000001"),
        ({"limit": "5x"}, "command line: limit='5x': token count '5x' has the unknown unit 'x'"),
        ({"warmup": -1}, "command line: warmup=-1: Input should be greater than or equal to 0"),
        ({"gpu_memory_utilization": 1.1}, "gpu_memory_utilization=1.1 must be above 0 and at most 1"),
        ({"gpu_memory_utilization": float("inf")}, "command line: gpu_memory_utilization=inf: Input should be a fin"),
        ({"prefix_cache_ddr": "10 apples"}, "command line: prefix_cache_ddr='10 apples': size '10 apples' has the"),
        ({"prefix_cache_ddr": "3TiB"}, "prefix_cache_ddr=3 TiB exceeds the usable 1.8 TiB of host 'ddr5-dual-xeon'"),
        ({"prefix_cache_nvme": "99TB"}, "prefix_cache_nvme=90.04 TiB exceeds the 27.94 TiB of NVMe of host"),
        ({"counts": {"miss": 1.5}}, "command line: counts.miss=1.5: Input should be less than or equal to 1"),
        ({"counts": {"miss": "x"}}, "command line: counts.miss='x': 'x' is not a number such as 0.4"),
        ({"slo": {"tfft": "1s"}}, "command line: slo={'tfft': '1s'}: unknown latency 'tfft'; did you mean 'ttft'?"),
        ({"slo": {"ttft": 0}}, "command line: slo.ttft=0: Input should be greater than 0"),
        ({"policy": []}, "command line: policy=[]: Value should have at least 1 item"),
        ({"policy": "shadowvk"}, "unknown policy 'shadowvk'; did you mean 'shadowkv'?"),
        ({"policy": "shadowkv:rank=0"}, "shadowkv: rank=0 must be at least 1"),
        (
            {"tenants": {"a": {"weigth": 2}}},
            "command line: tenants.a={'weigth': 2}: unknown key 'weigth'; did you mean 'w",
        ),
        (
            {"tenants": {"a": {"weight": 0}}},
            "command line: tenants.a={'weight': 0}: weight=0 must be a finite number above",
        ),
        ({"tenants": {"a": {"weight": "x"}}}, "command line: tenants.a={'weight': 'x'}: weight='x' is not a number"),
        (
            {"tenants": {"a": {"priority": 1.5}}},
            "command line: tenants.a={'priority': 1.5}: priority=1.5 is not a whole",
        ),
        (
            {"tenants": {"a": {"quota": 1.2}}},
            "command line: tenants.a={'quota': 1.2}: quota=1.2 must be above 0 and at most",
        ),
        (
            {"tenants": {"a": {"quota": 0}}},
            "command line: tenants.a={'quota': 0}: quota=0 must be above 0 and at most 1",
        ),
        (
            {"tenants": {"a": {"replicas": "3-1"}}},
            "command line: tenants.a={'replicas': '3-1'}: replicas=3-1 must be a rep",
        ),
        (
            {"tenants": {"a": {"replicas": "x"}}},
            "command line: tenants.a={'replicas': 'x'}: replicas='x' must be a replica",
        ),
        (
            {"tenants": {"a": {"replicas": "0-1"}}},
            "tenant 'a': replicas=0-1 exceeds the 1 replicas of the cluster, 0 to 0",
        ),
        (
            {"tenants": {"a": {"slo_class": 3}}},
            "command line: tenants.a={'slo_class': 3}: slo_class=3 is not the name of",
        ),
        ({"tenants": {"a": 3}}, "command line: tenants.a=3: "),
        (
            {"tenants": {"a": {"slo_class": "chta"}}, "slo_classes": {"chat": {"ttft": 1}}},
            "unknown SLO class 'chta'; did you mean 'chat'? known: chat",
        ),
        ({"slo_classes": {"chat": {"ttft": 1}}}, "no tenant has the SLO class 'chat'; give it to one, or leave it out"),
        (
            {"slo_classes": {"chat": {"tfft": 1}}},
            "command line: slo_classes.chat={'tfft': 1}: unknown latency 'tfft'; did",
        ),
        ({"slo_classes": {"chat": {}}}, "command line: slo_classes.chat={}: Dictionary should have at least 1 item"),
        ({"output_token_weight": 0.0}, "output_token_weight=0.0 must be a finite number above 0"),
        ({"scheduler": "fcsf"}, "unknown scheduler 'fcsf'; did you mean 'fcfs'?"),
        ({"host": "grcae"}, "unknown host 'grcae'; did you mean 'grace'?"),
        ({"gpu": "h100-smx"}, "unknown GPU 'h100-smx'; did you mean 'h100-sxm'?"),
        ({"model": "lama-3.1-8b"}, "unknown model 'lama-3.1-8b'; did you mean 'llama-3.1-8b'?"),
        ({"kv_dtype": "fp9"}, "unknown dtype 'fp9'; known: "),
        ({"model": "llama-3.1-405b"}, "llama-3.1-405b does not fit: one of 1 x h100-sxm has 71.26 GiB usable"),
        ({"trace": "azure-2024"}, "unknown trace 'azure-2024'"),
    ],
)
def test_what_is_wrong_is_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        resolve(**options)


def test_what_is_missing_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"^command line: trace is missing; gpu is missing$"):
        load_scenario({"model": "llama-3.1-8b"})
    path = file_with(tmp_path, "trace: azure-2023-code\nmodel: llama-3.1-8b\n")
    with pytest.raises(ValueError, match=f"^{re.escape(str(path))}: gpu is missing$"):
        load_scenario({}, path)
    with pytest.raises(ValueError, match=f"^{re.escape(str(path))} and command line: gpu is missing$"):
        load_scenario({"seed": 1}, path)


@pytest.mark.parametrize(("text", "message"), [("- 1\n", "holds no mapping"), ("a: [\n", "is not YAML")])
def test_a_file_that_is_no_scenario(tmp_path: Path, text: str, message: str) -> None:
    path = file_with(tmp_path, text)
    with pytest.raises(ValueError, match=re.escape(f"{path} {message}")):
        load_scenario({}, path)
