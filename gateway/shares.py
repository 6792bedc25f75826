"""Owns who makes room in a bounded table that tenants share: what its largest holder has used the longest ago."""

from collections import OrderedDict
from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import Generic, TypeVar

Key = TypeVar("Key", bound=Hashable)


@dataclass(frozen=True, slots=True)
class _Entry:
    """`number` grows with each use of any entry."""

    number: int
    size: int


@dataclass(slots=True)
class _Share(Generic[Key]):
    """What one tenant holds, in the order of use."""

    entries: OrderedDict[Key, _Entry] = field(default_factory=OrderedDict[Key, _Entry])
    total: int = 0

    @property
    def first(self) -> tuple[Key, _Entry]:
        return next(iter(self.entries.items()))


class Shares(Generic[Key]):
    """The keys of a table, whose each is, how much it takes, and in which order they were used.

    Whoever makes room as `first` says displaces its own entries, or those of a tenant that holds no less than itself.
    That costs a look at each tenant that holds something; anything else costs the same whatever is held.
    """

    def __init__(self) -> None:
        self.total = 0
        self._shares: dict[str | None, _Share[Key]] = {}
        self._owners: dict[Key, str | None] = {}
        self._num_uses = 0

    def __len__(self) -> int:
        return len(self._owners)

    def use(self, key: Key, tenant: str | None, size: int = 1) -> None:
        """A key is used, now of this size. None: of no tenant, as where there are none."""
        self.discard(key)
        self._num_uses += 1
        share = self._shares.setdefault(tenant, _Share())
        share.entries[key] = _Entry(self._num_uses, size)
        share.total += size
        self.total += size
        self._owners[key] = tenant

    def discard(self, key: Key) -> None:
        if key not in self._owners:
            return
        tenant = self._owners.pop(key)
        share = self._shares[tenant]
        size = share.entries.pop(key).size
        share.total -= size
        self.total -= size
        if not share.entries:
            del self._shares[tenant]

    @property
    def first(self) -> Key:
        """Of the tenant that holds most: what it has used the longest ago. Of several that hold as much, whose is the
        oldest. Raises ValueError if there is nothing."""
        largest = max(self._shares.values(), key=lambda share: (share.total, -share.first[1].number))
        return largest.first[0]
