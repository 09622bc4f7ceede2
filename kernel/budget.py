"""The budget: how many of its seconds a run plans with, and when it is ended."""

RESERVE, RESERVE_S = 0.05, 10.0  # of a budget: the interpreter's start, the last save, a stall
MIN_MARGIN_S, MAX_MARGIN_S = 3.0, 60.0
WORKER_MARGIN_S = 30.0  # a worker that hangs ends by itself before the process that started it


def planned_s(budget_s: float) -> float:
    """Seconds of a budget that passes are planned with; the rest is a reserve for what is not."""
    return (1 - RESERVE) * budget_s - RESERVE_S


def margin_s(budget_s: float) -> float:
    """Seconds before the end of a budget at which a hung run is ended: of an hour or more a minute.

    What came before the run, the container's start and the imports, has taken some of it unseen.
    """
    return min(max(budget_s / 60, MIN_MARGIN_S), MAX_MARGIN_S)


def worker_budget_s(left_s: float) -> float:
    """Return a worker's budget where `left_s` seconds are left until the run's watchdog."""
    return max(left_s - WORKER_MARGIN_S, left_s / 2, 1.0)
