"""How a process joins the others that its launcher started."""

import ctypes
import fcntl
import os
import signal
import socket
import struct
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from ipaddress import ip_address
from typing import Any

from lorakit.distributed.binding import BACKENDS, bind_device, device_type, identify_device, refuse_unfit_devices
from lorakit.distributed.launchers import LAUNCHER_VARIABLES, LaunchedProcess, launched
from lorakit.distributed.processes import FailedElsewhere, ProcessLost, World, gather, set_world
from lorakit.distributed.watch import Watch
from lorakit.errors import EXIT_FAILED, EXIT_INTERRUPTED, Interrupted, LorakitError, UserError, exit_code_of, first_line

# One process may prepare rows or write a checkpoint while the others wait: it is the watch that notices who is gone.
_PATIENCE = timedelta(hours=24)
_ARRIVAL = timedelta(minutes=10)  # between the first process and the last
_GLOO_INTERFACE = "GLOO_SOCKET_IFNAME"
_PR_SET_PDEATHSIG, _SIOCGIFADDR = 1, 0x8915  # linux/prctl.h, linux/sockios.h


def _ignore(message: str) -> None:
    pass


@contextmanager
def joined(report: Callable[[str], None] = _ignore, device: str | None = None) -> Iterator[World]:
    """Within, this process is one of those that its launcher started, and sees its own device alone; alone where none
    did, or it started one.

    `device`: the type of device to compute on, instead of what this torch finds. `report`: prints why the watch ends
    this process. What is raised inside is raised on one process, whose message the user reads, and FailedElsewhere on
    the others. UserError where the launcher's environment or the devices do not fit."""
    place = launched()
    if place is None:
        yield World()
        return
    with _own_environment():
        if place.size == 1:
            yield World()
            return
        with _joined(place, report, device) as world:
            yield world


@contextmanager
def _own_environment() -> Iterator[None]:
    """Within, no variable tells the libraries of a launcher."""
    names = (*LAUNCHER_VARIABLES, _GLOO_INTERFACE)
    before = {name: os.environ[name] for name in names if name in os.environ}
    for name in LAUNCHER_VARIABLES:
        os.environ.pop(name, None)
    try:
        yield
    finally:
        for name in names:
            os.environ.pop(name, None)
        os.environ.update(before)


@contextmanager
def _joined(place: LaunchedProcess, report: Callable[[str], None], device: str | None) -> Iterator[World]:
    _end_with_parent(place)
    store = _connect(place)
    speaks = place.local_rank == 0 or place.rank == 1  # the first of each machine, should the process of rank 0 be gone
    watch = Watch(store.clone(), place.rank, place.size, speaks, bool(place.parent), report)
    complete = False
    try:
        with _one_message(watch, place.rank):
            device = _agree_on_devices(place, store, device or device_type())
            watch.start()
            world = _join_groups(device, place, store, watch)
            set_world(world)
            yield world
            gather(None)  # all leave together: none ends another's connections
            complete = True
    finally:
        _leave(watch, complete or device == "cpu")


def _agree_on_devices(place: LaunchedProcess, store: Any, device: str) -> str:
    """The type of device that every process has found and bound for itself."""
    bind_device(place, device)
    store.set(f"lorakit/device/{place.rank}", identify_device(device))
    names = [f"lorakit/device/{rank}" for rank in range(place.size)]
    try:
        store.wait(names, _ARRIVAL)
    except RuntimeError as error:
        absent = ", ".join(str(rank) for rank, name in enumerate(names) if not store.check([name]))
        raise LorakitError(
            f"after {_ARRIVAL.seconds // 60} minutes these of {place.size} processes have not joined: rank {absent}. "
            "Have they been started, and can they reach "
            f"{place.address}:{place.port}? What they print says more."
        ) from error
    refuse_unfit_devices([text.decode() for text in store.multi_get(names)])
    return device


def _join_groups(device: str, place: LaunchedProcess, store: Any, watch: Watch) -> World:
    from torch import distributed

    if _GLOO_INTERFACE not in os.environ and (interface := _interface_to(place)):
        os.environ[_GLOO_INTERFACE] = interface
    try:
        distributed.init_process_group(BACKENDS[device], store=store, rank=place.rank, world_size=place.size)
        control = distributed.new_group(backend="gloo", timeout=_PATIENCE)
    except RuntimeError as error:
        raise LorakitError(
            f"rank {place.rank} of {place.size} could not connect to the others ({first_line(error)}). Where a machine "
            f"has several networks, {_GLOO_INTERFACE} and NCCL_SOCKET_IFNAME name the interface to take."
        ) from error
    places = (place.rank, place.size, place.local_rank, place.local_size)
    return World(*places, control, watch, has_parent=watch.has_parent)


def _connect(place: LaunchedProcess) -> Any:
    """A client of the store through which the processes find each other; rank 0 holds it where no launcher does."""
    from torch import distributed

    if place.local_size < place.size and _is_loopback(place.address):
        raise UserError(
            f"MASTER_ADDR={place.address} is on every machine that machine itself, and {place.size - place.local_size} "
            f"of {place.size} processes are on others. torchrun: give --local-addr the address of each machine; else "
            "set MASTER_ADDR to the host of rank 0, or LOCAL_RANK and LOCAL_WORLD_SIZE where all are on one machine."
        )
    holds = place.rank == 0 and not place.hosted
    try:
        return distributed.TCPStore(
            place.address, place.port, place.size, holds, _ARRIVAL, wait_for_workers=False, multi_tenant=True
        )
    except RuntimeError as error:
        what = "listen at" if holds else "reach"
        raise LorakitError(
            f"rank {place.rank} of {place.size} ({place.launcher}) could not {what} {place.address}:{place.port}, "
            f"where the processes find each other: {first_line(error)}. Does that host run rank 0, is the port free "
            "there, and open between the machines? MASTER_ADDR and MASTER_PORT, or torchrun's --rdzv-endpoint, name "
            "another."
        ) from error


@contextmanager
def _one_message(watch: Watch, rank: int) -> Iterator[None]:
    """An error of several processes is raised on one of them, and FailedElsewhere on the others."""
    try:
        yield
    except FailedElsewhere:
        raise
    except ProcessLost as error:
        if code := watch.announced_code():
            raise FailedElsewhere(str(error), code) from error
        if not watch.claims_loss(str(error)):
            raise FailedElsewhere(str(error), EXIT_FAILED) from error
        raise
    except Interrupted as error:  # the processes agreed on it: none has to be ended
        if rank:
            raise FailedElsewhere(str(error), error.exit_code) from error
        watch.note_stop()
        raise
    except BaseException as error:
        code = _exit_code(error)
        if not watch.announce(code) or (isinstance(error, KeyboardInterrupt) and watch.has_parent):
            raise FailedElsewhere(str(error), watch.announced_code() or code) from error
        if isinstance(error, KeyboardInterrupt):
            raise Interrupted("interrupted") from error
        raise


def _exit_code(error: BaseException) -> int:
    if isinstance(error, KeyboardInterrupt):
        return EXIT_INTERRUPTED
    if isinstance(error, SystemExit) and isinstance(error.code, int):
        return error.code
    return exit_code_of(error) if isinstance(error, LorakitError) else EXIT_FAILED


def _leave(watch: Watch, destroys: bool) -> None:
    """`destroys`: NCCL may wait without end for a process that failed; the end of this one ends its connections."""
    from torch import distributed

    watch.leave()
    set_world(World())
    if not watch.has_parent and threading.current_thread() is threading.main_thread():
        # What is left to do is to print a message; torchrun sends SIGTERM as soon as another process has failed.
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if destroys and distributed.is_initialized():
        distributed.destroy_process_group()


def _end_with_parent(place: LaunchedProcess) -> None:
    """Where lorakit started this process, it gets SIGTERM when its parent is gone, which is a request to stop."""
    if place.parent and sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
        if os.getppid() != place.parent:
            raise Interrupted("the process that started this one has ended")


def _is_loopback(address: str) -> bool:
    try:
        entries = socket.getaddrinfo(address, None)
    except OSError:
        return False  # what the store says of it names the reason
    return all(ip_address(str(entry[4][0])).is_loopback for entry in entries)


def _interface_to(place: LaunchedProcess) -> str | None:
    """The network interface by which this machine reaches the place where the processes meet; None where it cannot be
    told. Without it gloo takes the address of the machine's name, which /etc/hosts may give as 127.0.1.1."""
    if sys.platform != "linux":
        return None
    if place.local_size == place.size:
        return "lo"
    try:
        family, _, _, _, address = socket.getaddrinfo(place.address, place.port, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.connect(address)  # sends nothing
            own = probe.getsockname()[0]
            for _, name in socket.if_nameindex():
                request = struct.pack("256s", name.encode())
                try:
                    answer = fcntl.ioctl(probe.fileno(), _SIOCGIFADDR, request)
                except OSError:
                    continue  # an interface without an address
                if socket.inet_ntoa(answer[20:24]) == own and name != "lo":
                    return name
    except OSError:
        return None
    return None
