"""Places in memory that several processes share: who takes one, and gives it back."""

from __future__ import annotations

import bisect

__all__ = ["Places"]


class Places:
    """Stretches of one memory, the first that is large enough. For one thread at a time.

    Parameters
    ----------
    size_bytes : int
        Of all of it.
    """

    def __init__(self, size_bytes: int) -> None:
        self.size_bytes = size_bytes
        self._free = [(0, size_bytes)]  # places and sizes, in order

    @property
    def free_bytes(self) -> int:
        return sum(size_bytes for _, size_bytes in self._free)

    def take(self, size_bytes: int) -> int | None:
        """Where so many bytes are, or None if there are not so many in one piece."""
        for index, (place, free_bytes) in enumerate(self._free):
            if free_bytes >= size_bytes:
                rest = (place + size_bytes, free_bytes - size_bytes)
                self._free[index : index + 1] = [rest] if rest[1] else []
                return place
        return None

    def give_back(self, place: int, size_bytes: int) -> None:
        """What was taken is free again, and one with its neighbours."""
        index = bisect.bisect(self._free, (place, size_bytes))
        self._free.insert(index, (place, size_bytes))
        for left in (index, index - 1):
            if 0 <= left < len(self._free) - 1 and sum(self._free[left]) == self._free[left + 1][0]:
                both = (self._free[left][0], self._free[left][1] + self._free[left + 1][1])
                self._free[left : left + 2] = [both]
