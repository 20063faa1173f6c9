"""A network of Linux network namespaces joined by a switch in user space; a program, run by ``namespace_fixtures``.

``python namespace_switch.py NODE_PORT...`` makes a namespace for each port given, with a loopback and a veth pair whose
far end lies in a namespace of the switch. Frames that come out of one are put into the others they are meant for, or
dropped, or held back: so links are cut, slow and lossy as ``tc netem`` makes them, on kernels that were built without
it, and losses are drawn from a seed. Nothing has a name outside: the namespaces are gone once the switch and the nodes
are.

What listens on a node's loopback at NODE_PORT is served at the same port of the caller's own loopback, whatever becomes
of the network: that is how a test asks a node that is cut off.

The switch prints one line of JSON, the path of each namespace, when all is up. Then it takes one JSON object a line,
``{"from": [...], "to": [...], "blocked": bool, "delay_seconds": s, "loss": p}``, for every link between two nodes in
that direction, and answers ``done``. It ends with its standard input.
"""

import ctypes
import heapq
import json
import os
import random
import selectors
import socket
import subprocess
import sys
import threading
import time
from dataclasses import dataclass

CLONE_NEWNET = 0x4000_0000
SOL_PACKET, PACKET_VNET_HDR, PACKET_IGNORE_OUTGOING = 263, 15, 23
ETH_P_ALL = 3
VNET_HEADER_BYTES = 10
"""Of ``virtio_net.h``: says which checksum the sender left to its device, and passes that on."""
FRAME_BYTES = VNET_HEADER_BYTES + 65_550
SEED = 20_240_607
_LIBC = ctypes.CDLL(None, use_errno=True)


@dataclass(frozen=True, slots=True)
class Link:
    """How frames go in one direction between two nodes."""

    blocked: bool = False
    delay_seconds: float = 0.0
    loss: float = 0.0


def address_of(number: int) -> str:
    """The address of a node, counted from 0."""
    return f"10.77.0.{number + 1}"


def hardware_address_of(number: int) -> bytes:
    """Locally administered; its last byte is the node's number plus one."""
    return bytes((2, 0, 0, 0, 0, number + 1))


def new_namespace() -> int:
    """Move this thread into a network namespace of its own; a descriptor of it."""
    if _LIBC.unshare(CLONE_NEWNET) != 0:
        raise OSError(ctypes.get_errno(), "unshare(CLONE_NEWNET)")
    return os.open("/proc/self/ns/net", os.O_RDONLY)


def enter_namespace(descriptor: int) -> None:
    """Move this thread into a network namespace; sockets made before stay where they were made."""
    if _LIBC.setns(descriptor, CLONE_NEWNET) != 0:
        raise OSError(ctypes.get_errno(), "setns")


def run_ip(*arguments: str) -> None:
    """``ip`` in this thread's network namespace."""
    subprocess.run(["ip", *arguments], check=True)


def path_of(descriptor: int) -> str:
    """Where other processes find a namespace."""
    return f"/proc/{os.getpid()}/fd/{descriptor}"


def plug_in(number: int, switch: int) -> int:
    """A namespace for a node, with a cable to the switch's."""
    namespace = new_namespace()
    hardware = hardware_address_of(number).hex(":")
    run_ip("link", "set", "lo", "up")
    # One segment a frame, so that a loss is the loss of a packet, as on a wire.
    run_ip("link", "add", "name", "eth0", "address", hardware, "gso_max_segs", "1", "type", "veth",
           "peer", "name", f"port{number}", "netns", path_of(switch))  # fmt: skip
    run_ip("address", "add", f"{address_of(number)}/24", "dev", "eth0")
    run_ip("link", "set", "eth0", "up")
    enter_namespace(switch)
    run_ip("link", "set", f"port{number}", "up")
    return namespace


def open_port(number: int) -> socket.socket:
    """The switch's end of a node's cable."""
    port = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(ETH_P_ALL))
    port.setsockopt(SOL_PACKET, PACKET_VNET_HDR, 1)
    port.setsockopt(SOL_PACKET, PACKET_IGNORE_OUTGOING, 1)
    port.bind((f"port{number}", ETH_P_ALL))
    port.setblocking(False)
    return port


class Switch:
    """Passes frames on between the ports, as the links say."""

    def __init__(self, ports: list[socket.socket]) -> None:
        self._ports = ports
        self._links = {(one, other): Link() for one in range(len(ports)) for other in range(len(ports)) if one != other}
        self._random = random.Random(SEED)
        self._held: list[tuple[float, int, int, bytes]] = []
        self._frames = 0

    def run(self) -> None:
        """Until standard input ends."""
        selector = selectors.DefaultSelector()
        for number, port in enumerate(self._ports):
            selector.register(port, selectors.EVENT_READ, number)
        selector.register(sys.stdin.buffer, selectors.EVENT_READ, None)
        while True:
            wait_seconds = max(0.0, self._held[0][0] - time.monotonic()) if self._held else None
            for key, _ in selector.select(wait_seconds):
                if key.data is not None:
                    self._take(key.data)
                    continue
                line = sys.stdin.buffer.readline()
                if not line:
                    return
                self._change(json.loads(line))
            while self._held and self._held[0][0] <= time.monotonic():
                _, _, to, frame = heapq.heappop(self._held)
                self._put(to, frame)

    def _change(self, wanted: dict[str, object]) -> None:
        link = Link(bool(wanted["blocked"]), float(str(wanted["delay_seconds"])), float(str(wanted["loss"])))
        for pair in self._links:
            if pair[0] in wanted["from"] and pair[1] in wanted["to"]:  # type: ignore[operator]
                self._links[pair] = link
        print("done", flush=True)

    def _take(self, number: int) -> None:
        while True:
            try:
                frame = self._ports[number].recv(FRAME_BYTES)
            except OSError:  # nothing more for now, or a node that has ended
                return
            target = frame[VNET_HEADER_BYTES : VNET_HEADER_BYTES + 6]
            for other in range(len(self._ports)):
                if other != number and (target[0] & 1 or target == hardware_address_of(other)):
                    self._pass_on(number, other, frame)

    def _pass_on(self, number: int, other: int, frame: bytes) -> None:
        link = self._links[number, other]
        if link.blocked or self._random.random() < link.loss:
            return
        if not link.delay_seconds:
            self._put(other, frame)
            return
        self._frames += 1
        heapq.heappush(self._held, (time.monotonic() + link.delay_seconds, self._frames, other, frame))

    def _put(self, to: int, frame: bytes) -> None:
        try:
            self._ports[to].send(frame)
        except OSError:
            return  # a full queue loses frames, as a switch's does


def relay(listener: socket.socket, port: int, namespace: int) -> None:
    """Serve what listens on a node's loopback at a listener of the caller's."""
    enter_namespace(namespace)
    while True:
        client, _ = listener.accept()
        try:
            node = socket.create_connection(("127.0.0.1", port))
        except OSError:
            client.close()
            continue
        for source, sink in ((client, node), (node, client)):
            threading.Thread(target=pump, args=(source, sink), daemon=True).start()


def pump(source: socket.socket, sink: socket.socket) -> None:
    """Bytes from one connection into another, until either ends; then both end."""
    try:
        while received := source.recv(1 << 16):
            sink.sendall(received)
    except OSError:
        pass
    for end in (source, sink):
        try:
            end.shutdown(socket.SHUT_RDWR)
        except OSError:
            continue


def main(ports: list[int]) -> None:
    """Make the network and be its switch."""
    listeners = []
    for port in ports:  # of the caller's loopback: before this process leaves its namespace
        listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(("127.0.0.1", port))
        listener.listen()
        listeners.append(listener)
    own = new_namespace()
    namespaces = [plug_in(number, own) for number in range(len(ports))]
    switch = Switch([open_port(number) for number in range(len(ports))])
    for listener, port, namespace in zip(listeners, ports, namespaces, strict=True):
        threading.Thread(target=relay, args=(listener, port, namespace), daemon=True).start()
    print(json.dumps([path_of(namespace) for namespace in namespaces]), flush=True)
    switch.run()


if __name__ == "__main__":
    main([int(argument) for argument in sys.argv[1:]])
