"""A gallery as one file of SQLite: a consistent copy of its record, and what such a file must be to become one.

A file that comes from outside is not trusted. What it declares is compared with what we declare, so that no trigger or
view of its maker runs here; then SQLite looks over its pages, and we over its rows: a checksum tells damage, and says
nothing of who wrote it.
"""

import re
import sqlite3
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from patchsight_serve.embedded_gallery import EmbeddedGallery
from patchsight_serve.errors import DamagedFile, InvalidRequest, PatchsightError, StorageFull
from patchsight_serve.item import Identity, check_id, check_label, encode_metadata, parse_metadata
from patchsight_serve.next_vectors import FACT
from patchsight_serve.record import STEPS
from patchsight_serve.record_file import VERSION, declared, declared_by_us
from patchsight_serve.row import Row, rows_in
from patchsight_serve.scratch import Scratch

CHUNK = 1000  # rows at once
MAX_VALUE = 16 * 1024 * 1024  # bytes of a row, its picture left aside
MAX_KEY = 2**62  # far beyond any gallery, and far from where SQLite has no more
UNIT = 1e-4  # how far a vector's length may be from 1
TABLES = ("facts", "images", "pictures")
_SHA256 = re.compile(r"[0-9a-f]{64}|")


def copy(gallery: EmbeddedGallery, scratch: Scratch, left: threading.Event) -> BinaryIO:
    """What was committed when it began, as a file of its own, which is open and has no name any more. Reads and writes
    go on meanwhile. Ends with an error once `left` is set. Raises NotFound (removed meanwhile), StorageFull."""
    with scratch.folder() as folder:
        path = folder / "gallery.sqlite"
        with gallery.long_read(left) as connection:
            connection.execute("VACUUM INTO ?", (str(path),))
        return path.open("rb")


def check(path: Path, skip_damaged: bool, left: threading.Event) -> list[str]:
    """Whether a file may become a gallery. Returns the ids of damaged rows that were taken out of it.

    skip_damaged: take them out, where there are any. Ends with an error once `left` is set.

    Raises InvalidRequest for a file that no server of ours wrote, DamagedFile for one that was changed since,
    StorageFull.
    """
    with _opened(path, left) as connection:
        _check_declared(connection)
        said = [line for (line,) in connection.execute("PRAGMA integrity_check(3)")]
        if said != ["ok"]:
            raise DamagedFile(f"the file is damaged: {'; '.join(said)}")
        if connection.execute("PRAGMA foreign_key_check").fetchone():
            raise InvalidRequest("the file holds a picture of no image")
        _check_values(connection)
        damaged, count = _damaged(connection)
        if damaged and not skip_damaged:
            some = ", ".join(list(damaged.values())[:3])
            raise DamagedFile(
                f"{len(damaged):,} of {count:,} rows are damaged, among them {some}; skip_damaged=true leaves them out",
                param="skip_damaged",
            )
        with connection:
            connection.execute("BEGIN IMMEDIATE")  # also where there is nothing to take out: it has to be possible
            connection.executemany("DELETE FROM images WHERE key = ?", [(key,) for key in damaged])
            connection.execute("DELETE FROM facts WHERE name = ?", (FACT,))
            if ("table", "next_vectors") in declared(connection):
                connection.execute("DELETE FROM next_vectors")  # of an encoder that nobody has asked for here
    return sorted(damaged.values())


@contextmanager
def _opened(path: Path, left: threading.Event) -> Iterator[sqlite3.Connection]:
    """SQLite's errors in our words."""
    connection = sqlite3.connect(path, isolation_level=None)
    try:
        connection.text_factory = lambda raw: raw.decode(errors="replace")
        connection.set_progress_handler(left.is_set, STEPS)
        for pragma in ("trusted_schema = OFF", "cell_size_check = ON", "foreign_keys = ON"):
            connection.execute(f"PRAGMA {pragma}")
        yield connection
    except UnicodeDecodeError:  # what SQLite says of a name that is damaged holds the name
        raise DamagedFile("the file is damaged: a name in it is no text") from None
    except sqlite3.Error as error:
        code = getattr(error, "sqlite_errorcode", None)
        if code == sqlite3.SQLITE_FULL:
            raise StorageFull("no space left to look the file over; nothing of this request was stored") from error
        if code == sqlite3.SQLITE_NOTADB:
            raise InvalidRequest("the body is not a file of SQLite") from None
        if code is not None and code & 0xFF == sqlite3.SQLITE_CORRUPT:
            raise DamagedFile(f"the file is damaged: {error}") from None
        raise InvalidRequest(f"the file cannot be read: {error}") from None
    finally:
        connection.close()


def _check_declared(connection: sqlite3.Connection) -> None:
    """Nothing but what our own files have: an index may be missing, and is made when the gallery is opened."""
    (version,) = connection.execute("PRAGMA user_version").fetchone()
    there, ours = declared(connection), declared_by_us()
    if not all(("table", name) in there for name in TABLES):
        raise InvalidRequest("the file is not the backup of a gallery")
    if version != VERSION:
        raise InvalidRequest(f"the file has format {version}, this server reads {VERSION}")
    for (kind, name), sql in there.items():
        if ours.get((kind, name), "") != sql:
            raise InvalidRequest(f"the file declares {kind} {name[:60]!a}, which no gallery has")


def _check_values(connection: sqlite3.Connection) -> None:
    """What lies beside the rows of the images."""
    kinds = "typeof(thumbnail) != 'blob' OR typeof(checksum) != 'blob' OR typeof(original) NOT IN ('blob', 'null')"
    if connection.execute(f"SELECT 1 FROM pictures WHERE {kinds} LIMIT 1").fetchone():
        raise InvalidRequest("the file holds a picture that is not bytes")
    for table, last in connection.execute("SELECT name, seq FROM sqlite_sequence"):
        if table != "images" or not isinstance(last, int) or not 0 <= last <= MAX_KEY:
            raise InvalidRequest(f"the file counts its keys to {str(last)[:60]}")
    bound = connection.execute("SELECT value FROM facts WHERE name = 'encoder'").fetchone()
    filled = connection.execute("SELECT 1 FROM images LIMIT 1").fetchone()
    if bound is None and filled is None:
        return
    try:
        encoder = Identity.read(bound[0])
        known = isinstance(encoder.name, str) and bool(_SHA256.fullmatch(encoder.sha256)) and encoder.sha256 != ""
    except (TypeError, ValueError):
        known = False
    if not known:
        raise InvalidRequest("the file does not say which encoder made its vectors")


def _damaged(connection: sqlite3.Connection) -> tuple[dict[int, str], int]:
    """The ids of damaged rows by their keys, and how many rows there are. Raises InvalidRequest for a row that was
    never one of ours."""
    damaged: dict[int, str] = {}
    count, dim = 0, None
    connection.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, MAX_VALUE)
    for rows in rows_in(connection, CHUNK):
        count += len(rows)
        sound = []
        for row in rows:
            if not 0 < row.key <= MAX_KEY:
                raise InvalidRequest(f"the file has a row with key {row.key}")
            if _is_typed(row) and row.intact:
                sound.append(row)
            else:
                damaged[row.key] = row.id if isinstance(row.id, str) else repr(row.id)[:60]
        dim = _check_rows(sound, dim)
    return damaged, count


def _is_typed(row: Row) -> bool:
    """SQLite's columns take values of any type."""
    texts = all(isinstance(value, str) for value in (row.id, row.metadata, row.sha256))
    return texts and isinstance(row.label, str | None) and isinstance(row.vector, bytes)


def _check_rows(rows: list[Row], dim: int | None) -> int | None:
    """That rows hold what can be added to a gallery; `dim` is how many numbers vectors had so far. Raises
    InvalidRequest."""
    for row in rows:
        try:
            check_id(row.id)
            check_label(row.label)
            encode_metadata(parse_metadata(row.metadata))
        except PatchsightError as error:
            raise InvalidRequest(f"the file's row {row.key}: {error.message}", error.param) from None
        if not _SHA256.fullmatch(row.sha256):
            raise InvalidRequest(f"the file's row {row.key}: {row.sha256[:80]!a} is not a sha256")
        dim = len(row.vector) // 4 if dim is None else dim
        if not row.vector or len(row.vector) != 4 * dim:
            raise InvalidRequest(f"the file's row {row.key}: a vector of {len(row.vector)} bytes, not of {4 * dim}")
    if rows:
        vectors: Any = np.frombuffer(b"".join(row.vector for row in rows), dtype="<f4").reshape(len(rows), -1)
        with np.errstate(over="ignore", invalid="ignore"):
            off = np.flatnonzero(~(np.abs(np.linalg.norm(vectors.astype(np.float64), axis=1) - 1) <= UNIT))
        if off.size:
            raise InvalidRequest(f"the file's row {rows[off[0]].key}: its vector is not of length 1")
    return dim
