"""RetrievalAttention: the CPU finds and attends to the keys that a query needs; queries and partial outputs travel."""

import torch
from torch import Tensor

from policies import Policy, RetrievalAttention
from policies.plan import part_of
from policies.retrieval_index import ENTRIES, KMEANS_ROUNDS, TRAIN_QUERIES
from runtime.call import Call, Method, Piece
from runtime.dense import append_raw, attend_raw
from runtime.index import Flat, Graph, GraphParameters, Index, Ivf, Lists, link
from runtime.kernels.attention import merge, partial_attention


def method(policy: Policy) -> Method:
    """Sinks, window and generated tokens on the device, an index of all other keys of the prompt in host memory.

    Sinks are the first real tokens of a row. Key i of an index is the token `sink_tokens` + i; in a row that is padded
    by n tokens, the first n are padding or among the sinks, and never found. `scan_per` says what a search reads, not
    what it finds; lists of an inverted file are scanned by each query head.
    """
    if not isinstance(policy, RetrievalAttention):
        raise TypeError(f"not a retrieval-attention policy: {policy!r}")
    near, far = _Near(policy), _Far(policy)
    kernels = {
        "append": near.append,
        "split": near.split,
        "attend_near": near.attend_near,
        "attend": _attend,
        "keep_queries": _keep_queries,
        "build": far.build_graph if policy.index == "graph" else far.build_lists,
        "search": far.search,
        "attend_far": far.attend_far,
    }
    routes = {
        "offload_keys": lambda call: [(call.by_head("index_keys"), call.by_head("keys_fp32"))],
        "offload_values": near.offload_values,
        "offload_padding": lambda call: [(call.state["padding_host"], call.state["padding"])],
        "offload_graph": lambda call: [(call.state["graph"], call.state["links"])],
        "offload_entries": lambda call: [(call.state["entries"], call.state["entry_points"])],
        "q_down": lambda call: [(call.state["q_host"], call.q.transpose(1, 2))],
        "out_up": lambda call: [(call.state["far_out"], call.state["far_host"])],
    }
    return Method(kernels=kernels, routes=routes)


class _Near:
    """What stays on the device."""

    def __init__(self, policy: RetrievalAttention) -> None:
        self.sinks, self.window = policy.sink_tokens, policy.window_tokens

    def append(self, call: Call) -> None:
        if call.step.prefilling:
            append_raw(call)
            return
        row = self._rows(call) - 1
        call.by_head("k_near")[:, :, row : row + 1].copy_(call.new_k)
        call.by_head("v_near")[:, :, row : row + 1].copy_(call.new_v)

    def split(self, call: Call) -> None:
        """Each row's sinks and the window to the near rows, all that lies between to what leaves, as fp32."""
        prompt, far = call.step.prompt_tokens, self._far(call)
        sinks = self._sink_tokens(call)[:, None, :, None]
        for raw, kept in (("raw_keys", "k_near"), ("raw_values", "v_near")):
            rows, near = call.by_head(raw), call.by_head(kept)
            near[:, :, : self.sinks] = rows.gather(2, sinks.expand(-1, rows.shape[1], -1, rows.shape[3]))
            near[:, :, self.sinks : self.sinks + self.window] = rows[:, :, far.stop : prompt]
        call.by_head("keys_fp32").copy_(call.by_head("raw_keys")[:, :, far])
        call.state["padding"].copy_(call.first().clamp(max=far.stop - far.start)[:, None, None])

    def offload_values(self, call: Call) -> list[Piece]:
        return [(call.by_head("index_values"), call.by_head("raw_values")[:, :, self._far(call)])]

    def attend_near(self, call: Call) -> None:
        keys, values = (call.by_head(name)[:, :, : self._rows(call)] for name in ("k_near", "v_near"))
        part = partial_attention(call.q, keys, values, scale=call.scale, mask=self._mask(call), softcap=call.softcap)
        _put(call.state["near_out"], *part)

    def _far(self, call: Call) -> slice:
        """The tokens that are indexed."""
        return slice(self.sinks, call.step.prompt_tokens - self.window)

    def _rows(self, call: Call) -> int:
        return self.sinks + self.window + call.step.generated_tokens

    def _sink_tokens(self, call: Call) -> Tensor:
        """int64 (batch, sink_tokens); of a row with fewer tokens some are in the window, or none at all."""
        tokens = call.first()[:, None] + torch.arange(self.sinks, device=call.q.device)
        return tokens.clamp(max=call.step.prompt_tokens - 1)

    def _mask(self, call: Call) -> Tensor | None:
        """Which near rows may be attended to, (batch, 1, 1, rows): each token once, no padding; None for all."""
        seen = call.seen
        if seen is None:
            return None
        outside = self._far(call).stop
        sinks = call.first()[:, None] + torch.arange(self.sinks, device=seen.device) < outside
        return torch.cat([sinks, seen[:, outside:]], dim=1)[:, None, None]


class _Far:
    """What the host holds and does; `build_graph` prepares it on the device."""

    def __init__(self, policy: RetrievalAttention) -> None:
        self.policy, self.top_k = policy, policy.top_k
        self.graph = GraphParameters(
            degree=policy.degree,
            scanned=policy.scanned,
            scan_factor=policy.scan_factor,
            train_queries=TRAIN_QUERIES,
            entries=ENTRIES,
        )

    def build_lists(self, call: Call) -> None:
        """Keys change places; values stay where they are, and are found by the ids."""
        for row, padding in enumerate(call.state["padding_host"].flatten().tolist()):
            _lists(call, slice(row, row + 1)).arrange(first=padding, rounds=KMEANS_ROUNDS, seed=0)

    def build_graph(self, call: Call) -> None:
        """Link the real keys of each row; this waits for the device where there is padding."""
        keys, links, entries = (call.by_head(name) for name in ("keys_fp32", "links", "entry_points"))
        queries = call.q
        if not call.step.whole_prompt:
            queries = call.state["queries"][:, : call.step.tokens].transpose(1, 2)
        padded = [0] * len(keys) if call.seen is None else call.state["padding"].flatten().tolist()
        for row, padding in enumerate(padded):
            links[row], entries[row] = 0, 0
            if padding < keys.shape[2]:
                found, begins = link(keys[row, :, padding:], queries[row, :, padding:], self.graph)
                links[row, :, padding:] = found + padding
                entries[row, ..., 0] = begins + padding

    def search(self, call: Call) -> None:
        """For all rows and heads at once."""
        found = self._index(call).search(call.state["q_host"].flatten(0, 2), self.top_k)
        table = call.state["found"]
        table[..., 0] = found.scores.view(table.shape[:3])
        _ids(table).copy_(found.ids.view(table.shape[:3]))
        if found.followed is not None:
            for name, of in (("visited", found.scanned), ("followed", found.followed)):
                call.counts[name] = of.view(len(table), -1, call.shape.group).sum(dim=2)

    def attend_far(self, call: Call) -> None:
        """The softmax over what was found, the scores being at hand; where nothing was, out 0 and lse -inf."""
        table, values = call.state["found"], call.by_head("index_values")
        ids = _ids(table).long()
        scores = table[..., 0] * call.scale
        if call.softcap is not None:
            scores = call.softcap * torch.tanh(scores / call.softcap)
        scores = scores.masked_fill(ids < 0, -torch.inf)
        lse = torch.logsumexp(scores, dim=2)
        weights = torch.exp(scores - lse.masked_fill(lse == -torch.inf, 0)[..., None])
        batch, kv_heads, keys, v_head_dim = values.shape
        first = torch.arange(batch * kv_heads).repeat_interleave(call.shape.group) * keys
        rows = first.view(batch, -1, 1) + ids.clamp(min=0)
        picked = values.view(-1, v_head_dim)[rows].float().masked_fill((ids < 0)[..., None], 0)
        _put(call.state["far_host"], weights[:, :, None] @ picked, lse[..., None])

    def _index(self, call: Call) -> Index:
        """The index of all rows and heads at once, over the tensors of the arena."""
        keys = call.by_head("index_keys").flatten(0, 1)
        padding = call.state["padding_host"].long().flatten().repeat_interleave(call.shape.kv_heads)
        if self.policy.index == "flat":
            return Flat(keys, padding=padding, scans=call.shape.group if self.policy.scan_per == "query_head" else 1)
        if self.policy.index == "ivf":
            probe = max(1, part_of(self.policy.lists, self.policy.probe_share))
            return Ivf(_lists(call, slice(None)), probe)
        links, entries = (call.by_head(name).flatten(0, 1) for name in ("graph", "entries"))
        return Graph(keys, links, entries[..., 0], self.graph, padding)


def _keep_queries(call: Call) -> None:
    call.state["queries"][:, call.step.past_tokens : call.step.tokens] = call.q.transpose(1, 2)


def _attend(call: Call) -> None:
    if call.step.prefilling:
        attend_raw(call)
        return
    parts = [_partial(call.state[name]) for name in ("near_out", "far_out")]
    call.out = merge(parts, sink_logits=call.sinks).to(call.q.dtype)


def _lists(call: Call, rows: slice) -> Lists:
    """The inverted files of some rows of the batch, one KV head after the other."""
    names = ("index_keys", "list_ids", "list_centroids", "list_starts")
    keys, ids, centroids, starts = (call.by_head(name)[rows].flatten(0, 1) for name in names)
    return Lists(keys, ids[..., 0], centroids, starts[..., 0])


def _ids(found: Tensor) -> Tensor:
    """The ids of a table (..., 2) of scores and ids: the bits of an int32 stand beside an fp32."""
    return found.view(torch.int32)[..., 1]


def _put(partial: Tensor, out: Tensor, lse: Tensor) -> None:
    """Into (batch, 1, heads, v_head_dim + 1) an output (batch, heads, 1, v_head_dim) and its (batch, heads, 1)."""
    partial[:, 0, :, :-1] = out[:, :, 0]
    partial[:, 0, :, -1:] = lse


def _partial(partial: Tensor) -> tuple[Tensor, Tensor]:
    """What `_put` has put there."""
    return partial[:, 0, :, None, :-1], partial[:, 0, :, -1:]
