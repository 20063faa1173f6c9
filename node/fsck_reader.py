"""Reading a damaged database, and keeping account of what is wrong with it; ``fsck.py`` knows what should be there.

What cannot be read is noted under its column family and key, reads as missing, and stops nothing.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field

from msgspec import Struct

from node.store_layout import Database

MAX_DAMAGES = 100


class Damage(Struct, frozen=True):
    """One thing that is not as it should be: column family, key in words, expected and found."""

    family: str
    key: str
    detail: str


@dataclass(slots=True)
class Report:
    """What was checked and what was found."""

    height: int = 0
    log_size: int = 0
    state_values: int = 0
    missing_blocks: int = 0
    """Ledger blocks of a log that began at a snapshot which are not fetched yet: no damage, but not checked either."""
    damages: list[Damage] = field(default_factory=list)
    damages_left_out: int = 0

    @property
    def sound(self) -> bool:
        """Whether nothing is damaged."""
        return not self.damages

    def add(self, family: str, key: str, detail: str) -> None:
        """Note a damage; past ``MAX_DAMAGES`` they are only counted."""
        if len(self.damages) < MAX_DAMAGES:
            self.damages.append(Damage(family, key, detail))
        else:
            self.damages_left_out += 1


class Reader:
    """The database, key by key; what cannot be read is a damage and reads as missing."""

    def __init__(self, database: Database, report: Report) -> None:
        self._database = database
        self._report = report

    def close(self) -> None:
        """Close the database."""
        self._database.families.clear()
        self._database.handles.clear()
        self._database.root.close()

    def get(self, family: str, key: bytes, key_name: str) -> bytes | None:
        """The value, None where it is missing or unreadable. The latter is noted."""
        try:
            value: bytes | None = self._database.families[family].get(key)
        except Exception as error:
            if type(error) is not Exception:  # rocksdict's own errors are bare Exceptions
                raise
            self._report.add(family, key_name, f"unreadable: {error}")
            return None
        return value

    def need(self, family: str, key: bytes, key_name: str) -> bytes | None:
        """As ``get``, and that it is missing is noted too."""
        before = len(self._report.damages) + self._report.damages_left_out
        value = self.get(family, key, key_name)
        if value is None and before == len(self._report.damages) + self._report.damages_left_out:
            self._report.add(family, key_name, "missing")
        return value

    def items(self, family: str) -> Iterator[tuple[bytes, bytes]]:
        """Everything in a family, as far as it can be read; where it cannot is noted."""
        iterator = self._database.families[family].iter()
        try:
            iterator.seek_to_first()
            while iterator.valid():
                yield iterator.key(), iterator.value()
                iterator.next()
            iterator.status()
        except Exception as error:
            if type(error) is not Exception:
                raise
            self._report.add(family, "scan", f"unreadable: {error}")
        finally:
            del iterator  # it would keep the database open
