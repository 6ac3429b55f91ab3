"""The file of a record as SQLite has it: what is declared in it, how it is opened, and how others are kept away."""

import sqlite3
from contextlib import closing
from pathlib import Path
from urllib.parse import quote

from patchsight_serve.errors import Conflict
from patchsight_serve.item import Identity

VERSION = 1
SCHEMA = """
CREATE TABLE IF NOT EXISTS facts (name TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS images (
    key INTEGER PRIMARY KEY AUTOINCREMENT, id TEXT NOT NULL UNIQUE, label TEXT, metadata TEXT NOT NULL,
    sha256 TEXT NOT NULL, vector BLOB NOT NULL, checksum BLOB NOT NULL);
CREATE INDEX IF NOT EXISTS images_by_label ON images (label) WHERE label IS NOT NULL;
CREATE TABLE IF NOT EXISTS pictures (
    key INTEGER PRIMARY KEY REFERENCES images ON DELETE CASCADE,
    thumbnail BLOB NOT NULL, checksum BLOB NOT NULL, original BLOB);
CREATE TABLE IF NOT EXISTS next_vectors (
    key INTEGER PRIMARY KEY REFERENCES images ON DELETE CASCADE, vector BLOB NOT NULL, checksum BLOB NOT NULL);
"""
NEW = f"{SCHEMA}PRAGMA user_version = {VERSION};"  # which writes in any case: a full disk could not be opened


def connect(path: Path) -> sqlite3.Connection:
    """A connection that commits durably; the caller begins and ends transactions. Raises sqlite3.Error."""
    connection = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
    # A flipped bit may leave invalid UTF-8: that is for the checksum to report, not for the driver to fail on.
    connection.text_factory = lambda raw: raw.decode(errors="replace")
    connection.execute("PRAGMA journal_mode = WAL")
    connection.execute("PRAGMA synchronous = FULL")
    connection.execute("PRAGMA foreign_keys = ON")
    return connection


def lock_out_others(path: Path) -> sqlite3.Connection:
    """SQLite's own file lock, on a file beside: it works on every system, and ends with the process."""
    connection = sqlite3.connect(path, isolation_level=None, check_same_thread=False, timeout=0)
    try:
        connection.execute("BEGIN EXCLUSIVE")
    except sqlite3.OperationalError as error:
        connection.close()
        if error.sqlite_errorcode == sqlite3.SQLITE_BUSY:
            raise Conflict(f"gallery {path.parent.name!r} is open in another process") from None
        raise
    return connection


def outlined(path: Path) -> tuple[int | None, Identity | None]:
    """How many images a file has, damaged ones counted in, and of which encoder; None where it cannot be read."""
    try:
        with closing(sqlite3.connect(f"file:{quote(str(path))}?mode=ro", uri=True)) as connection:
            (count,) = connection.execute("SELECT count(*) FROM images").fetchone()
            bound = connection.execute("SELECT value FROM facts WHERE name = 'encoder'").fetchone()
        return count, Identity.read(bound[0]) if count and bound else None
    except (sqlite3.Error, TypeError, ValueError):
        return None, None


def declared(connection: sqlite3.Connection) -> dict[tuple[str, str], str | None]:
    """What is in a file, tables, indexes and all else, by kind and name: the SQL that made it."""
    return {(kind, name): sql for kind, name, sql in connection.execute("SELECT type, name, sql FROM sqlite_master")}


def declared_by_us() -> dict[tuple[str, str], str | None]:
    """What is in the file of a record."""
    with closing(sqlite3.connect(":memory:")) as empty:
        empty.executescript(SCHEMA)
        return declared(empty)
