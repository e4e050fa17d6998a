"""Do the ranks agree on what they send each other?"""

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence

from megavlm.dryrun.record import Call

POINT_TO_POINT = ("send", "recv_", "recv_any_source_")


def disagreements(calls_by_rank: Mapping[int, Sequence[Call]]) -> list[str]:
    """What would hang or fail, in words, causes first; empty if nothing.

    Replays all ranks: a collective takes place once it is the next one of every member of its
    group, with the same types and sizes. What one rank sends another must be what that receives, in
    the same order. Ranks that were not run are ignored.
    """
    return [*_stuck(calls_by_rank), *_unmatched(calls_by_rank)]


class _Replay:
    """Of each rank, its collectives and how many have taken place."""

    def __init__(self, calls_by_rank: Mapping[int, Sequence[Call]]) -> None:
        numbers: dict[Call, int] = {}  # which are faster to compare
        self.queues: dict[int, list[int]] = {}
        for rank, calls in calls_by_rank.items():
            collectives = (call for call in calls if call.operation not in POINT_TO_POINT)
            self.queues[rank] = [numbers.setdefault(call, len(numbers)) for call in collectives]
        self.calls = list(numbers)
        self.members = [[r for r in call.ranks if r in self.queues] for call in self.calls]
        self.done = dict.fromkeys(self.queues, 0)

    def following(self, rank: int) -> int | None:
        """The number of a rank's next call."""
        queue, done = self.queues[rank], self.done[rank]
        return queue[done] if done < len(queue) else None

    def run(self) -> None:
        pending = list(self.queues)
        while pending:
            number = self.following(pending.pop())
            if number is None:
                continue
            members = self.members[number]
            if all(self.following(member) == number for member in members):
                for member in members:
                    self.done[member] += 1
                pending.extend(members)

    def is_over(self, number: int | None, group: tuple[int, ...]) -> bool:
        """Whether a call is one of a group."""
        return number is not None and self.calls[number].ranks == group

    def where(self, rank: int) -> str:
        """A rank's next call and its place, in words."""
        number, length = self.following(rank), len(self.queues[rank])
        if number is None:
            return f"rank {rank} has ended, after {length} collectives"
        place = f"collective {self.done[rank] + 1} of {length}"
        return f"rank {rank} is in {place}, {describe(self.calls[number])}"


def _stuck(calls_by_rank: Mapping[int, Sequence[Call]]) -> list[str]:
    replay = _Replay(calls_by_rank)
    replay.run()
    causes: list[str] = []
    consequences: list[str] = []
    stuck = [n for rank in replay.queues if (n := replay.following(rank)) is not None]
    for group in sorted({replay.calls[number].ranks for number in stuck}):
        nexts = {rank: replay.following(rank) for rank in group if rank in replay.queues}
        waiting = {rank: n for rank, n in nexts.items() if replay.is_over(n, group)}
        # The odd one out differs from what most wait in.
        [(usual, _)] = Counter(waiting.values()).most_common(1)
        first = next(r for r, n in waiting.items() if n == usual)
        for odd, number in nexts.items():
            if number != usual:
                text = f"{replay.where(odd)}, but {replay.where(first)}"
                mismatch = number is None or replay.is_over(number, group)
                (causes if mismatch else consequences).append(text)
    return [*causes, *consequences]


def _unmatched(calls_by_rank: Mapping[int, Sequence[Call]]) -> list[str]:
    sent: dict[tuple[int, int], list[Call]] = defaultdict(list)
    received: dict[tuple[int, int], list[Call]] = defaultdict(list)
    for rank, calls in calls_by_rank.items():
        for call in calls:
            if call.peer in calls_by_rank and call.peer is not None:
                if call.operation == "send":
                    sent[rank, call.peer].append(call)
                elif call.operation == "recv_":
                    received[call.peer, rank].append(call)
    problems: list[str] = []
    for pair in sorted(sent.keys() | received.keys()):
        sends, receives = sent[pair], received[pair]
        for place in range(max(len(sends), len(receives))):
            send, receive = (c[place] if place < len(c) else None for c in (sends, receives))
            if send is None or receive is None or send.tensors != receive.tensors:
                problems.append(
                    f"rank {pair[0]} sends rank {pair[1]} as number {place + 1} of {len(sends)} "
                    f"{describe(send)}, but that receives, of {len(receives)}, {describe(receive)}"
                )
                break
    return problems


def describe(call: Call | None) -> str:
    """A call in a few words."""
    if call is None:
        return "nothing"
    shown = ", ".join(f"{count} {dtype}" for dtype, count in call.tensors[:4])
    more = ", ..." if len(call.tensors) > 4 else ""
    return f"{call.operation} of {shown}{more} over ranks {ranges(call.ranks)}"


def ranges(ranks: Sequence[int]) -> str:
    """Ranks in ascending order, in a few words: `0-7, 16`."""
    runs: list[list[int]] = []
    for rank in ranks:
        if runs and rank == runs[-1][-1] + 1:
            runs[-1][1:] = [rank]
        else:
            runs.append([rank])
    texts = ["-".join(map(str, run)) for run in runs]
    if len(texts) > 4:
        texts = [*texts[:2], "...", texts[-1]]
    return ", ".join(texts)
