"""An action that may hang, as a look at files on a network's disk."""

import threading
from collections.abc import Callable


def ends_within(seconds: float, action: Callable[[], object]) -> bool:
    """Run an action, which raises nothing; return whether it ends in time.

    One that does not goes on in a thread that keeps no process alive.
    """
    thread = threading.Thread(target=action, daemon=True)
    try:
        thread.start()
    except RuntimeError:  # the system has no other thread
        action()
        return True
    thread.join(seconds)
    return not thread.is_alive()
