"""A clock that stands still until a test moves it."""

from datetime import UTC, datetime, timedelta


class FixedClock:
    """What `StorageManager(clock=…)` takes: each call returns `now`."""

    def __init__(self, now: datetime = datetime(2026, 1, 31, 12, 0, 0, tzinfo=UTC)) -> None:
        self.now = now

    def __call__(self) -> datetime:
        return self.now

    def __repr__(self) -> str:
        return f"FixedClock({self.now.isoformat()})"

    def advance(self, seconds: float) -> None:
        """Move the clock on, or back when `seconds` is negative."""
        self.now += timedelta(seconds=seconds)
