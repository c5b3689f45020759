"""Pictures decoded in order, in this process or by several others beside it, whose death is told with the file they had.

The order does not depend on the number of processes. They are plain programs (`fastgen.data.decode`), not forks: nothing of the
trainer is copied into them, and a decoder that crashes, or that the system ends for want of memory, takes nothing along.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType

import numpy as np

from fastgen.data import decode as program
from fastgen.data.decode import decode, picture_errors
from fastgen.data.pictures import Picture, not_a_picture
from fastgen.errors import UserError

__all__ = ["Readers"]

AHEAD = 4
TRIALS = 2


class Readers:
    """`workers` processes that decode pictures; 0: this one does. They start when first needed and end with the block."""

    def __init__(self, workers: int = 0):
        self.workers = workers
        self.threads = ThreadPoolExecutor(workers, "pictures") if workers else None
        self.local = threading.local()
        self.processes: list[Worker] = []

    def __enter__(self) -> Readers:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for process in self.processes:
            process.end()
        if self.threads is not None:
            self.threads.shutdown(cancel_futures=True)
        self.processes.clear()

    def read(self, pictures: Iterable[Picture], size: tuple[int, int]) -> Iterator[np.ndarray | UserError]:
        """Each picture in order, bytes [height, width, 3] scaled and cropped to `size` (height, width), or why there is none.

        Some more than are asked for are decoded ahead.
        """
        if self.threads is None:
            for picture in pictures:
                yield here(picture, size)
            return
        waiting: deque[Future[np.ndarray | UserError]] = deque()
        for picture in pictures:
            waiting.append(self.threads.submit(self.elsewhere, picture, size))
            if len(waiting) > AHEAD * self.workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()

    def elsewhere(self, picture: Picture, size: tuple[int, int]) -> np.ndarray | UserError:
        """One picture by this thread's worker. One whose worker dies is tried again by another before it is given up."""
        ended = ""
        for _ in range(TRIALS):
            worker: Worker | None = getattr(self.local, "worker", None)
            if worker is None or worker.process.poll() is not None:
                worker = self.local.worker = Worker()
                self.processes.append(worker)
            try:
                return worker.read(picture, size)
            except (BrokenPipeError, EOFError):
                ended = worker.ended()
        return UserError(f"{picture.name}: cannot be read: the process that reads it ended with {ended}, {TRIALS} times")


def here(picture: Picture, size: tuple[int, int]) -> np.ndarray | UserError:
    try:
        with picture.open() as content:
            return decode(content, size)
    except picture_errors as error:
        return not_a_picture(picture, error)


class Worker:
    """A process that decodes one picture at a time; `reading` is the name of that picture."""

    def __init__(self) -> None:
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(each for each in sys.path if each)}
        command = [sys.executable, "-P", program.__file__]  # -P: the folder of this package's modules is not for imports
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment)
        self.reading = ""

    def read(self, picture: Picture, size: tuple[int, int]) -> np.ndarray | UserError:
        """The picture, or why there is none. Raises BrokenPipeError or EOFError where the process has died."""
        requests, answers = self.process.stdin, self.process.stdout
        assert requests is not None and answers is not None
        self.reading = picture.name
        inline = picture.content or b""
        place = {"path": str(picture.path), "offset": picture.offset, "length": picture.length}
        request = {**place, "height": size[0], "width": size[1], "bytes": len(inline)}
        requests.write(json.dumps(request).encode() + b"\n" + inline)
        requests.flush()
        line = answers.readline()
        about = json.loads(line) if line.endswith(b"\n") else None
        content = b"" if about is None else answers.read(about["bytes"])
        if about is None or len(content) < about["bytes"]:
            raise EOFError
        self.reading = ""
        if "problem" in about:
            return not_a_picture(picture, about["problem"])
        return np.frombuffer(content, np.uint8).reshape(*size, 3)

    def ended(self) -> str:
        """How the process has ended, in words."""
        code = self.process.wait()
        if code == -signal.SIGKILL:
            return "SIGKILL, as where memory runs out"
        return signal.Signals(-code).name if code < 0 else f"exit status {code}"

    def end(self) -> None:
        self.process.kill()
        self.process.wait()
        for stream in (self.process.stdin, self.process.stdout):
            if stream is not None:
                stream.close()
