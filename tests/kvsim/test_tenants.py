"""Which terms a tenant has: its own, those of a pattern, or the default ones."""

import numpy as np
import pytest
from simulated import setup, trace

from kvsim.run.simulate import simulate
from kvsim.scenario.tenants import Tenant, terms_of


def test_a_name_wins_over_patterns_and_the_first_pattern_over_others() -> None:
    own, first, second = Tenant(weight=1), Tenant(weight=2), Tenant(weight=3)
    tenants = {"*-1": first, "chat-*": second, "chat-1": own}
    assert terms_of(tenants, ["chat-1", "batch-1", "chat-2", "other"]) == [own, first, second, Tenant()]
    assert terms_of({"a[1]": own}, ["a[1]", "a1"]) == [own, own]  # a name as it is written, and a pattern of "a1"


def test_who_the_trace_does_not_have_is_named() -> None:
    with pytest.raises(ValueError, match=r"^unknown tenant 'chta'; did you mean 'chat'\? known: chat, batch$"):
        terms_of({"chta": Tenant()}, ["batch", "chat"])
    requests = trace(np.zeros(2), 10, 2, tenant=[0, 1], tenants=("chat", "batch"))
    with pytest.raises(ValueError, match=r"^unknown tenant 'x\*'; known: chat, batch$"):
        simulate(requests, setup("full", tenants={"chat": Tenant(), "x*": Tenant()}))


def test_quotas_may_add_up_to_more_than_the_memory() -> None:
    """They are limits: each tenant may have three quarters, not both of them at a time."""
    n = 40
    requests = trace(np.zeros(n), 3000, 100, tenant=np.arange(n) % 2, tenants=("a", "b"))
    result = simulate(requests, setup("full", tenants={"*": Tenant(quota=0.75)}, kv_cache_tokens=34_700))
    capacity_bytes = result.inputs["capacity_bytes"]["hbm"]
    held = result.tenancy.kv_peak_bytes
    assert all(0.5 * capacity_bytes < held[name] <= 0.75 * capacity_bytes for name in "ab")
    weights = setup("full").rank.weight_bytes
    assert result.memory["gpu0.hbm"]["peak_bytes"] - weights <= capacity_bytes
    assert np.all(result.requests["status"] == "finished")


def test_a_class_that_only_a_hidden_pattern_has_is_named() -> None:
    """Whoever matches `*` has terms of its own, so the class would bound nobody and goodput count nothing by it."""
    tenants = {"chat": Tenant(slo_class="fast"), "b*": Tenant(), "*": Tenant(slo_class="slow")}
    with pytest.raises(ValueError, match=r"^no tenant has the SLO class 'slow': those that '\*' matches have terms"):
        terms_of(tenants, ["chat", "batch"])
    assert [one.slo_class for one in terms_of(tenants, ["chat", "batch", "other"])] == ["fast", None, "slow"]
