"""Processes that compute a function of 0, 1, 2, ... ahead of its use: ordered, bounded, and gone when the owner is.

Each number belongs to one process, so that a process can keep what its numbers share. Results wait in the pipes and
in a buffer of at most `ahead`; a process that is ahead of them sleeps in its pipe.
"""

import atexit
import contextlib
import multiprocessing
import os
import pickle
import signal
import threading
import weakref
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from typing import Any

import torch

from melcore.errors import DataError, MelError

Function = Callable[[int], Any]


class WorkerError(MelError, RuntimeError):
    """A process that draws examples ended unexpectedly."""


class Workers:
    """Computes ``function(n)`` in processes, ahead of `get`.

    Parameters
    ----------
    function
        Must be possible to pickle; every process has a copy, which may keep what it likes.
    count
        Processes; 0 computes in the caller's own, when asked.
    ahead
        Results, at most, that are being computed or wait.
    owner
        Numbers of the same owner are computed by the same process.
    first, step, stop
        Numbers that will be asked for: ``first, first + step, ...`` below `stop`.
    """

    def __init__(
        self,
        function: Function,
        count: int,
        *,
        ahead: int,
        owner: Callable[[int], int] = int,
        first: int = 0,
        step: int = 1,
        stop: int | None = None,
    ) -> None:
        self._function, self._count, self._ahead, self._owner = function, count, max(ahead, 1), owner
        self._step, self._stop = step, stop
        self._next = first  #: the number that has not been asked of a process yet
        self._team: _Team | None = None

    def get(self, n: int) -> Any:
        """The result for n; an error of the function is raised here.

        Raises
        ------
        WorkerError
            If a process ended by itself.
        """
        if self._count == 0:
            # One thread, as in the processes: sums of several threads round otherwise.
            threads = torch.get_num_threads()
            torch.set_num_threads(1)
            try:
                return self._function(n)
            finally:
                torch.set_num_threads(threads)
        if self._team is None:
            self._team = _Team(self._function, self._count)
            self._next = n
        team = self._team
        if not team.knows(n):
            # Somewhere else in the sequence: what is on its way is of no use.
            team.forget()
            self._next = n
        self._order(n)
        result = team.take(n)
        self._order(n + self._step)
        return result

    def _order(self, n: int) -> None:
        """Ask the processes for what comes next, as far as there is room."""
        end = n + self._ahead * self._step
        while self._next < end and (self._stop is None or self._next < self._stop):
            assert self._team is not None
            self._team.ask(self._next, self._owner(self._next) % self._count)
            self._next += self._step

    def close(self) -> None:
        """End the processes; `get` starts them again."""
        team, self._team = self._team, None
        if team is not None:
            team.close()


class _Team:
    """The processes, and a thread that collects what they send."""

    def __init__(self, function: Function, count: int) -> None:
        context = multiprocessing.get_context("spawn")  # torch's threads do not survive a fork
        self._pipes: list[Connection] = []
        self._processes = []
        for _ in range(count):
            ours, theirs = context.Pipe()
            process = context.Process(target=_work, args=(theirs, function, os.getpid()), daemon=True)
            process.start()
            theirs.close()
            self._pipes.append(ours)
            self._processes.append(process)
        self._ready = threading.Condition()
        self._results: dict[int, Any] = {}
        self._asked: set[int] = set()
        self._round = 0  #: what was asked for before the last `forget` is thrown away
        self._failure: str | None = None
        # The thread must not keep the owner alive, or nobody would ever close it.
        self._collector = threading.Thread(target=_collect, args=(weakref.ref(self), list(self._pipes)), daemon=True)
        self._collector.start()
        self._finaliser = weakref.finalize(self, _end, self._pipes, self._processes)
        atexit.register(self._finaliser)

    def knows(self, n: int) -> bool:
        with self._ready:
            return n in self._asked

    def ask(self, n: int, process: int) -> None:
        with self._ready:
            self._asked.add(n)
        try:
            self._pipes[process].send((self._round, n))
        except OSError:
            self.fail(self._processes[process].exitcode)

    def forget(self) -> None:
        with self._ready:
            self._round += 1
            self._asked.clear()
            self._results.clear()
        for pipe in self._pipes:
            with contextlib.suppress(OSError):
                pipe.send((self._round, None))

    def put(self, number: int, n: int, content: Any) -> None:
        with self._ready:
            if number == self._round:
                self._results[n] = content
                self._ready.notify_all()

    def fail(self, code: int | None) -> None:
        with self._ready:
            how = f"exit code {code}" if code is not None else "no exit code"
            self._failure = self._failure or (
                f"a process that draws examples ended ({how}): if memory was short, lower data.workers or data.ahead; "
                'a script of your own needs `if __name__ == "__main__":`; data.workers=0 draws without processes.'
            )
            self._ready.notify_all()

    def take(self, n: int) -> Any:
        with self._ready:
            while n not in self._results and self._failure is None:
                self._ready.wait(1.0)
            if n not in self._results:
                raise WorkerError(self._failure)
            result = self._results.pop(n)
            self._asked.discard(n)
        ok, content = pickle.loads(result)
        if not ok:
            raise content
        return content

    def exit_code(self, place: int) -> int | None:
        self._processes[place].join(1.0)
        return self._processes[place].exitcode

    def close(self) -> None:
        self._finaliser()
        atexit.unregister(self._finaliser)


def _collect(owner: "weakref.ref[_Team]", pipes: list[Connection]) -> None:
    """Receive from all processes until all pipes are closed."""
    open_pipes = list(pipes)
    while open_pipes:
        try:
            readable = wait(open_pipes, 1.0)
        except (OSError, ValueError):
            return
        for pipe in readable:
            assert isinstance(pipe, Connection)
            try:
                number, n = pipe.recv()
                content = pipe.recv_bytes()
            except (EOFError, OSError, TypeError):
                open_pipes.remove(pipe)
                team = owner()
                if team is not None:
                    team.fail(team.exit_code(pipes.index(pipe)))
                return
            team = owner()
            if team is None:
                return
            team.put(number, n, content)
            del team


def _end(pipes: list[Connection], processes: list[Any]) -> None:
    for process in processes:
        process.terminate()
    for process in processes:
        process.join(5.0)
        if process.is_alive():
            process.kill()
            process.join(5.0)
    for pipe in pipes:
        pipe.close()


def _work(pipe: Connection, function: Function, parent: int) -> None:
    """A process: compute what is asked for, in order, until the pipe closes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the owner decides
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    torch.set_num_threads(1)
    with contextlib.suppress(OSError):
        os.nice(5)  # the training step comes first
    waiting: list[tuple[int, int]] = []
    number = 0
    try:
        while True:
            while not waiting or pipe.poll():
                number, n = pipe.recv()
                waiting = [task for task in waiting if task[0] == number]
                if n is not None:
                    waiting.append((number, n))
            number, n = waiting.pop(0)
            try:
                answer = pickle.dumps((True, function(n)), protocol=5)
            except MelError as error:
                answer = pickle.dumps((False, error))
            except Exception as error:  # whatever it is, the owner must hear of it
                answer = pickle.dumps((False, DataError(f"example {n}: {type(error).__name__}: {error}")))
            if os.getppid() != parent:
                return
            pipe.send((number, n))
            pipe.send_bytes(answer)
    except (EOFError, BrokenPipeError, ConnectionResetError):
        return
