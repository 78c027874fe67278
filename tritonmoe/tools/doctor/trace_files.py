"""Files of unknown origin: opened whether packed or not, read piece by piece, refused where they are damaged."""

import gzip
import io
import json
import re
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NoReturn, TypeAlias

from tritonmoe.runtime.files import Unpacked, check_regular, nests_too_deep

__all__ = ["JsonPieces", "damaged", "first_bytes", "number", "open_text"]

BLOCK, PIECE = 1 << 20, 1 << 16
LONGEST_WORD = 8
"""What has so few characters before the end may be the first of a word or number."""
FIRST_BYTES = 4096
MAX_VALUE = 256 << 20
"""No value of a trace, beside the list of its events, has more characters."""
GZIP = b"\x1f\x8b"
BLANK = re.compile(r"[\s]*")
Member: TypeAlias = tuple[str, object]
"""A key of an object of JSON, and what stands there."""
NEXT = re.compile(r"\s*,\s*(?=\S)")


def damaged(path: Path | str, what: str) -> ValueError:
    """Return the error for a file that can't be trusted."""
    return ValueError(f"{path} is damaged: {what}")


def number(path: Path, where: str, values: dict, key: str, default: float | None = None) -> float:
    """Return a number of an object in a file; default where it has none.

    Raises:
        ValueError: it is no finite number, or missing without a default.
    """
    value: object = values.get(key, default)
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < 1e19:
        raise damaged(path, f"{where}: {key} is {str(value)[:40]!r} and no number")
    return float(value)


def first_bytes(path: Path) -> bytes:
    """Return how a file begins, unpacked.

    Raises:
        ValueError: it is no file, or packed and damaged. OSError: it can't be read.
    """
    check_regular(path)
    try:
        with Unpacked(path) if _is_packed(path) else path.open("rb") as file:
            return file.read(FIRST_BYTES)
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise damaged(path, f"it is packed, and can't be unpacked: {error}") from None


def open_text(path: Path) -> io.TextIOBase:
    """Open a file of text, packed or not."""
    return io.TextIOWrapper(Unpacked(path), encoding="utf-8") if _is_packed(path) else path.open(encoding="utf-8")


def _is_packed(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(2) == GZIP


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"it has {name}")


class _EndsTooSoon(ValueError):
    """The file ends in the middle."""


class JsonPieces:
    """A large file of JSON, an object of which one list may be long, read without ever holding all of it.

    `for key, value in JsonPieces(path, "traceEvents")` gives the object's members in their order; of the long list
    every element, with its key. A file that is a list itself gives its elements so. Of a file that ends in the middle
    of the list, or behind it, `is_cut` is true then, and what is whole was given.
    """

    def __init__(self, path: Path, long_key: str) -> None:
        self.path, self.long_key = path, long_key
        self._text, self._at, self._is_whole = "", 0, False
        self._decode = json.JSONDecoder(parse_constant=_no_constant).raw_decode
        self.num_elements, self.is_cut = 0, False
        self.scan: Callable[[str, int], tuple[int, int]] | None = None
        """Takes elements from the text, with the comma behind each; gives where the next one begins, and how many."""

    def __iter__(self) -> Iterator[Member]:
        """Return members and elements.

        Raises:
            ValueError: the file is damaged, or ends before the list has an element; the message says where.
        """
        try:
            with open_text(self.path) as self._file:
                yield from self._whole()
        except _EndsTooSoon as error:
            if not self.num_elements:
                raise damaged(self.path, str(error)) from None
            self.is_cut = True
        except (gzip.BadGzipFile, zlib.error) as error:
            raise damaged(self.path, f"it is packed, and can't be unpacked to its end: {error}") from None
        except UnicodeDecodeError as error:
            raise damaged(self.path, f"it is no text: {error.reason}") from None
        except RecursionError:
            raise nests_too_deep(self.path) from None

    def _whole(self) -> Iterator[Member]:
        opening = self._next()
        if opening == "[":
            yield from self._elements(self.long_key)
        elif opening == "{":
            yield from self._members()
        else:
            raise damaged(self.path, "it is no JSON object and no list")
        if self._next(allow_end=True):
            raise damaged(self.path, "something follows where it should have ended")

    def _members(self) -> Iterator[Member]:
        members: dict[str, object] = {}
        if self._peek() == "}":
            self._at += 1
            return
        while True:
            self._peek()
            key = self._value("a name")
            if not isinstance(key, str):
                raise damaged(self.path, f"a {type(key).__name__} stands where a name should")
            if self._next() != ":":
                raise damaged(self.path, f"there is no colon after {key[:40]!r}")
            following = self._peek()
            if key == self.long_key:
                if following != "[":
                    raise damaged(self.path, f"{key} is no list")
                self._at += 1
                yield from self._elements(key)
            else:
                value = self._value(key)
                if members.setdefault(key, value) != value:
                    raise damaged(self.path, f"it has the key {key[:40]!r} twice, with two values")
                yield key, value
            separator = self._next()
            if separator == "}":
                return
            if separator != ",":
                raise damaged(self.path, f"there is no comma after {key[:40]!r}")

    def _elements(self, key: str) -> Iterator[Member]:
        if self._peek() == "]":
            self._at += 1
            return
        while True:
            if self.scan is not None:
                self._at, passed = self.scan(self._text, self._at)
                self.num_elements += passed
            try:  # what nearly always is right, without a call for each element
                value, self._at = self._decode(self._text, self._at)
            except (ValueError, RecursionError):
                value = self._value(f"element {self.num_elements} of {key}")
            yield key, value
            self.num_elements += 1
            following = NEXT.match(self._text, self._at)
            if following is not None:
                self._at = following.end()
                continue
            separator = self._next()
            if separator == "]":
                return
            if separator != ",":
                raise damaged(self.path, f"there is no comma after element {self.num_elements - 1} of {key}")
            self._peek()

    def _value(self, what: str) -> object:
        grown = BLOCK
        while True:
            try:
                value, end = self._decode(self._text, self._at)
                if end < len(self._text) or self._is_whole:
                    self._at = end
                    return value
            except RecursionError:
                raise damaged(self.path, f"{what} nests too deep") from None
            except ValueError as error:
                if not isinstance(error, json.JSONDecodeError):
                    raise damaged(self.path, f"{what}: {str(error)[:80]}") from None
                # What can't be read may only not be there any more; an error far from the end of what was read is none.
                is_open = error.msg.startswith("Unterminated") or error.pos >= len(self._text.rstrip()) - LONGEST_WORD
                if self._is_whole and is_open:
                    raise self._too_soon() from None
                if self._is_whole or len(self._text) - error.pos > BLOCK // 2:
                    raise damaged(self.path, f"{what}: {str(error)[:80]}") from None
            if len(self._text) - self._at > MAX_VALUE:
                raise damaged(self.path, f"{what} has more than {MAX_VALUE} characters")
            self._fill(grown)
            grown *= 2

    def _too_soon(self) -> _EndsTooSoon:
        return _EndsTooSoon(f"it ends too soon, after {self.num_elements} elements")

    def _fill(self, count: int = BLOCK) -> None:
        blocks = [self._text[self._at :]]
        try:
            for _ in range(0, count, PIECE):
                blocks.append(self._file.read(PIECE))
                if not blocks[-1]:
                    break
        except EOFError:  # of a packed file that ends in the middle: what was unpacked before is there
            self._is_whole = True
        self._is_whole |= not blocks[-1]
        self._text, self._at = "".join(blocks), 0

    def _peek(self) -> str:
        """Return the next character that is not blank, which is the next one then; "" at the end."""
        while True:
            self._at = BLANK.match(self._text, self._at).end()  # type: ignore[union-attr]
            if self._at < len(self._text) or self._is_whole:
                return self._text[self._at : self._at + 1]
            self._fill()

    def _next(self, allow_end: bool = False) -> str:
        found = self._peek()
        if not found and not allow_end:
            raise self._too_soon()
        self._at += 1
        return found
