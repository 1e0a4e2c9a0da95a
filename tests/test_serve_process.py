"""What the collector goes through in a service, and what it does not."""

from __future__ import annotations

import asyncio
import gc
import weakref
from collections.abc import Iterator
from typing import Any

import pytest

from nbvision.serve import process, service


class Pipeline:
    """Of a cycle, as many are that hold callbacks."""

    def __init__(self) -> None:
        self.itself = self


@pytest.fixture(autouse=True)
def as_before() -> Iterator[None]:
    yield
    gc.unfreeze()


def test_what_lives_is_not_gone_through() -> None:
    pipeline = Pipeline()
    alive = weakref.ref(pipeline)
    process.settle()
    assert gc.get_freeze_count() > 1000
    del pipeline
    gc.collect()
    assert alive() is not None
    process.settle()
    assert alive() is None


def test_a_pipeline_that_is_replaced_goes_although_it_was_frozen() -> None:
    closed: list[bool] = []

    class Served(Pipeline):
        def close(self) -> None:
            closed.append(True)

    async def replace() -> Any:
        served: Any = Served()
        alive = weakref.ref(served)
        process.settle()
        closing = asyncio.create_task(service._close(served))
        del served
        await closing
        return alive

    alive = asyncio.run(replace())
    assert closed == [True]
    assert alive() is None
    assert gc.get_freeze_count() > 1000
