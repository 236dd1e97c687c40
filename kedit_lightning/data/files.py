"""Raw records from a JSON list, a JSONL file, or the address of either; `records` makes edits of them."""

from __future__ import annotations

import contextlib
import hashlib
import http.client
import json
import os
import shutil
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import wrap_file

from kedit_lightning.cache import cache_dir
from kedit_lightning.errors import DataError


def read(path: Path | str) -> Iterator[tuple[str, Any]]:
    """Read the records of a file one by one.

    Args:
        path: A JSON list or JSONL, local or an `http(s)` address; what is downloaded is kept in `cache_dir()`.

    Yields:
        Where the record stands (`record 3 of 200` or `line 3`), and the record: decoded from a list, the bare line
        from JSONL, so that one bad line does not spoil the others (see `as_object`).

    Raises:
        DataError: The file is missing, unreadable, empty or not JSON, or cannot be downloaded.
    """
    file, text = read_text(path)
    if not text.lstrip().startswith("["):
        found = [(f"line {number}", line) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
    else:
        try:
            items = json.loads(text)
        except json.JSONDecodeError as error:
            msg = f"not valid JSON: {error.msg} (line {error.lineno}, column {error.colno}); is the file truncated?"
            raise DataError(msg, file=file) from error
        found = numbered(items)
    if not found:
        msg = "the file is empty; expected a JSON list or JSONL with at least one record"
        raise DataError(msg, file=file)
    yield from found


def read_text(path: Path | str) -> tuple[Path, str]:
    """The file at a path or an `http(s)` address (what is downloaded is kept in `cache_dir()`), and its text.

    Raises:
        DataError: It is missing, unreadable or no UTF-8, or cannot be downloaded.
    """
    file = download(path) if isinstance(path, str) and path.startswith(("http://", "https://")) else Path(path)
    try:
        return file, file.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        msg = "no such file; check the path (a relative one starts at the present directory)"
        raise DataError(msg, file=file) from None
    except UnicodeDecodeError as error:
        msg = f"expected UTF-8 text, got bytes that are not ({error.reason} at byte {error.start}); is it compressed?"
        raise DataError(msg, file=file) from error
    except OSError as error:
        msg = f"cannot be read ({error.strerror}); expected a text file"
        raise DataError(msg, file=file) from error


def numbered(records: Sequence[Any]) -> list[tuple[str, Any]]:
    """Put beside each record where it stands in its list, counted from one."""
    return [(f"record {number} of {len(records)}", record) for number, record in enumerate(records, 1)]


def as_object(raw: object) -> dict[str, Any]:
    """Decode a line of JSONL and insist on a JSON object.

    Args:
        raw: A record as `read` yields it.

    Returns:
        The record's fields.

    Raises:
        DataError: It is not a JSON object.
    """
    value, why = raw, ""
    if isinstance(raw, str):
        try:
            value = json.loads(raw)
        except json.JSONDecodeError as error:
            why = f" ({error.msg}, column {error.colno})"
    if not isinstance(value, dict):
        shown = json.dumps(raw, ensure_ascii=False) if not isinstance(raw, str) else raw
        msg = f"expected one JSON object, got {shown[:60]}{why}"
        raise DataError(msg)
    return value


def download(url: str) -> Path:
    """Fetch a file into the cache, with a progress bar, unless it is there already.

    The file is written beside its place and renamed when it is complete, so an interrupted download leaves nothing.

    Args:
        url: An `http` or `https` address.

    Returns:
        The file in `cache_dir()`; its name holds a hash of the address.

    Raises:
        DataError: There is no network, the server refuses, the transfer breaks off, or the disk is full.
    """
    name = f"{hashlib.sha256(url.encode()).hexdigest()[:8]}-{url.rstrip('/').rpartition('/')[2]}"
    file = cache_dir() / name
    if file.exists():
        return file
    partial = file.with_name(f"{name}.{os.getpid()}.part")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with urllib.request.urlopen(url, timeout=30) as response, partial.open("wb") as out:
            total, shown = int(response.headers.get("Content-Length") or 0), f"Downloading {name[9:]}"
            with wrap_file(response, total, description=shown, console=Console(stderr=True)) as body:
                shutil.copyfileobj(body, out)
            if total and out.tell() != total:
                msg = f"got {out.tell()} of {total} bytes"
                raise ConnectionError(msg)
        partial.replace(file)
    except (OSError, http.client.HTTPException) as error:
        msg = f"cannot download {url} ({error}); without a network, fetch the file elsewhere and give its path"
        raise DataError(msg) from error
    finally:
        with contextlib.suppress(OSError):
            partial.unlink()
    return file
