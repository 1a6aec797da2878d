"""Runs vLLM's server as a child and sees to its end: when `calidrop-server` is told to stop, all of it stops.

A stock server that gets SIGTERM while it loads can hang, and one that is killed leaves its engine processes behind.
This process is small (it never imports vLLM), passes a signal on to the server alone, and after a bounded time kills
whatever is left of it. It is a subreaper: processes of the server whose parent has died become its own children
(Linux, prctl(2)).
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from types import FrameType

import psutil

PR_SET_CHILD_SUBREAPER = 36
POLL_SECONDS = 0.1
# After SIGTERM: a server that does not serve yet has nothing to finish; one that serves may take its shutdown timeout,
# and this much more to end its processes.
STARTING_SECONDS = 5.0
ENDING_SECONDS = 6.0
# What the server leaves behind when it has ended may take so long to end by itself.
LEFT_SECONDS = 3.0


def end_with_parent(seconds: float) -> None:
    """From now on this process, a server, is told to stop when its parent dies, by whatever signal.

    What has not ended `seconds` later is killed: the server and its descendants.
    """
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(POLL_SECONDS)
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(seconds)
        _kill(_descendants())
        os._exit(1)

    threading.Thread(target=watch, name="calidrop-parent", daemon=True).start()


class Supervisor:
    """One server process and all that it starts.

    command: what to run. shutdown_timeout: seconds for which the server lets running requests finish. address: where
    it will listen, or None if it will not. on_ready: called once when it does.
    """

    def __init__(
        self,
        command: Sequence[str],
        shutdown_timeout: float,
        address: tuple[str, int] | None,
        on_ready: Callable[[], None],
    ) -> None:
        self.command = list(command)
        self.shutdown_timeout = shutdown_timeout
        self.address = address
        self.on_ready = on_ready
        self.serves = False
        self.asked: list[int] = []  # the signals that told us to stop

    def run(self) -> int:
        """The exit status: the server's own, or after a signal 0 if it served and ended by itself, else 128 + it."""
        ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1)
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, self._ask)
        # A process group of its own: Ctrl-C in a terminal reaches this process only, and no engine before its server.
        child = subprocess.Popen(self.command, process_group=0)
        while child.poll() is None and not self.asked:
            self._look_for_readiness()
            self._pause(child)
        if child.poll() is None:
            self._stop(child)
        ended_itself = child.poll() is not None
        self._kill_what_is_left(LEFT_SECONDS if ended_itself else 0.0)
        status = child.wait()
        if not self.asked:
            return status if status >= 0 else 128 - status
        return 0 if status == 0 and self.serves else 128 + self.asked[0]

    def _ask(self, number: int, frame: FrameType | None) -> None:
        self.asked.append(number)

    def _stop(self, child: subprocess.Popen[bytes]) -> None:
        """Waits for the server to end by itself; a second signal ends the waiting."""
        seconds = self.shutdown_timeout + ENDING_SECONDS if self.serves else STARTING_SECONDS
        child.send_signal(signal.SIGTERM)
        until = time.monotonic() + seconds
        while child.poll() is None and time.monotonic() < until and len(self.asked) == 1:
            self._pause(child)

    @staticmethod
    def _pause(child: subprocess.Popen[bytes]) -> None:
        with contextlib.suppress(subprocess.TimeoutExpired):
            child.wait(POLL_SECONDS)

    def _look_for_readiness(self) -> None:
        if self.serves or self.address is None:
            return
        try:
            socket.create_connection(self.address, timeout=1.0).close()
        except OSError:
            return
        self.serves = True
        self.on_ready()

    def _kill_what_is_left(self, patience: float) -> None:
        """Kill every descendant. Python's resource tracker is last: it removes the shared memory of those killed."""
        until = time.monotonic() + patience
        while (left := _descendants()) and time.monotonic() < until and len(self.asked) < 2:
            psutil.wait_procs(left, timeout=POLL_SECONDS)
        if left:
            names = ", ".join(str(process.pid) for process in left)
            print(f"calidrop-server: killing what is left of the server (processes {names})", file=sys.stderr)
        trackers = [process for process in left if _is_resource_tracker(process)]
        _kill([process for process in left if process not in trackers])
        psutil.wait_procs(trackers, timeout=2.0)
        while left := _descendants():
            _kill(left)


def _descendants() -> list[psutil.Process]:
    """Those that run; a zombie among them is waited for, so that it goes."""
    found = psutil.Process().children(recursive=True)
    gone, alive = psutil.wait_procs([p for p in found if _is_zombie(p)], timeout=0)
    return [process for process in found if process not in gone and process not in alive]


def _is_zombie(process: psutil.Process) -> bool:
    try:
        return bool(process.status() == psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return True


def _is_resource_tracker(process: psutil.Process) -> bool:
    try:
        return any("resource_tracker" in word for word in process.cmdline())
    except psutil.Error:
        return False


def _kill(processes: list[psutil.Process]) -> None:
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(processes, timeout=2.0)
