"""What several threads ask for at once is worked out by the first of them."""

import threading
from collections.abc import Hashable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field


@dataclass(slots=True)
class _Turn:
    lock: threading.Lock = field(default_factory=threading.Lock)
    num_threads: int = 0  # that have it or wait for it


class Turns:
    """Lets one thread at a time do what has the same key; the others find what it kept."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._turns: dict[Hashable, _Turn] = {}

    @contextmanager
    def of(self, key: Hashable) -> Iterator[None]:
        """Wait until no other thread is inside with this key."""
        with self._lock:
            turn = self._turns.setdefault(key, _Turn())
            turn.num_threads += 1
        try:
            with turn.lock:
                yield
        finally:
            with self._lock:
                turn.num_threads -= 1
                if not turn.num_threads:
                    del self._turns[key]
