"""A consumer group in memory: members, generations and the eager rebalance of Kafka's classic protocol.

Decides who owns what and when. Invariant: in one generation a partition has one owner, and a new generation begins
only when every member that is still in the group has rejoined by polling, or has been expelled.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from oppu.values import Partition


@dataclass(slots=True, eq=False)
class Member:
    """One member. ``heard`` is when it was last known to live, on the clock's monotonic scale."""

    id: str
    topics: tuple[str, ...]
    heard: float
    generation: int = -1
    assigned: frozenset[Partition] = frozenset()
    alive: bool = True


@dataclass(slots=True, eq=False)
class Group:
    """A group and its committed offsets."""

    name: str
    generation: int = 0
    members: dict[str, Member] = field(default_factory=dict)
    committed: dict[Partition, int] = field(default_factory=dict)
    _rejoined: set[str] = field(default_factory=set)
    _rebalancing: bool = False
    _assignment: dict[str, frozenset[Partition]] = field(default_factory=dict)

    def join(self, member: Member) -> None:
        """Let a member in; it takes part from its next poll."""
        self.members[member.id] = member
        self.request_rebalance()

    def leave(self, member_id: str) -> None:
        """Take a member out, whether it left or was expelled."""
        if self.members.pop(member_id, None) is not None:
            self._rejoined.discard(member_id)
            self.request_rebalance()

    def request_rebalance(self) -> None:
        """Ask every member to rejoin at its next poll."""
        if not self._rebalancing:
            self._rebalancing = True
            self._rejoined.clear()

    def sync(self, member: Member, counts: Mapping[str, int]) -> bool:
        """Take part in the protocol, as each poll does.

        Args:
            member: Who polls.
            counts: Partitions of each existing topic.

        Returns:
            Whether the member stands in the present generation with its assignment, and may fetch.
        """
        if self._rebalancing:
            self._rejoined.add(member.id)
            if not self._rejoined >= self.members.keys():
                return False
            self._complete(counts)
        if member.generation != self.generation:
            member.generation, member.assigned = self.generation, self._assignment[member.id]
        return True

    def expire(self, due: Callable[[Member], bool]) -> list[Member]:
        """Expel every member for which ``due`` holds and return them."""
        expelled = [member for member in self.members.values() if due(member)]
        for member in expelled:
            self.leave(member.id)
        return expelled

    def is_current(self, member_id: str, generation: int) -> bool:
        """Tell whether this proof of membership is still good."""
        return member_id in self.members and generation == self.generation

    def _complete(self, counts: Mapping[str, int]) -> None:
        self.generation += 1
        self._rebalancing = False
        self._assignment = assign({m.id: m.topics for m in self.members.values()}, counts)


def assign(subscriptions: Mapping[str, tuple[str, ...]], counts: Mapping[str, int]) -> dict[str, frozenset[Partition]]:
    """Share out partitions as Kafka's range assignor does.

    Args:
        subscriptions: Topics of each member.
        counts: Partitions of each existing topic.

    Returns:
        Each member's partitions: of every topic a contiguous range, the first members (by id) one more.
    """
    owned: dict[str, list[Partition]] = {member: [] for member in subscriptions}
    for topic, count in sorted(counts.items()):
        members = sorted(member for member, topics in subscriptions.items() if topic in topics)
        first = 0
        for number, member in enumerate(members):
            size = count // len(members) + (number < count % len(members))
            owned[member] += [Partition(topic, index) for index in range(first, first + size)]
            first += size
    return {member: frozenset(partitions) for member, partitions in owned.items()}
