"""Network namespaces without names, and the devices in them, by the system's own calls: no `ip`, no netlink.

A namespace lives as long as a process is in it or a descriptor of it is open, so none is ever left behind.
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import signal
import socket
import struct
import time
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path

_NEWNET = 0x40000000
_TUNSETIFF, _IFF_TUN, _IFF_NO_PI = 0x400454CA, 0x0001, 0x1000
_GET_FLAGS, _SET_FLAGS, _UP = 0x8913, 0x8914, 0x0001
_SET_ADDRESS, _SET_MASK, _SET_MTU = 0x8916, 0x891C, 0x8922
_libc = ctypes.CDLL(None, use_errno=True)


def _checked(result: int) -> None:
    if result != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


def leave_for_a_new_one() -> None:
    """Put the calling thread into a new namespace. Raises `OSError`, as all here."""
    _checked(_libc.unshare(_NEWNET))


def enter(namespace: str) -> None:
    """Put the calling thread, and all that it starts from now on, into the namespace of this path."""
    descriptor = os.open(namespace, os.O_RDONLY | os.O_CLOEXEC)
    try:
        _checked(_libc.setns(descriptor, _NEWNET))
    finally:
        os.close(descriptor)


@contextmanager
def inside(namespace: str) -> Iterator[None]:
    """The calling thread is in that namespace meanwhile; what it opens or starts there stays there."""
    own = os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
    try:
        enter(namespace)
        try:
            yield
        finally:
            _checked(_libc.setns(own, _NEWNET))
    finally:
        os.close(own)


def open_tun(name: str) -> int:
    """A TUN device called `name` in the caller's namespace: the descriptor gives and takes one IP packet a call. The
    device vanishes with the descriptor."""
    descriptor = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
    fcntl.ioctl(descriptor, _TUNSETIFF, struct.pack("16sH22x", name.encode(), _IFF_TUN | _IFF_NO_PI))
    return descriptor


def _control(request: int, name: str, argument: bytes) -> bytes:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as handle:
        return fcntl.ioctl(handle, request, struct.pack("16s24s", name.encode(), argument))


def _inet(address: str) -> bytes:
    return struct.pack("=HH4s8x", socket.AF_INET, 0, socket.inet_aton(address))


def configure(name: str, address: str, mtu: int) -> None:
    """`address` of a network of 256, the MTU in bytes, and up."""
    _control(_SET_MTU, name, struct.pack("=i", mtu))
    _control(_SET_ADDRESS, name, _inet(address))
    _control(_SET_MASK, name, _inet("255.255.255.0"))
    set_up(name, True)


def drop_address(name: str) -> None:
    _control(_SET_ADDRESS, name, _inet("0.0.0.0"))


def set_up(name: str, up: bool) -> None:
    (flags,) = struct.unpack_from("=H", _control(_GET_FLAGS, name, b""), 16)
    _control(_SET_FLAGS, name, struct.pack("=H", flags | _UP if up else flags & ~_UP))


def without_ipv6() -> None:
    """No device of the caller's namespace gets an IPv6 address of itself."""
    switch = Path("/proc/sys/net/ipv6/conf/default/disable_ipv6")
    if switch.exists():
        switch.write_text("1")


def processes_in(namespaces: Collection[int]) -> list[int]:
    """The processes in the namespaces with these inodes."""
    found = []
    for entry in os.scandir("/proc"):
        if entry.name.isdigit():
            try:
                inode = os.stat(f"/proc/{entry.name}/ns/net").st_ino
            except OSError:  # it has ended
                continue
            if inode in namespaces:
                found.append(int(entry.name))
    return found


def end_all_in(namespaces: Collection[int], timeout_s: float = 10.0) -> None:
    """Kill every process in the namespaces with these inodes. Raises `TimeoutError` where one stays."""
    deadline = time.monotonic() + timeout_s
    while living := [pid for pid in processes_in(namespaces) if pid != os.getpid()]:
        for pid in living:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        if time.monotonic() > deadline:
            raise TimeoutError(f"the processes {living} do not end")
        time.sleep(0.01)
