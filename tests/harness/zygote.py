"""A process that has imported torch and Megatron-Core once, and forks the ranks of one case after another.

Importing takes seconds and a case takes one, so the tests share this parent; and a test process itself may
not fork, having run tensor operations. Run as a module, it reads pickled calls and answers each of them.
"""

from __future__ import annotations

import pickle
import subprocess
import sys
import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, BinaryIO

from moe_bench.errors import MoeBenchError

if TYPE_CHECKING:
    from moe_bench.harness.mcore_config import MegatronArguments
    from moe_bench.harness.session import Outcome
    from moe_bench.harness.workers import Seat


class Zygote:
    """The test's side of the process."""

    def __init__(self) -> None:
        command = (sys.executable, "-W", "ignore", "-m", "tests.harness.zygote")
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)

    @property
    def pid(self) -> int:
        """Id of the process."""
        return self._process.pid

    def send(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
        """Have `function`, which must be importable by name, called; nobody waits for its answer."""
        assert self._process.stdin is not None
        pickle.dump((function, args, kwargs), self._process.stdin)
        self._process.stdin.flush()

    def call(self, function: Callable[..., Any], *args: Any) -> Any:
        """Result of `function`, which must be importable by name; raises the MoeBenchError that it raised."""
        assert self._process.stdout is not None
        self.send(function, *args)
        answer = pickle.load(self._process.stdout)
        if isinstance(answer, MoeBenchError):
            raise answer
        return answer

    def train(self, arguments: MegatronArguments) -> Outcome:
        """What a session measured in forked ranks."""
        outcome: Outcome = self.call(_train, arguments)
        return outcome

    def fork(self, num_ranks: int, work: Callable[[Seat], Any]) -> list[Any]:
        """What `work` returned in each of `num_ranks` forked processes."""
        results: list[Any] = self.call(_fork, num_ranks, work)
        return results

    def close(self) -> None:
        """End the process."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        self._process.stdout.close()
        self._process.wait()


def _train(arguments: MegatronArguments) -> Outcome | None:
    from moe_bench.harness.session import run

    return run(arguments, rendezvous=None, on_report=lambda report: None)


def _fork(num_ranks: int, work: Callable[[Seat], Any]) -> list[Any]:
    from moe_bench.harness.workers import run_forked

    return run_forked(num_ranks, work, on_progress=lambda content: None)


def serve(requests: BinaryIO, answers: BinaryIO) -> None:
    """Answer calls until there are no more."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import moe_bench.harness.session  # noqa: F401
    while True:
        try:
            function, args, kwargs = pickle.load(requests)
        except EOFError:
            return
        try:
            answer = function(*args, **kwargs)
        except MoeBenchError as error:
            answer = error
        pickle.dump(answer, answers)
        answers.flush()


if __name__ == "__main__":
    serve(sys.stdin.buffer, sys.stdout.buffer)
