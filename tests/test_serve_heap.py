"""What the collector goes through in a service, and what it does not."""

from __future__ import annotations

import gc
import weakref

from nbvision.serve import heap


def test_what_lives_is_not_gone_through_until_it_is_dropped() -> None:
    """Frozen objects cost the collector nothing; what a pipeline leaves behind goes all the same."""

    class Pipeline:
        def __init__(self) -> None:
            self.itself = self

    pipeline = Pipeline()
    alive = weakref.ref(pipeline)
    try:
        heap.settle()
        assert gc.get_freeze_count() > 1000
        del pipeline
        gc.collect()
        assert alive() is not None  # it is not looked at
        heap.settle()
        assert alive() is None
    finally:
        gc.unfreeze()
