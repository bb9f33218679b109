"""The machine's own limits: no client that does the job can be faster."""

from __future__ import annotations

import ctypes
import mmap
import multiprocessing
import queue
import threading
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from benchmarks import works
from benchmarks.contenders import Load, Save, Task, loader, saver

if TYPE_CHECKING:
    import socket
    from collections.abc import Callable
    from pathlib import Path

    from benchmarks.endpoint import Store

SOCKETS = (1, 2, 4, 8, 16)  # of which reports give the best
_PART = 16 * works.MIB


@saver("torch.save into nothing", remote=False)
def save_into_nothing(_task: Task) -> Save:
    class Nothing:
        def write(self, data: memoryview) -> int:
            return len(data)

        def flush(self) -> None:
            pass

    return lambda checkpoint, _key: torch.save(checkpoint, Nothing())


@saver("torch.save to a local file", remote=False)
def save_to_file(task: Task) -> Save:
    return lambda checkpoint, _key: torch.save(checkpoint, task.directory / "checkpoint.pt")


@loader("torch.load of a local file", file_format=None, remote=False)
def load_from_file(task: Task) -> Load:
    path = task.directory / "checkpoint.pt"
    # In another process: memory that this one had and freed would be cheaper than the fresh memory that others get.
    writer = multiprocessing.get_context("spawn").Process(target=_write, args=(task.work, task.size, path))
    writer.start()
    writer.join()
    return lambda _key: torch.load(path)  # from the page cache


def _write(work: str, size: int, path: Path) -> None:
    torch.save(works.make(work, size), path)


@loader("memcpy", file_format=None, remote=False)
def copy_memory(task: Task) -> Load:
    source = works.make(task.work, task.size)
    works.forget()
    return lambda _key: {name: tensor.clone() for name, tensor in works.named_tensors(source)}


def _save_over_sockets(task: Task, connections: int) -> Save:
    def save(checkpoint: dict[str, Any], key: str) -> None:
        parts = _parts(checkpoint)
        targets = {i: task.store.target("PUT", f"{key}/{i}") for i in range(len(parts))}

        def put(sock: socket.socket, i: int) -> None:
            length = sum(len(view) for view in parts[i])
            sock.sendall(_request(task.store, "PUT", targets[i], f"Content-Length: {length}"))
            for view in parts[i]:
                sock.sendall(view)
            _answer(sock)

        _in_threads(task.store, connections, put, list(targets))

    return save


def _load_over_sockets(task: Task, connections: int) -> Load:
    def load(key: str) -> memoryview:
        target = task.store.target("GET", key)
        size = _object_size(task.store, key)
        memory = memoryview(mmap.mmap(-1, size))

        def get(sock: socket.socket, start: int) -> None:
            stop = min(start + _PART, size)
            sock.sendall(_request(task.store, "GET", target, f"Range: bytes={start}-{stop - 1}"))
            body = _answer(sock)
            memory[start : start + len(body)] = body
            rest = memory[start + len(body) : stop]
            while rest:
                count = sock.recv_into(rest)
                if not count:
                    raise ConnectionError("The endpoint closed a connection in the middle of an answer.")
                rest = rest[count:]

        _in_threads(task.store, connections, get, list(range(0, size, _PART)))
        return memory

    return load


for _count in SOCKETS:
    saver(f"bare sockets x{_count}")(partial(_save_over_sockets, connections=_count))
    loader(f"bare sockets x{_count}")(partial(_load_over_sockets, connections=_count))


def _parts(checkpoint: dict[str, Any]) -> list[list[memoryview]]:
    """The memory of the tensors, not copied, in parts of about the size that clients upload."""
    parts: list[list[memoryview]] = [[]]
    size = 0
    for _, tensor in works.named_tensors(checkpoint):
        view = memoryview((ctypes.c_char * tensor.nbytes).from_address(tensor.data_ptr())).cast("B")
        for start in range(0, len(view), _PART):
            if size >= _PART:
                parts.append([])
                size = 0
            parts[-1].append(view[start : start + _PART])
            size += len(parts[-1][-1])
    return parts


def _in_threads(store: Store, count: int, work: Callable[[socket.socket, int], None], items: list[int]) -> None:
    """Does all items, in as many threads, each with a connection of its own that it keeps."""
    waiting: queue.SimpleQueue[int] = queue.SimpleQueue()
    for item in items:
        waiting.put(item)
    failures: list[BaseException] = []

    def run() -> None:
        connection = store.connect()
        try:
            connection.connect()
            while not failures:
                work(connection.sock, waiting.get_nowait())
        except queue.Empty:
            pass
        except BaseException as error:  # noqa: BLE001 - raised below
            failures.append(error)
        finally:
            connection.close()

    threads = [threading.Thread(target=run) for _ in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise failures[0]


def _request(store: Store, method: str, target: str, header: str) -> bytes:
    return f"{method} {target} HTTP/1.1\r\nHost: {store.host}\r\n{header}\r\n\r\n".encode()


def _answer(sock: socket.socket) -> bytes:
    """Reads an answer's head; returns what of the body came with it."""
    data = b""
    while b"\r\n\r\n" not in data:
        more = sock.recv(4096)
        if not more:
            raise ConnectionError("The endpoint closed a connection without an answer.")
        data += more
    head, _, body = data.partition(b"\r\n\r\n")
    if not head.startswith(b"HTTP/1.1 20"):
        raise ConnectionError(head.decode(errors="replace") + body.decode(errors="replace"))
    return body


def _object_size(store: Store, key: str) -> int:
    connection = store.connect()
    try:
        connection.request("HEAD", store.target("HEAD", key))
        return int(connection.getresponse().headers["Content-Length"])
    finally:
        connection.close()
