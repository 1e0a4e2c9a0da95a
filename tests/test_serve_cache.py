"""Results by content: what is kept, for whom, and for how long; and spans, which tell of all that in one process."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nbvision.serve.cache import ResultCache, key_of


def counting() -> tuple[list[Any], Any]:
    asked: list[Any] = []

    def computing(value: Any, *, seconds: float = 0.0) -> Any:
        async def compute() -> Any:
            asked.append(value)
            await asyncio.sleep(seconds)
            if isinstance(value, Exception):
                raise value
            return value

        return compute

    return asked, computing


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(1, 40)), max_size=60), st.integers(0, 120))
def test_it_keeps_what_was_used_last_within_its_bytes(uses: list[tuple[int, int]], limit: int) -> None:
    sizes: dict[str, int] = {}

    async def run() -> None:
        cache = ResultCache(limit, lambda result: sizes[result])
        model: dict[str, int] = {}  # by last use
        for key, size in uses:
            text = str(key)
            sizes.setdefault(text, size)
            asked, computing = counting()
            assert await cache.get(text, computing(text)) == text
            assert bool(asked) == (text not in model)
            whole = sizes[text] + len(text)
            model.pop(text, None)
            if limit and whole <= limit:
                model[text] = whole
            while sum(model.values()) > limit:
                model.pop(next(iter(model)))
            assert cache.used_bytes == sum(model.values())
            assert len(cache) == len(model)

    asyncio.run(run())


def test_who_asks_for_the_same_waits_for_the_first() -> None:
    async def run() -> None:
        asked, computing = counting()
        cache = ResultCache(1000, lambda result: 1)
        answers = await asyncio.gather(*(cache.get("k", computing("v", seconds=0.02)) for _ in range(20)))
        assert answers == ["v"] * 20
        assert asked == ["v"]
        assert (cache.hits, cache.misses) == (19, 1)

    asyncio.run(run())


def test_failures_are_nobody_elses() -> None:
    """Who waited for somebody that failed, or went away, asks by itself."""

    async def run() -> None:
        asked, computing = counting()
        cache = ResultCache(1000, lambda result: 1)
        first = asyncio.create_task(cache.get("k", computing(ValueError("mine"), seconds=0.02)))
        await asyncio.sleep(0.005)
        second = asyncio.create_task(cache.get("k", computing("good", seconds=0.05)))
        with pytest.raises(ValueError, match="mine"):
            await first
        await asyncio.sleep(0.005)
        third = asyncio.create_task(cache.get("k", computing("better")))
        await asyncio.sleep(0.005)
        second.cancel()
        assert await third == "better"
        assert await cache.get("k", computing("another")) == "better"
        assert len(asked) == 3

    asyncio.run(run())


def test_who_waits_and_goes_away_takes_nothing_from_the_first() -> None:
    async def run() -> None:
        asked, computing = counting()
        cache = ResultCache(1000, lambda result: 1)
        first = asyncio.create_task(cache.get("k", computing("v", seconds=0.03)))
        await asyncio.sleep(0.005)
        second = asyncio.create_task(cache.get("k", computing("w")))
        await asyncio.sleep(0.005)
        second.cancel()
        assert await first == "v"
        assert asked == ["v"]

    asyncio.run(run())


def test_a_version_is_forgotten_alone() -> None:
    async def run() -> None:
        _, computing = counting()
        cache = ResultCache(1000, lambda result: 1)
        for version in ("a", "ab"):
            await cache.get(key_of(version, b"x"), computing(version))
        cache.forget("a")
        assert len(cache) == 1
        assert await cache.get(key_of("ab", b"x"), computing("no")) == "ab"
        assert await cache.get(key_of("a", b"x"), computing("anew")) == "anew"

    asyncio.run(run())


def test_spans(tmp_path: Path) -> None:
    """A request's span continues the client's; a batch, which may be of several requests, has a trace of its own."""
    trace = pytest.importorskip("opentelemetry.trace")
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import SimpleSpanProcessor
    from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

    from nbvision.serve.app import make_app
    from nbvision.serve.service import Service

    exporter, provider = InMemorySpanExporter(), TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    trace.set_tracer_provider(provider)
    (tmp_path / "serve.yaml").write_text(
        "pipelines: {echo: {kind: python, device: cpu, function: 'serve_functions:echo'}}"
    )

    async def run() -> None:
        service = Service(tmp_path / "serve.yaml")
        app = make_app(service)
        async with (
            app.router.lifespan_context(app),
            httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as client,
        ):
            exporter.clear()
            headers = {"traceparent": "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"}
            (await client.post("/v1/echo", content=b"x", headers=headers)).raise_for_status()

    asyncio.run(run())
    spans = {span.name: span for span in exporter.get_finished_spans()}
    request, answer, batch = spans["POST /v1/{model}"], spans["answer"], spans["batch"]
    assert f"{request.context.trace_id:032x}" == "0af7651916cd43dd8448eb211c80319c"
    assert f"{request.parent.span_id:016x}" == "b7ad6b7169203331"
    assert answer.context.trace_id == request.context.trace_id
    assert request.start_time <= answer.start_time <= batch.start_time
    assert batch.end_time <= answer.end_time <= request.end_time
    assert answer.attributes["items"] == batch.attributes["items"] == 1
    assert answer.attributes["model"] == batch.attributes["model"] == "echo"
