"""What one replica did, and what is shown of it: bytes, busy time, memory over time, gaps between tokens."""

from kvsim.engine.state.cluster import (
    DDR,
    DECODING,
    EVERYBODY,
    HANDING,
    HBM,
    IDLE,
    INCOMING,
    ITERATING,
    N_TIERS,
    PREFILLING,
    RUNNING,
    SWAPPED,
    WAITING,
    WANT_LOOK,
    Cluster,
    Detour,
    Ints,
    Prices,
    Record,
)
from kvsim.iteration.price import OPS
from kvsim.plans.derive import AMOUNTS


def note(cluster: Cluster, number: int, time_s: float, steps: int) -> None:
    """Record memory, `steps` iterations after that of `used_bytes`, and queue lengths at an iteration boundary."""
    replica, row = cluster.replicas[number], cluster.notes[cluster.world["notes"]]
    cluster.world["notes"] += 1
    used, growth, cached = replica["used_bytes"], replica["growth_bytes"], replica["cache_bytes"]
    row["time_s"], row["replica"] = time_s, number
    row["hbm_bytes"] = used[HBM] + steps * growth[HBM] + cached[HBM]
    row["ddr_bytes"] = used[DDR] + steps * growth[DDR] + cached[DDR]
    row["running"] = replica["length"][DECODING] + replica["length"][PREFILLING]
    row["waiting"] = replica["length"][WAITING] + replica["length"][SWAPPED]
    row["waiting"] += replica["length"][HANDING] + replica["length"][INCOMING]


def note_now(cluster: Cluster, number: int, time_s: float) -> None:
    """Record what the next iteration will hold."""
    replica = cluster.replicas[number]
    for tier in range(N_TIERS):
        replica["used_bytes"][tier] = replica["held_bytes"][tier] + replica["stored_bytes"][tier]
    note(cluster, number, time_s, 0)


def note_change(cluster: Cluster, number: int, time_s: float) -> None:
    """Record that what an idle replica holds has changed; any other says so at its next boundary."""
    if cluster.replicas[number]["phase"] == IDLE:
        note(cluster, number, time_s, 0)
        note_now(cluster, number, time_s)


def charge_plans(world: Record, replica: Record, prices: Prices, structure: int, amounts: Ints, times: int) -> None:
    """Book the bytes of `times` steps of these amounts, on all stages."""
    head = prices.structures[structure]
    for stage in range(world["stages"]):
        for i in range(head["n_ops"]):
            op, column = prices.ops[head["ops"] + stage * head["n_ops"] + i], OPS + AMOUNTS * i
            nbytes = op["layers"] * (amounts[column + 1] + amounts[column + 2])
            replica["plan_bytes"][op["link"]] += times * nbytes


def charge_loads(world: Record, replica: Record, prices: Prices, loads: Ints) -> None:
    """Book the bytes of one iteration's loads."""
    for i in range(len(loads)):
        charge_plans(world, replica, prices, loads[i, 0], loads[i], 1)


def charge_model(world: Record, replica: Record, prices: Prices, iterations: int, tokens: int, logits: int) -> None:
    """Book the weights that iterations read and the bytes of their collectives."""
    if logits:
        replica["weight_bytes"] += iterations * world["head_bytes"]
    for stage in range(world["stages"]):
        model = prices.own[tokens * world["stages"] + stage]
        replica["weight_bytes"] += iterations * model["weight_bytes"]
        replica["collective_bytes"] += iterations * model["collective_bytes"]


def emit(cluster: Cluster, number: int, first_s: float) -> None:
    """Record the gaps before the tokens of an iteration; a sequence swapped in for it had waited for longer."""
    replica = cluster.replicas[number]
    gap(cluster, number, EVERYBODY, first_s, 0.0, 1, replica["decoding_now"] - replica["late"])
    index = replica["last"][DECODING]
    for _ in range(replica["late"]):
        request = cluster.requests[index]
        late_s = first_s + replica["began_s"] - request["last_token_s"]
        gap(cluster, number, request["whose"], late_s, 0.0, 1, 1)
        note_member(cluster, index, 1)
        index = request["before"]
    replica["late"] = 0


def gap(cluster: Cluster, number: int, whose: int, first_s: float, slope_s: float, steps: int, tokens: int) -> None:
    """Before each of `steps` steps so many tokens waited `first_s`, and `slope_s` longer each time."""
    if steps <= 0 or tokens <= 0:
        return
    row = cluster.gaps[cluster.world["gaps"]]
    cluster.world["gaps"] += 1
    row["first_s"], row["slope_s"], row["steps"], row["tokens"] = first_s, slope_s, steps, tokens
    row["replica"], row["whose"] = number, whose


def note_member(cluster: Cluster, index: int, change: int) -> None:
    """Record that from here on a batch's gaps are before one token more, or less, of this request's tenant."""
    if not cluster.world["several_tenants"]:
        return
    row, request = cluster.gaps[cluster.world["gaps"]], cluster.requests[index]
    cluster.world["gaps"] += 1
    row["steps"], row["tokens"], row["replica"], row["whose"] = 0, change, request["replica"], request["whose"]


def away(cluster: Cluster, index: int, now_s: float) -> None:
    """Record how long a preempted request that is taken on again was away."""
    row = cluster.aways[cluster.world["aways"]]
    cluster.world["aways"] += 1
    row["request"], row["from_s"], row["to_s"] = index, cluster.requests[index]["since_s"], now_s


def look(cluster: Cluster, number: int, now_s: float) -> None:
    """Show the iteration or run that a replica has begun if it lies in the window that is looked at.

    Makes a detour then, so it is the last that an event does. (The op fidelity sees all that it takes by itself.)
    """
    world, replica = cluster.world, cluster.replicas[number]
    if replica["phase"] != ITERATING and replica["phase"] != RUNNING:
        return
    end_s = max(replica["wake_s"], replica["end_s"])
    if now_s < world["window_to_s"] and end_s > world["window_from_s"] and not world["step_by_step"]:
        world["wanted"][0], world["wanted"][1], world["look_s"] = WANT_LOOK, number, now_s
        raise Detour
