"""How many derivations a policy's plan takes: few, whatever the lengths, or a simulation of many lengths never ends."""

import random

import pytest
from simulated import GPU, HOST, MODEL

from kvsim.hardware.machine import Machine
from kvsim.plans.derive import PlanTable
from policies import POLICIES, parse_policy

MOST_PIECES = 40  # of 300 lengths drawn at random


@pytest.mark.parametrize("policy", sorted(POLICIES))
def test_a_policy_is_derived_few_times_for_many_lengths(policy):
    draw, table = random.Random(0), PlanTable(parse_policy(policy), MODEL, Machine(gpu=GPU, host=HOST), {})
    for _ in range(300):
        prompt = int(2 ** draw.uniform(3, 17))
        past = draw.randrange(prompt)
        table.prefill(prompt, past, draw.randint(1, prompt - past))
        table.decode(prompt, draw.randint(1, 2_000))
    assert len(table.pieces) <= MOST_PIECES
