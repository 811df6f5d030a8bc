"""Who sends (balanced among the ranks that hold a piece) and when (rounds that fit the staging memory).

Knows bytes and ranks only.
"""

from __future__ import annotations

import numpy as np

from hybridflow.resharding.boxes import Ints
from hybridflow.resharding.pieces import Pieces


def choose_senders(pieces: Pieces, num_bytes: Ints, num_ranks: int) -> Ints:
    """The sender of every piece: int64 [pieces].

    Largest piece first to the candidate that has sent least so far (ties: the nearest rank), then pieces are
    handed on as long as that evens out two loads. After that no sender could hand a piece to a candidate with
    more than that piece's bytes less to send.
    """
    num_candidates = np.array([len(one) for one in pieces.candidate_sets], dtype=np.int64)
    only = np.array([one[0] for one in pieces.candidate_sets], dtype=np.int64)
    sender = only[pieces.candidates] if len(only) else pieces.candidates.copy()
    free = num_candidates[pieces.candidates] > 1 if len(only) else np.zeros(0, dtype=bool)
    fixed = ~free & (sender != pieces.receiver)
    initial = np.zeros(num_ranks, dtype=np.int64)
    np.add.at(initial, sender[fixed], num_bytes[fixed])
    load: list[int] = initial.tolist()
    open_pieces = np.nonzero(free)[0]
    open_pieces = open_pieces[np.argsort(-num_bytes[open_pieces], kind="stable")]
    sets, receiver = pieces.candidate_sets, pieces.receiver.tolist()
    candidates, sizes = pieces.candidates.tolist(), num_bytes.tolist()
    for piece in open_pieces.tolist():
        to = receiver[piece]
        best = min(sets[candidates[piece]], key=lambda rank: (load[rank], abs(to - rank)))
        sender[piece] = best
        load[best] += sizes[piece]
    _hand_on(open_pieces, sender, candidates, sizes, sets, load)
    return sender


def _hand_on(
    pieces: Ints,
    sender: Ints,
    candidates: list[int],
    sizes: list[int],
    sets: list[tuple[int, ...]],
    load: list[int],
) -> None:
    """Each move lowers the sum of squared loads, so this ends; it rarely moves anything after the greedy
    pass."""
    moved = True
    while moved:
        moved = False
        for piece in pieces.tolist():
            now = int(sender[piece])
            best = min(sets[candidates[piece]], key=load.__getitem__)
            if load[now] - load[best] > sizes[piece]:
                sender[piece] = best
                load[now] -= sizes[piece]
                load[best] += sizes[piece]
                moved = True


def assign_rounds(sender: Ints, receiver: Ints, num_bytes: Ints, num_ranks: int, limit: int) -> Ints:
    """The round of every transfer, such that no rank sends or receives more than `limit` bytes in one: int64
    [transfers].

    Transfers are taken in the order of their sender's progress, so that all senders are busy in all rounds,
    and go to the first round with room on both sides.
    """
    # Progress: the fraction of its bytes that a sender has sent before this transfer; its receivers take
    # turns.
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
