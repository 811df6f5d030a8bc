"""The sender of every request, balanced among the candidates, and the round of every transfer, such
that rounds fit the staging memory.

It works on bytes and ranks only.
"""

from __future__ import annotations

import numpy as np

from hybridflow.resharding.boxes import Ints
from hybridflow.resharding.requests import Requests


def choose_senders(requests: Requests, num_bytes: Ints, num_ranks: int) -> Ints:
    """The sender of every request: int64 [requests].

    The largest request goes first, to the candidate that has sent least so far (ties: the nearest
    rank). Then requests move to another candidate as long as that evens out two loads. After that
    no sender could give a request to a candidate that has more than the request's bytes less to
    send.
    """
    if not len(requests.candidates):
        return requests.candidates.copy()
    sets, receiver = requests.candidate_sets, requests.receiver.tolist()
    num_candidates = np.array(list(map(len, sets)), dtype=np.int64)
    first = np.array([ranks[0] for ranks in sets], dtype=np.int64)
    sender = first[requests.candidates]
    has_choice = num_candidates[requests.candidates] > 1
    fixed = ~has_choice & (sender != requests.receiver)
    initial = np.zeros(num_ranks, dtype=np.int64)
    np.add.at(initial, sender[fixed], num_bytes[fixed])
    load: list[int] = initial.tolist()
    undecided = np.nonzero(has_choice)[0]
    undecided = undecided[np.argsort(-num_bytes[undecided], kind="stable")]
    candidates, sizes = requests.candidates.tolist(), num_bytes.tolist()
    for request in undecided.tolist():
        to = receiver[request]
        best = min(sets[candidates[request]], key=lambda rank: (load[rank], abs(to - rank)))
        sender[request] = best
        load[best] += sizes[request]
    _even_out(undecided, sender, candidates, sizes, sets, load)
    return sender


def _even_out(
    requests: Ints,
    sender: Ints,
    candidates: list[int],
    sizes: list[int],
    sets: list[tuple[int, ...]],
    load: list[int],
) -> None:
    """Moves requests between candidates until no move evens out two loads.

    Each move lowers the sum of squared loads, so this ends; it rarely moves anything after the
    greedy pass.
    """
    moved = True
    while moved:
        moved = False
        for request in requests.tolist():
            current = int(sender[request])
            best = min(sets[candidates[request]], key=load.__getitem__)
            if load[current] - load[best] > sizes[request]:
                sender[request] = best
                load[current] -= sizes[request]
                load[best] += sizes[request]
                moved = True


def assign_rounds(
    sender: Ints, receiver: Ints, num_bytes: Ints, num_ranks: int, limit: int
) -> Ints:
    """The round of every transfer, such that no rank sends or receives more than `limit` bytes in
    one: int64 [transfers].

    Transfers are taken in the order of their sender's progress, so that all senders are busy in all
    rounds, and go to the first round that both ranks have memory for.
    """
    # Progress: the fraction of its bytes that a sender has sent before this transfer; its receivers
    # take turns.
    turn = np.lexsort((np.arange(len(sender)), (receiver - sender) % num_ranks, sender))
    place = _rank_within(sender[turn], receiver[turn])
    turn = turn[np.lexsort(((receiver[turn] - sender[turn]) % num_ranks, place, sender[turn]))]
    running = np.cumsum(num_bytes[turn]) - num_bytes[turn]
    first = np.searchsorted(sender[turn], sender[turn])
    total = np.zeros(num_ranks, dtype=np.int64)
    np.add.at(total, sender, num_bytes)
    progress = (running - running[first]) / np.maximum(total[sender[turn]], 1)
    order = turn[np.argsort(progress, kind="stable")]

    result = np.zeros(len(sender), dtype=np.int64)
    sent: list[list[int]] = [[] for _ in range(num_ranks)]
    received: list[list[int]] = [[] for _ in range(num_ranks)]
    send_low, receive_low = [0] * num_ranks, [0] * num_ranks
    nearly_full = limit - limit // 16
    for i, s, r, size in zip(
        order.tolist(),
        sender[order].tolist(),
        receiver[order].tolist(),
        num_bytes[order].tolist(),
        strict=True,
    ):
        out, into = sent[s], received[r]
        now = max(send_low[s], receive_low[r])
        while True:
            out.extend([0] * (now + 1 - len(out)))
            into.extend([0] * (now + 1 - len(into)))
            if out[now] + size <= limit and into[now] + size <= limit:
                break
            now += 1
        out[now] += size
        into[now] += size
        result[i] = now
        while send_low[s] < len(out) and out[send_low[s]] >= nearly_full:
            send_low[s] += 1
        while receive_low[r] < len(into) and into[receive_low[r]] >= nearly_full:
            receive_low[r] += 1
    return result


def _rank_within(first: Ints, second: Ints) -> Ints:
    """For pairs that come in runs of equal (first, second): the position of each inside its run."""
    change = np.ones(len(first), dtype=bool)
    change[1:] = (first[1:] != first[:-1]) | (second[1:] != second[:-1])
    begin = np.nonzero(change)[0]
    length = np.diff(np.append(begin, len(first)))
    return np.arange(len(first)) - np.repeat(begin, length)
