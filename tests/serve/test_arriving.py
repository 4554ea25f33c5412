"""How fast large bodies are read, whose arrival would cost others' answers."""

from __future__ import annotations

import asyncio

import pytest

from engram_jax.serve.http import arriving
from engram_jax.serve.http.arriving import Arriving

SECONDS = 0.2  # in which a body must arrive


@pytest.fixture
def slow(monkeypatch):
    monkeypatch.setattr(arriving, "RATE", 1_000_000)


async def arrives(bodies: Arriving, parts: list[int], then: float = 0) -> float:
    """When a body of these parts has arrived, on the loop's clock; its client stops for `then`
    seconds before the end."""
    async with asyncio.timeout(SECONDS) as timeout:
        with bodies.one(timeout) as body:
            for size in parts:
                await body.paced(size)
                body.grow(size)
            await asyncio.sleep(then)
    return asyncio.get_running_loop().time()


def test_large_ones_share_a_rate_and_small_ones_do_not_wait(slow):
    async def both() -> list[float]:
        began, bodies = asyncio.get_running_loop().time(), Arriving(1 << 30)
        large = [arrives(bodies, [100_000] * 3) for _ in range(2)]
        small = arrives(bodies, [1000] * 60)
        return [ended - began for ended in await asyncio.gather(*large, small)]

    *large, small = asyncio.run(both())
    assert 0.59 < max(large) < 2  # 600,000 bytes; longer than SECONDS, which is the client's time
    assert small < min(large)


def test_a_client_that_stops_has_its_time_and_no_more(slow):
    async def one() -> float:
        began = asyncio.get_running_loop().time()
        with pytest.raises(TimeoutError):
            await arrives(Arriving(1 << 30), [100_000] * 3, then=60)
        return asyncio.get_running_loop().time() - began

    assert 0.3 + SECONDS - 0.02 < asyncio.run(one()) < 5


def test_one_that_is_given_up_ends_while_it_waits(slow):
    async def one() -> float:
        bodies = Arriving(330_000)
        large = asyncio.create_task(arrives(bodies, [300_000, 2_000_000]))
        while not bodies.held:  # its first part has been waited for, and its second one is
            await asyncio.sleep(0.01)
        began = asyncio.get_running_loop().time()
        await arrives(bodies, [60_000])
        with pytest.raises(TimeoutError):
            await large
        return asyncio.get_running_loop().time() - began

    assert asyncio.run(one()) < 1.5  # of two seconds
