"""One Kafka request by hand: is a usable broker behind this address, and of which cluster?

A socket that connects is not enough: Kafka listens before it serves. Metadata lists a broker only once it is
registered and unfenced, which is when topics can be made on it.
"""

import socket
import struct

METADATA, VERSION = 3, 2
MAX_ANSWER_BYTES = 2**20


def cluster_behind(host: str, port: int, timeout_seconds: float = 2.0) -> str | None:
    """Ask for the cluster's metadata.

    Args:
        host: Where to connect.
        port: Where to connect.
        timeout_seconds: Bound of each single wait.

    Returns:
        The cluster id where an unfenced broker advertises exactly this address, else none.
    """
    try:
        with socket.create_connection((host, port), timeout_seconds) as connection:
            connection.settimeout(timeout_seconds)
            connection.sendall(_request())
            (size,) = struct.unpack(">i", _exactly(connection, 4))
            if not 4 < size <= MAX_ANSWER_BYTES:
                return None
            return _parse(_exactly(connection, size), port)
    except (OSError, EOFError, struct.error, UnicodeDecodeError):
        return None


def _request() -> bytes:
    client = b"oppu-probe"
    body = struct.pack(f">hhih{len(client)}si", METADATA, VERSION, 1, len(client), client, 0)  # 0 topics asked
    return struct.pack(">i", len(body)) + body


def _exactly(connection: socket.socket, count: int) -> bytes:
    parts = bytearray()
    while len(parts) < count:
        part = connection.recv(count - len(parts))
        if not part:
            raise EOFError
        parts += part
    return bytes(parts)


def _parse(answer: bytes, port: int) -> str | None:
    _, brokers = struct.unpack_from(">ii", answer)
    at, advertised = 8, False
    for _ in range(brokers):
        at += 4  # node id
        _, at = _string(answer, at)
        advertised |= struct.unpack_from(">i", answer, at)[0] == port
        _, at = _string(answer, at + 4)  # rack
    cluster, _ = _string(answer, at)
    return cluster if advertised else None


def _string(answer: bytes, at: int) -> tuple[str | None, int]:
    (length,) = struct.unpack_from(">h", answer, at)
    if length < 0:
        return None, at + 2
    (raw,) = struct.unpack_from(f">{length}s", answer, at + 2)
    return raw.decode("utf-8"), at + 2 + length
