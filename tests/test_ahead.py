"""What is made in a thread while the caller works: the same items in the same order, and a clean end."""

import contextlib
import threading
import time

import pytest

from ds_embed.data.ahead import made_ahead


def test_items_come_in_order_and_one_is_made_ahead():
    made = []

    def make(item: int) -> int:
        made.append(item)
        return item * item

    found = []
    for result in made_ahead(make, iter(range(20))):
        time.sleep(0.001)
        assert len(made) <= len(found) + 2
        found.append(result)
    assert found == [item * item for item in range(20)] and made == list(range(20))


def test_the_next_item_is_made_while_this_one_is_used():
    started = {item: threading.Event() for item in range(3)}

    def make(item: int) -> int:
        started[item].set()
        return item

    items = made_ahead(make, range(3))
    assert next(items) == 0 and started[1].wait(5)
    assert not started[2].wait(0.05)
    items.close()


def test_an_error_comes_in_the_place_of_its_item_with_its_own_traceback():
    def make(item: int) -> int:
        if item == 2:
            raise ValueError("train.jsonl:3: no text")
        return item

    items = made_ahead(make, range(5))
    assert [next(items), next(items)] == [0, 1]
    with pytest.raises(ValueError, match="train.jsonl:3") as caught:
        next(items)
    assert "make" in [entry.name for entry in caught.traceback]


def test_closing_makes_no_more_and_leaves_no_thread():
    made, before = [], threading.active_count()
    with contextlib.closing(made_ahead(made.append, range(100))) as items:
        next(items)
    assert len(made) <= 2 and threading.active_count() == before
    with (
        pytest.raises(RuntimeError, match="of the caller"),
        contextlib.closing(made_ahead(made.append, range(9))) as more,
    ):
        for _ in more:
            raise RuntimeError("of the caller")
    assert threading.active_count() == before
