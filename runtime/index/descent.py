"""The search of a graph as machine code: best first, every inner product counted."""

import numpy as np
from numba import njit, prange

# Sums may be reordered, so that they run in vector registers; infinities keep their meaning.
FAST = {"reassoc", "contract", "nsz", "arcp"}
CHECK = 64  # keys scanned between two looks at the attention mass


@njit(fastmath=FAST, cache=True)
def _push(heap_scores: np.ndarray, heap_ids: np.ndarray, size: int, score: np.float32, key: int) -> None:
    place = size
    while place > 0:
        parent = (place - 1) >> 1
        if heap_scores[parent] >= score:
            break
        heap_scores[place], heap_ids[place] = heap_scores[parent], heap_ids[parent]
        place = parent
    heap_scores[place], heap_ids[place] = score, key


@njit(fastmath=FAST, cache=True)
def _pop(heap_scores: np.ndarray, heap_ids: np.ndarray, size: int) -> int:
    best: int = heap_ids[0]
    last = size - 1
    score, key, place = heap_scores[last], heap_ids[last], 0
    while True:
        child = 2 * place + 1
        if child >= last:
            break
        if child + 1 < last and heap_scores[child + 1] > heap_scores[child]:
            child += 1
        if heap_scores[child] <= score:
            break
        heap_scores[place], heap_ids[place] = heap_scores[child], heap_ids[child]
        place = child
    heap_scores[place], heap_ids[place] = score, key
    return best


@njit(fastmath=FAST, cache=True)
def _mass(scores: np.ndarray, scale: float, highest: float) -> float:
    total = 0.0
    for score in scores:
        total += np.exp((score - highest) * scale)
    return total


@njit(parallel=True, fastmath=FAST, cache=True)
def best_first(
    q: np.ndarray,
    keys: np.ndarray,
    links: np.ndarray,
    entries: np.ndarray,
    padding: np.ndarray,
    allowance: int,
    stop_gain: float,
    ids: np.ndarray,
    scores: np.ndarray,
    scanned: np.ndarray,
    followed: np.ndarray,
) -> None:
    """Search for each head of `q` (heads, head_dim), heads side by side in all threads; `Graph.search` describes it.

    `keys` are fp32 (kv_heads, n, head_dim), `links` int32 (kv_heads, n, degree), `entries` int32 (kv_heads, count),
    `padding` (kv_heads,). Fills `ids` and `scores` (heads, top_k), which hold -1 and -inf before, `scanned`
    and `followed`.
    """
    heads, head_dim = q.shape
    n, degree, top_k = keys.shape[1], links.shape[2], ids.shape[1]
    begins, group = entries.shape[1], heads // keys.shape[0]
    for head in prange(heads):
        kv_head = head // group
        first = padding[kv_head]
        most = min(allowance, n - first)
        seen = np.zeros(n, np.bool_)
        met, met_scores = np.empty(most, np.int32), np.empty(most, np.float32)
        heap_scores, heap_ids = np.empty(most, np.float32), np.empty(most, np.int32)
        front = np.empty(max(degree, begins), np.int32)
        front[:begins] = entries[kv_head]
        width, count, size, sweep, checked, read = begins, 0, 0, n - 1, 0, 0
        while count < most:
            for key in front[:width]:
                if key < first or seen[key] or count == most:
                    continue
                seen[key] = True
                score = np.float32(0)
                for column in range(head_dim):
                    score += q[head, column] * keys[kv_head, key, column]
                met[count], met_scores[count] = key, score
                _push(heap_scores, heap_ids, size, score, key)
                count, size = count + 1, size + 1
            if stop_gain > 0 and count >= checked + CHECK:
                highest, scale = met_scores[:count].max(), 1 / np.sqrt(head_dim)
                added = _mass(met_scores[checked:count], scale, highest)
                if checked > 0 and added < stop_gain * _mass(met_scores[:checked], scale, highest):
                    break
                checked = count
            if count == most:
                break
            if size > 0:
                key = _pop(heap_scores, heap_ids, size)
                size -= 1
                width = degree
                front[:degree] = links[kv_head, key]
                read += 1
            else:  # nothing left to follow: the last key not seen
                while seen[sweep]:
                    sweep -= 1
                front[0], width = sweep, 1
        scanned[head], followed[head] = count, read
        kept = met_scores[:count]
        least = np.partition(kept, max(0, count - top_k))[max(0, count - top_k)] if count else np.float32(0)
        chosen = np.flatnonzero(kept >= least)
        chosen = chosen[np.argsort(-kept[chosen], kind="mergesort")][:top_k]
        for place in range(len(chosen)):
            ids[head, place] = met[chosen[place]]
            scores[head, place] = kept[chosen[place]]
