"""Results by the content of what they are of: the same picture is recognized once."""

from __future__ import annotations

import asyncio
import collections
import hashlib
from collections.abc import Awaitable, Callable
from typing import Any

__all__ = ["ResultCache", "key_of"]


def key_of(version: str, data: bytes) -> str:
    """What a result is kept under: it changes with the bytes of the image, and with the version of the pipeline."""
    return f"{version}:{hashlib.sha256(data).hexdigest()}"


class ResultCache:
    """The results used last, within a number of bytes. For one event loop.

    Who asks for what somebody else is computing waits for that. Failures are not kept.

    Parameters
    ----------
    limit_bytes : int
        Of the keys and results together, as ``size_of`` counts these; 0 keeps none.
    size_of : callable
        Gives the bytes of a result.
    """

    def __init__(self, limit_bytes: int, size_of: Callable[[Any], int]) -> None:
        self.limit_bytes = limit_bytes
        self.used_bytes = 0
        self.hits = self.misses = 0
        self._size_of = size_of
        self._kept: collections.OrderedDict[str, tuple[Any, int]] = collections.OrderedDict()
        self._under_way: dict[str, asyncio.Future[Any]] = {}

    def __len__(self) -> int:
        return len(self._kept)

    async def get(self, key: str, compute: Callable[[], Awaitable[Any]]) -> Any:
        """The result under ``key``, computed if it is not there; raises what ``compute`` raises."""
        if not self.limit_bytes:
            return await compute()
        while True:
            if key in self._kept:
                self._kept.move_to_end(key)
                self.hits += 1
                return self._kept[key][0]
            if key not in self._under_way:
                break
            try:  # shielded: who waits and goes away does not take it from the others
                result = await asyncio.shield(self._under_way[key])
            except Exception:  # somebody else's deadline, perhaps: this one has its own
                continue
            self.hits += 1
            return result
        self.misses += 1
        future: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self._under_way[key] = future
        try:
            result = await compute()
        except BaseException as error:
            failed = error if isinstance(error, Exception) else RuntimeError("the request was taken back")
            future.set_exception(failed)
            future.exception()  # nobody may wait for it
            raise
        else:
            future.set_result(result)
            self._keep(key, result)
            return result
        finally:
            del self._under_way[key]

    def _keep(self, key: str, result: Any) -> None:
        size_bytes = len(key) + self._size_of(result)
        if size_bytes > self.limit_bytes:
            return
        self._kept[key] = result, size_bytes
        self.used_bytes += size_bytes
        while self.used_bytes > self.limit_bytes:
            _, (_, freed_bytes) = self._kept.popitem(last=False)
            self.used_bytes -= freed_bytes

    def forget(self, version: str) -> None:
        """Drop the results of a version of a pipeline."""
        for key in [key for key in self._kept if key.startswith(f"{version}:")]:
            self.used_bytes -= self._kept.pop(key)[1]
