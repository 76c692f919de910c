"""Decoding sequences that are complete, or whose plan changes: what happens between two iterations."""

from kvsim.engine.batch.decoding import generated_tokens, last_generated, leave, remove, renew, set_next_due
from kvsim.engine.books.causes import finish
from kvsim.engine.requests.tenants import take_back_output
from kvsim.engine.sessions.between_turns import end_turn
from kvsim.engine.state.cluster import DECODING, NOBODY, Cluster


def settle(cluster: Cluster, replica_index: int, leave_s: float) -> None:
    """Let complete requests leave and give the others that are due their next plan. May make a detour."""
    replica, requests = cluster.replicas[replica_index], cluster.requests
    if replica["length"][DECODING] == 0 or replica["iteration"] < replica["next_due"]:
        return
    index = replica["first"][DECODING]
    while index != NOBODY:
        after = requests[index]["after"]
        if requests[index]["due"] <= replica["iteration"] and not renew(cluster, index):
            remove(cluster, index)
            last = generated_tokens(cluster.world, requests[index], replica["iteration"])
            take_back_output(cluster, replica_index, index, last - last_generated(requests[index]) - 1)
            leave(cluster, index, leave_s)
            finish(replica, requests[index], leave_s)
            end_turn(cluster, index, leave_s)
        index = after
    set_next_due(cluster, replica)
