"""A regular expression as an automaton over bytes.

`outlines_core`, which vLLM brings, builds it from the syntax of Rust's `regex`. It prefers alternatives as a search
does (leftmost first), so that `a|ab` alone would never be "ab"; behind a closing character all of them count.

How many states an expression needs is known when they are built, and may be exponential in its length: a process of its
own builds them, within bounds of time and memory.
"""

import array
import builtins
import re
import signal
import subprocess
import sys
import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any, Generic, ParamSpec, TypeVar

import numpy as np
from numpy.typing import NDArray

from vllm_dllm.constraint.automaton import BoolArray, IntArray
from vllm_dllm.constraint.turns import Turns

P = ParamSpec("P")
T = TypeVar("T")

MAX_LENGTH = 1 << 17
"""Characters of an expression; that of a JSON schema of a hundred fields has some 10,000."""
MAX_BYTE_STATES = 20_000
CPU_SECONDS = 5
MEMORY_BYTES = 4 << 30
_WALL_SECONDS = 60  # where the machine is busy
_MAX_ROUNDS = 256
_END = 256  # an id that is no byte
_CLOSING = "\U0010ffff"  # no character, by Unicode
_OF_MACHINE = {
    name for name, its in vars(builtins).items() if isinstance(its, type) and issubclass(its, (OSError, ImportError))
}
"""Errors in the process that are not the expression's."""
_CRASHES = {signal.SIGABRT, signal.SIGBUS, signal.SIGFPE, signal.SIGILL, signal.SIGSEGV}
"""Signals that a process brings upon itself; others come from whoever kills it."""
_TABLE, _TOO_MANY, _INVALID, _REFUSED, _MISSING = b"table", b"many", b"regex", b"refused", b"missing"


class ConstraintError(ValueError):
    """A constraint that cannot be served; the message says why, and what to do."""


class UnfinishedError(ConstraintError):
    """One that nothing is known of: another time it may be served."""


@dataclass(frozen=True, slots=True)
class ByteAutomaton:
    """A deterministic automaton over bytes, from state 0; its last state is that from which nothing is accepted."""

    step: IntArray  # [num_states, num_classes], the next state
    class_of: NDArray[np.int32]  # [256], classes of bytes that all states treat alike
    is_accepting: BoolArray  # [num_states]

    @property
    def dead(self) -> int:
        """The last state."""
        return len(self.step) - 1

    def accepts(self, text: bytes) -> bool:
        """Tell whether a text is accepted."""
        state = 0
        for byte in text:
            state = int(self.step[state, self.class_of[byte]])
        return bool(self.is_accepting[state])

    def escapes(self, other: "ByteAutomaton") -> bool:
        """Tell whether this accepts a text that `other` does not."""
        seen, left = {(0, 0)}, [(0, 0)]
        pairs = np.unique(np.stack([self.class_of, other.class_of]), axis=1).T.tolist()
        while left:
            own, others = left.pop()
            if self.is_accepting[own] and not other.is_accepting[others]:
                return True
            after = {(int(self.step[own, a]), int(other.step[others, b])) for a, b in pairs}
            new = {pair for pair in after if pair[0] != self.dead} - seen
            seen |= new
            left += new
        return False


class Kept(Generic[P, T]):
    """A function, what it returned last, and the errors that it refused with: to find out took as long.

    Threads that ask for the same wait for the first of them.
    """

    def __init__(self, function: Callable[P, T], size: int) -> None:
        self._function, self._size = function, size
        self._results: OrderedDict[Hashable, tuple[T] | str] = OrderedDict()
        self._lock, self._turns = threading.Lock(), Turns()

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> T:
        """Call the function, if nothing is kept of it."""
        key = _key(args, kwargs)
        with self._turns.of(key):
            with self._lock:
                result = self._results.get(key)
            if result is None:
                result = self._called(*args, **kwargs)
            with self._lock:
                self._results[key] = result
                self._results.move_to_end(key)
                while len(self._results) > self._size:
                    self._results.popitem(last=False)
        if isinstance(result, str):
            raise ConstraintError(result)
        return result[0]

    def __len__(self) -> int:
        """How many results are kept."""
        return len(self._results)

    def has(self, *args: P.args, **kwargs: P.kwargs) -> bool:
        """Tell whether a call is answered at once."""
        with self._lock:
            return _key(args, kwargs) in self._results

    def _called(self, *args: P.args, **kwargs: P.kwargs) -> tuple[T] | str:
        try:
            return (self._function(*args, **kwargs),)
        except UnfinishedError:
            raise
        except ConstraintError as error:
            return str(error)


def _key(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Hashable:
    return args, tuple(sorted(kwargs.items()))


def kept(size: int) -> Callable[[Callable[P, T]], Kept[P, T]]:
    """Keep what a function returned or refused last, for so many calls."""
    return lambda function: Kept(function, size)


@kept(64)
def byte_automaton(regex: str) -> ByteAutomaton:
    """Build the automaton of a regular expression, which is to match the whole text.

    Raises: ConstraintError.
    """
    return built_apart(__name__, regex, regex)


def built_apart(module: str, regex: str, given: str) -> ByteAutomaton:
    """Build an automaton in a process of its own, within bounds of time and memory.

    Args:
        module: which is run, and writes a table.
        regex: that it is built of.
        given: to the process.

    Raises: ConstraintError; UnfinishedError where the machine, and not the expression, kept it from being built.
    """
    if len(regex) > MAX_LENGTH:
        raise ConstraintError(
            f"it has {len(regex)} characters as a regular expression, allowed are {MAX_LENGTH}; shorten it"
        )
    try:
        done = subprocess.run(
            [sys.executable, "-m", module],
            input=given.encode("utf-8", "surrogatepass"),
            capture_output=True,
            timeout=_WALL_SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise UnfinishedError(
            f"it was not built within {_WALL_SECONDS} s of a busy machine; try it again, or shorten it"
        ) from None
    except (OSError, MemoryError) as error:
        raise UnfinishedError(
            f"the process that builds its automaton could not be run ({str(error) or 'no memory'}); try it again, and "
            "see that the server has memory, processes and open files left"
        ) from None
    if done.returncode:
        raise _ended(done.returncode, done.stderr.decode(errors="replace").strip())
    return parse_table(done.stdout)


def _ended(status: int, stderr: str) -> ConstraintError:
    """Return what the end of the process says: a bound of ours, an error at the expression, or nothing of it."""
    # Linux promises more memory than there is, so what is not given is by our bound: Python says so, or Rust.
    if status == -signal.SIGXCPU or "MemoryError" in stderr or "memory allocation of" in stderr:
        return ConstraintError(_too_many())
    said = (stderr.splitlines() or [f"signal {-status}" if status < 0 else f"status {status}"])[-1]
    is_of_machine = said.partition(":")[0] in _OF_MACHINE or "start new thread" in said
    if (-status in _CRASHES or (status > 0 and "Traceback" in stderr)) and not is_of_machine:
        return ConstraintError(f"the process that builds its automaton ended with {said}; simplify it")
    # As by who kills processes where memory runs out.
    return UnfinishedError(
        f"the process that builds its automaton ended with {said}, which need not be the fault of what it builds; try "
        "it again, and see that the server has memory left"
    )


def parse_table(output: bytes) -> ByteAutomaton:
    """Read what `build_table` wrote. Raises: ConstraintError where it wrote why there is no table."""
    kind, _, rest = output.partition(b"\n")
    if kind == _INVALID:
        raise ConstraintError(f"it is no regular expression that can be built: {rest.decode()}")
    if kind == _REFUSED:
        raise ConstraintError(rest.decode())
    if kind == _MISSING:
        raise UnfinishedError(rest.decode())
    if kind == _TOO_MANY:
        raise ConstraintError(_too_many())
    if kind != _TABLE:
        raise UnfinishedError(f"the process that builds its automaton wrote {kind!r:.80} and no table; try it again")
    table = np.frombuffer(rest, dtype=np.int32).reshape(-1, _END + 1)
    return smallest(table[:, :_END], table[:, _END] > 0)


def _too_many() -> str:
    return (
        f"its automaton has more than {MAX_BYTE_STATES} states, or takes more than {CPU_SECONDS} s to build: shorten "
        "repetitions of bounded length, or use fewer tools"
    )


def smallest(step: IntArray, is_accepting: BoolArray) -> ByteAutomaton:
    """Merge bytes and states that cannot be told apart; the last state is the dead one."""
    columns, class_of = np.unique(step, axis=1, return_inverse=True)
    group = _groups(columns, is_accepting)
    # The start first, the dead state last.
    num_groups, start, dead = int(group.max()) + 1, group[0], group[-1]
    order = [
        start,
        *(each for each in range(num_groups) if each not in (start, dead)),
        *([] if dead == start else [dead]),
    ]
    number = np.empty(num_groups, dtype=np.int32)
    number[order] = np.arange(num_groups)
    state = number[group]
    first = np.unique(state, return_index=True)[1]
    small, accepting = state[columns[first]], is_accepting[first]
    if dead == start:  # nothing is accepted
        small, accepting = np.ones((2, small.shape[1]), dtype=np.int32), np.zeros(2, dtype=bool)
    return ByteAutomaton(small, class_of.reshape(-1).astype(np.int32), accepting)


def _groups(step: IntArray, is_accepting: BoolArray) -> NDArray[np.int64]:
    """Number the states by what they accept (Moore); of counters of many states too long a work is left out."""
    group = is_accepting.astype(np.int64)
    weights = np.random.default_rng(0).integers(1, 2**62, size=step.shape[1] + 1, dtype=np.int64)
    for _ in range(_MAX_ROUNDS):
        with np.errstate(over="ignore"):
            key = _mixed(group[step]) @ weights[1:] + _mixed(group) * weights[0]
        finer = np.unique(key, return_inverse=True)[1].reshape(-1)
        if finer.max() == group.max():
            return group
        group = finer
    return np.arange(len(step))


def _mixed(group: NDArray[np.int64]) -> NDArray[np.int64]:
    """Spread numbers over 64 bits, so that sums of them do not meet by chance (splitmix64)."""
    value = group.astype(np.uint64) + np.uint64(0x9E3779B97F4A7C15)
    value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return (value ^ (value >> np.uint64(31))).view(np.int64)


def build_table(regex: str) -> bytes:
    """Write the table of an expression, without bounds.

    Its rows are 256 next states, and whether the state accepts; the last one is that of the dead state.
    """
    try:
        from outlines_core import Index, Vocabulary  # here, since vLLM brings it
    except ImportError as error:
        said = f"the server cannot load outlines_core, which builds its automaton ({error}); pip install outlines_core"
        return _MISSING + b"\n" + said.encode()
    try:
        _check_parentheses(regex)
        index: Any = Index(f"(?:{regex}){_CLOSING}", Vocabulary(_END, {bytes([byte]): [byte] for byte in range(_END)}))
    except ValueError as error:
        return _INVALID + b"\n" + str(error).encode()
    transitions = index.get_transitions()
    start = index.get_initial_state()
    states = list(dict.fromkeys([start, *transitions, *index.get_final_states()]))
    final = {state for state in states if _run(transitions, state, _CLOSING.encode()) in index.get_final_states()}
    if len(states) > MAX_BYTE_STATES:
        return _TOO_MANY
    number = {state: place for place, state in enumerate(states)}
    dead = len(states)
    rows = array.array("i", [dead] * (_END + 1) * (dead + 1))
    for state, place in number.items():
        for byte, target in transitions.get(state, {}).items():
            if byte < _END:
                rows[place * (_END + 1) + byte] = number[target]
    for place in range(dead + 1):
        rows[place * (_END + 1) + _END] = place < dead and states[place] in final
    return _TABLE + b"\n" + rows.tobytes()


def write_table(build: Callable[[], ByteAutomaton]) -> bytes:
    """Write the table of an automaton that is built, or why it is refused."""
    try:
        automaton = build()
    except UnfinishedError as error:
        return _MISSING + b"\n" + str(error).encode()
    except ConstraintError as error:
        return _REFUSED + b"\n" + str(error).encode()
    columns = automaton.step[:, automaton.class_of], automaton.is_accepting[:, None]
    whole: IntArray = np.concatenate(columns, axis=1).astype(np.int32)
    return _TABLE + b"\n" + whole.tobytes()


def _run(transitions: dict[int, dict[int, int]], state: int | None, text: bytes) -> int | None:
    for byte in text:
        state = None if state is None else transitions.get(state, {}).get(byte)
    return state


def _check_parentheses(regex: str) -> None:
    """Check that an expression closes no group that it did not open. Raises: ValueError."""
    try:
        re.compile(regex)
    except re.error as error:
        if error.msg == "unbalanced parenthesis":
            raise ValueError(str(error)) from None


def bounded_input() -> str:
    """Set the bounds of this process, and read what it is given."""
    import resource

    # The hard one would end it with the signal of those who kill processes where the machine has no memory left.
    resource.setrlimit(resource.RLIMIT_CPU, (CPU_SECONDS, CPU_SECONDS + 1))
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    return sys.stdin.buffer.read().decode("utf-8", "surrogatepass")


if __name__ == "__main__":
    sys.stdout.buffer.write(build_table(bounded_input()))
