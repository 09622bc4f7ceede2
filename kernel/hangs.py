"""What may hang: the read of a file on a network's disk may never return."""

import threading
from collections.abc import Callable
from typing import TypeVar

R = TypeVar("R")


def within(seconds: float, action: Callable[[], R]) -> R | None:
    """Return what an action gives, which raises nothing; None where it takes longer.

    It goes on in a thread that keeps no process alive.
    """
    results = list[R]()
    thread = threading.Thread(target=lambda: results.append(action()), daemon=True)
    thread.start()
    thread.join(seconds)
    return results[0] if results else None
