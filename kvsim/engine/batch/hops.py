"""The way of activations from stage to stage of a pipeline: how long it takes, and what is booked of it."""

from kvsim.engine.state.cluster import Record
from kvsim.hardware.machine import NVLINK


def send_s(world: Record, tokens: int) -> float:
    """How long the activations of so many tokens are under way between all stages."""
    seconds = 0.0
    for stage in range(1, world["stages"]):
        seconds += hop_s(world, stage, tokens)
    return seconds


def hop_s(world: Record, stage: int, tokens: int) -> float:
    """How long the activations of so many tokens take to a stage: over the network where a host begins with it."""
    nbytes = sent_bytes(world, tokens)
    if stage * world["tp"] % world["gpus_on_host"]:
        return float(world["peer_latency_s"] + nbytes * world["peer_byte_s"])
    return float(world["nic_latency_s"] + nbytes * world["nic_byte_s"])


def charge_sends(world: Record, replica: Record, times: int, tokens: int) -> None:
    """Book activations on their way between all stages."""
    nbytes = sent_bytes(world, tokens)
    replica["activation_peer_bytes"] += times * world["peer_hops"] * nbytes
    replica["activation_nic_bytes"] += times * world["nic_hops"] * nbytes
    replica["busy_s"][NVLINK] += times * world["peer_hops"] * nbytes * world["peer_byte_s"]
    if world["nic_hops"]:
        replica["nic_s"] += times * world["nic_hops"] * nbytes * world["nic_byte_s"]


def sent_bytes(world: Record, tokens: int) -> int:
    return int(-(-tokens * world["row_bytes"] // world["tp"]))
