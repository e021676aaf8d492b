"""Results on disk that processes share: keys and bytes in one SQLite file. Layer 0: no torch.

Safe for concurrent processes and for kill -9: what `put` has returned from is there, whole, for everybody; the rest is
not there at all (SQLite's write-ahead log). Not for network file systems, on which SQLite's locks do not work.
"""

import json
import logging
import sqlite3
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import closing, suppress
from pathlib import Path
from typing import TypeVar

from filelock import FileLock

from xpo.config.errors import ConfigError

T = TypeVar("T")
logger = logging.getLogger(__name__)

OFF = ("off", False, None)  # words for no file; unquoted, YAML reads the first one as a truth value
_TIMEOUT_S = 120  # how long a process waits for another one's write
# Below, an OperationalError is trouble of the moment: a full disk or a lock, say. Any other DatabaseError is damage.


def open_store(key: str, path: Path | str) -> "Store":
    """The store in a file; ConfigError, which names the configuration's `key`, if it cannot be written."""
    try:
        return Store(path)
    except (OSError, sqlite3.Error) as error:
        remedy = f"choose another file, {key}=off, or set XPO_STORES"
        raise ConfigError(f"{key}={str(path)!r} cannot be written ({error}); {remedy}") from error


class Store:
    """A table of keys and bytes in the file `path`, made with its directories if need be.

    A damaged file is set aside, with a warning, and a new one begun.
    """

    def __init__(self, path: Path | str):
        self.path = Path(path).expanduser()
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._connection = self._open()
        self._has_warned = False

    def get(self, keys: Iterable[str], is_sound: Callable[[bytes], bool] = bool) -> dict[str, bytes]:
        """The values of those keys that are there; one that is not sound is taken out, with a warning."""
        query = "SELECT key, value FROM results WHERE key IN (SELECT value FROM json_each(?))"
        found = dict(self._read(query, [json.dumps(list(keys))]))
        damaged = [key for key, value in found.items() if not (isinstance(value, bytes) and is_sound(value))]
        if damaged:
            logger.warning("xpo: %s holds %d damaged results, computed again", self.path, len(damaged))
            with suppress(sqlite3.OperationalError), self._connection as connection:
                connection.executemany("DELETE FROM results WHERE key = ?", [(key,) for key in damaged])
        return {key: value for key, value in found.items() if key not in damaged}

    def put(self, values: Mapping[str, bytes]) -> None:
        """Adds values, all or none. A key that is there already keeps its value: equal keys mean equal results.

        On a full disk, or behind a lock that is never released, they are computed again some day: a warning says so.
        """
        try:
            self._mended(lambda: self._insert(values))
        except sqlite3.OperationalError as error:
            if not self._has_warned:
                logger.warning("xpo: %s takes no new results (%s); the run goes on without it", self.path, error)
            self._has_warned = True

    def __len__(self) -> int:
        return int(self._read("SELECT count(*) FROM results", [])[0][0])

    def close(self) -> None:
        """Ends the connection; nothing is lost without it."""
        self._connection.close()

    def _insert(self, values: Mapping[str, bytes]) -> None:
        with self._connection as connection:
            connection.executemany("INSERT OR IGNORE INTO results VALUES (?, ?)", values.items())

    def _read(self, query: str, values: list[str]) -> list[tuple[str, bytes]]:
        return self._mended(lambda: self._connection.execute(query, values).fetchall())

    def _mended(self, act: Callable[[], T]) -> T:
        """What `act` returns; of a damaged file, what it returns of a new one."""
        try:
            return act()
        except sqlite3.OperationalError:
            raise
        except sqlite3.DatabaseError as error:
            self._connection.close()
            self._connection = self._open(error)
            return act()

    def _open(self, damage: sqlite3.DatabaseError | None = None) -> sqlite3.Connection:
        """A connection; to a new file, if there was `damage` in the middle of the old one."""
        # One process at a time: two that begin a file together, or set a damaged one aside, would collide.
        with FileLock(f"{self.path}.lock"):
            try:
                connection = self._connect()
                if damage is None:
                    return connection
                with closing(connection):
                    if connection.execute("PRAGMA quick_check").fetchone() == ("ok",):  # another process was faster
                        return self._connect()
            except sqlite3.OperationalError:
                raise
            except sqlite3.DatabaseError as error:
                damage = damage or error
            self._set_aside(damage)
            return self._connect()

    def _connect(self) -> sqlite3.Connection:
        connection = sqlite3.connect(self.path, timeout=_TIMEOUT_S, check_same_thread=False)
        try:
            connection.execute("PRAGMA journal_mode=WAL")
            connection.execute("PRAGMA synchronous=NORMAL")
            connection.execute("CREATE TABLE IF NOT EXISTS results (key TEXT PRIMARY KEY, value BLOB) WITHOUT ROWID")
        except sqlite3.DatabaseError:
            connection.close()
            raise
        return connection

    def _set_aside(self, error: sqlite3.DatabaseError) -> None:
        aside = self.path.with_name(f"{self.path.name}.damaged-{time.time_ns()}")
        logger.warning("xpo: %s is damaged (%s); it is now %s, and a new one begins", self.path, error, aside.name)
        for suffix in ("", "-wal", "-shm"):
            with suppress(FileNotFoundError):
                Path(f"{self.path}{suffix}").replace(f"{aside}{suffix}")
