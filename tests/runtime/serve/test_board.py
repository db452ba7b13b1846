# SPDX-License-Identifier: Apache-2.0
"""Who waits is told once, and stops waiting when told to."""

import asyncio

import pytest

from ltxrt.serve.board import Board


def test_news_that_came_before_the_wait_are_not_missed():
    async def scenario():
        board = Board()
        with board.watch("a") as watch, board.watch(None) as every, board.watch("b") as other:
            board.changed("a")
            await asyncio.wait_for(watch.wait(30), 1)
            await asyncio.wait_for(every.wait(30), 1)
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(other.wait(30), 0.05)
            await other.wait(0.01)  # its own time

    asyncio.run(scenario())


def test_who_is_cancelled_while_news_come_is_cancelled():
    async def scenario():
        board = Board()

        async def follow():
            with board.watch("a") as watch:
                while True:
                    await watch.wait(30)

        following = asyncio.create_task(follow())
        await asyncio.sleep(0)
        for _ in range(3):
            await asyncio.sleep(0)
        board.changed("a")
        await asyncio.sleep(0)
        following.cancel()
        done, _ = await asyncio.wait((following,), timeout=1)
        assert done
        assert following.cancelled()
        assert board._watches == {}

    asyncio.run(scenario())
