"""Events are frozen records, and their subscribers cannot harm the slot or each other."""

from __future__ import annotations

import dataclasses
import logging
import pickle
import threading
import time

import pytest

from hotglm import events
from hotglm.events import (
    ClosedEvent,
    CommittedEvent,
    ConfirmedEvent,
    DelayedEvent,
    DigestMismatchEvent,
    DiscardedEvent,
    DrainedEvent,
    Event,
    ExpiredEvent,
    HeldEvent,
    QuarantinedEvent,
    RefusedEvent,
    ReplayedEvent,
    RolledBackEvent,
    SignatureRefusedEvent,
    StagedEvent,
    Subscribers,
    SupersededEvent,
)

EVERY_EVENT: list[Event] = [
    ClosedEvent(slot="s"),
    CommittedEvent(slot="s", version="2.0.0", number=2, previous_version="1.0.0", previous_number=1),
    ConfirmedEvent(slot="s", version="2.0.0", number=2),
    DelayedEvent(slot="s", version="2.0.0", reasons=("load 1.20 per core",)),
    DiscardedEvent(slot="s", version="2.0.0", number=2),
    DrainedEvent(slot="s", version="1.0.0", number=1),
    HeldEvent(slot="s", version="1.0.0", number=1, limit_s=5.0, holders=("thread 'reader'",)),
    QuarantinedEvent(slot="s", version="2.0.0", digest="sha256:0", code="NONFINITE", reason="..."),
    RefusedEvent(slot="s", version=None, code="HEADER_EMPTY", message="..."),
    SignatureRefusedEvent(slot="s", version="2.0.0", code="BAD_SIGNATURE", message="..."),
    DigestMismatchEvent(slot="s", version="2.0.0", code="DIGEST_MISMATCH", message="..."),
    ExpiredEvent(slot="s", version="2.0.0", code="EXPIRED", message="..."),
    ReplayedEvent(slot="s", version="2.0.0", code="VERSION_ROLLBACK", message="..."),
    RolledBackEvent(slot="s", version="1.0.0", number=3, previous_version="2.0.0", previous_number=2),
    StagedEvent(slot="s", version="2.0.0", number=2),
    SupersededEvent(slot="s", version="2.0.0", number=2, by_version="2.0.1"),
]


def test_every_event_is_covered_here() -> None:
    """There is a sample of every public event in this file."""
    public = {name for name in events.__all__ if name.endswith("Event") and name != "Event"}
    assert {type(event).__name__ for event in EVERY_EVENT} == public


@pytest.mark.parametrize("event", EVERY_EVENT, ids=lambda event: type(event).__name__)
def test_an_event_is_a_frozen_value(event: Event) -> None:
    """Events cannot be changed, compare by value and can be sent to another process."""
    with pytest.raises(dataclasses.FrozenInstanceError):
        event.slot = "other"  # type: ignore[misc]
    assert pickle.loads(pickle.dumps(event)) == event


def test_an_event_knows_when_it_happened() -> None:
    """An event carries the monotonic clock for arithmetic and the wall clock for people."""
    before, wall_before = time.monotonic(), time.time()
    event = ClosedEvent(slot="s")
    assert before <= event.at_s <= time.monotonic()
    assert wall_before <= event.wall_s <= time.time()


def test_subscribers_are_called_in_the_order_they_came() -> None:
    """Every subscriber gets every event, in order of subscription; twice when subscribed twice."""
    subscribers, seen = Subscribers(), list[str]()
    subscribers.subscribe(lambda event: seen.append("first"))

    def second(event: Event) -> None:
        seen.append("second")

    subscribers.subscribe(second)
    subscribers.subscribe(second)
    subscribers.publish(ClosedEvent(slot="s"))
    assert seen == ["first", "second", "second"]


def test_unsubscribing_ends_exactly_one_subscription() -> None:
    """Each subscription ends for itself, and ending it twice is harmless."""
    subscribers, seen = Subscribers(), list[Event]()
    end_one = subscribers.subscribe(seen.append)
    end_two = subscribers.subscribe(seen.append)
    end_one()
    end_one()
    event = ClosedEvent(slot="s")
    subscribers.publish(event)
    assert seen == [event]
    end_two()
    subscribers.publish(event)
    assert seen == [event]


def test_a_subscriber_that_raises_is_logged_and_the_next_is_called(caplog: pytest.LogCaptureFixture) -> None:
    """An exception in a subscriber reaches the log with its traceback, and nobody else."""
    subscribers, seen = Subscribers(), list[Event]()

    def broken(event: Event) -> None:
        raise ValueError("from the subscriber")

    subscribers.subscribe(broken)
    subscribers.subscribe(seen.append)
    with caplog.at_level(logging.ERROR, logger="hotglm"):
        subscribers.publish(ClosedEvent(slot="s\x1b"))
    assert len(seen) == 1
    (record,) = caplog.records
    assert record.exc_info is not None
    assert isinstance(record.exc_info[1], ValueError)
    assert "ClosedEvent" in record.getMessage()
    assert "\x1b" not in record.getMessage()


@pytest.mark.parametrize("interrupt", [KeyboardInterrupt, SystemExit])
def test_an_interrupt_goes_on_after_every_subscriber_was_called(interrupt: type[BaseException]) -> None:
    """KeyboardInterrupt and SystemExit are not swallowed, and rob no subscriber of the event."""
    subscribers, seen = Subscribers(), list[Event]()

    def interrupted(event: Event) -> None:
        raise interrupt

    subscribers.subscribe(interrupted)
    subscribers.subscribe(seen.append)
    with pytest.raises(interrupt):
        subscribers.publish(ClosedEvent(slot="s"))
    assert len(seen) == 1


def test_a_subscriber_may_subscribe_and_unsubscribe_while_it_is_called() -> None:
    """What a callback changes counts from the next event on, and takes no lock that the publisher holds."""
    subscribers, seen = Subscribers(), list[str]()

    def once(event: Event) -> None:
        seen.append("once")
        end_once()
        end_later()
        subscribers.subscribe(lambda event: seen.append("new"))

    end_once = subscribers.subscribe(once)
    end_later = subscribers.subscribe(lambda event: seen.append("later"))
    subscribers.publish(ClosedEvent(slot="s"))
    assert seen == ["once", "later"]
    subscribers.publish(ClosedEvent(slot="s"))
    assert seen == ["once", "later", "new"]


def test_no_lock_is_held_while_a_subscriber_runs() -> None:
    """Another thread can subscribe, unsubscribe and publish while a subscriber is running."""
    subscribers, seen = Subscribers(), list[Event]()

    def delegate(event: Event) -> None:
        end_delegate()
        other = threading.Thread(target=lambda: subscribers.subscribe(seen.append))
        other.start()
        other.join(timeout=30)
        assert not other.is_alive()
        subscribers.publish(event)

    end_delegate = subscribers.subscribe(delegate)
    event = ClosedEvent(slot="s")
    subscribers.publish(event)
    assert seen == [event]


def test_no_subscription_is_lost_between_threads() -> None:
    """Subscriptions made by many threads at once are all there, and all end."""
    subscribers, seen = Subscribers(), list[Event]()
    barrier, ends = threading.Barrier(8), list[object]()

    def subscribe() -> None:
        barrier.wait()
        ends.extend([subscribers.subscribe(seen.append) for _ in range(50)])

    threads = [threading.Thread(target=subscribe) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    subscribers.publish(ClosedEvent(slot="s"))
    assert len(seen) == 400
    for end in ends:
        assert callable(end)
        end()
    subscribers.publish(ClosedEvent(slot="s"))
    assert len(seen) == 400
