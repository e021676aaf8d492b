"""An HTTP client whose answers end: after so many seconds, or bytes. To be imported late: it comes with openai."""

import time
from collections.abc import Iterator
from typing import cast

import httpx2
from openai import DefaultHttpxClient

MOST_BYTES = 32 * 2**20  # of an answer; one token with its log-probabilities takes two kilobytes


class _Bounded(httpx2.SyncByteStream):
    """The body of a response. Reading it has a timeout for each piece only, which a server may send without end."""

    def __init__(self, stream: httpx2.SyncByteStream, seconds: float):
        self._stream = stream
        self._until = time.monotonic() + seconds

    def __iter__(self) -> Iterator[bytes]:
        size = 0
        for piece in self._stream:
            size += len(piece)
            if time.monotonic() > self._until:
                raise httpx2.ReadTimeout("the answer does not end")
            if size > MOST_BYTES:
                raise httpx2.ReadError(f"the answer is longer than {MOST_BYTES >> 20} MB")
            yield piece

    def close(self) -> None:
        self._stream.close()


def bounded_client(seconds: float) -> httpx2.Client:
    """A client whose responses have `seconds` for their body once it has begun; they are never compressed."""

    def bound(response: httpx2.Response) -> None:
        response.headers.pop("content-encoding", None)  # nobody asked for it, and a little may become a lot
        response.stream = _Bounded(cast(httpx2.SyncByteStream, response.stream), seconds)

    return DefaultHttpxClient(headers={"Accept-Encoding": "identity"}, event_hooks={"response": [bound]})
