"""What a search leaves behind when it is interrupted: every answer that cost time, one line each.

A line is written as soon as the answer is there, so that a run that is killed loses what it was doing at that moment and no
more. A line that was cut off is no error; of two of one name the later one counts. The journal counts only for the same
device, kernels, versions and effort.
"""

from __future__ import annotations

import contextlib
import json
import time
import warnings
from pathlib import Path
from typing import IO, Any

SCHEMA = 2


class Journal:
    """Answers by kind and name. Several processes of one run have one each, and read all of them when they begin.

    Args:
        path: the file of this process; its siblings are those with another number in the place of ``rank``.
        fingerprint: what the answers depend on.
        fresh: remove them and begin anew. Those of the other processes are left to these, who may have begun already.
        ranks: how many processes the run has.

    Attributes:
        spent_before: how many seconds the interrupted runs before took, up to the last answer that was written down.
    """

    def __init__(self, path: Path, fingerprint: str, fresh: bool = False, ranks: int = 1) -> None:
        self.path, self.fingerprint = path, fingerprint
        self._known: dict[tuple[str, str], Any] = {}
        self._file: IO[str] | None = None
        for one in siblings(path):
            if not fresh:
                self._read(one)
            elif one == path or _rank(one) >= ranks:
                one.unlink(missing_ok=True)
        self.spent_before: float = max((seconds for (kind, _), seconds in self._known.items() if kind == "spent"), default=0.0)
        self._began = time.monotonic()

    def _read(self, path: Path) -> None:
        try:
            with open(path, encoding="utf-8") as file:
                head = json.loads(file.readline())
                if (head["schema"], head["fingerprint"]) != (SCHEMA, self.fingerprint):
                    return
                for line in file:
                    if not line.endswith("\n"):
                        break
                    kind, name, answer = json.loads(line)
                    self._known[kind, name] = answer
        except FileNotFoundError:
            pass
        except (OSError, ValueError, KeyError, TypeError):
            warnings.warn(f"{path} is not readable as the journal of a search; what it held is done again", stacklevel=4)

    def get(self, kind: str, name: str) -> Any:
        """The answer, or None."""
        return self._known.get((kind, name))

    def count(self, kind: str) -> int:
        return sum(one == kind for one, _ in self._known)

    def put(self, kind: str, name: str, answer: Any) -> None:
        """Remembers an answer and writes it down, and how long the run has taken until then."""
        if self._file is None:
            self._begin()
        self.note("spent", str(_rank(self.path)), round(self.spent_before + time.monotonic() - self._began, 3))
        self.note(kind, name, answer)

    def note(self, kind: str, name: str, answer: Any) -> None:
        """Remembers what has cost nothing: it is written down with the first answer, and alone makes no file."""
        self._known[kind, name] = answer
        if self._file is not None:
            self._file.write(json.dumps([kind, name, answer], separators=(",", ":")) + "\n")
            self._file.flush()

    def _begin(self) -> None:
        """A file of this process with all that is known: what is of another run goes, what was cut off too."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        temporary = self.path.with_name(f"{self.path.name}.tmp")
        self._file = open(temporary, "w", encoding="utf-8")  # noqa: SIM115 - closed in close()
        self._file.write(json.dumps({"schema": SCHEMA, "fingerprint": self.fingerprint}) + "\n")
        for (kind, name), answer in self._known.items():
            self._file.write(json.dumps([kind, name, answer], separators=(",", ":")) + "\n")
        self._file.flush()
        temporary.replace(self.path)

    def close(self) -> None:
        if self._file is not None:
            with contextlib.suppress(OSError):
                self._file.close()
            self._file = None

    def remove(self) -> None:
        """Of a run that is done: the files of all its processes."""
        self.close()
        for one in siblings(self.path):
            one.unlink(missing_ok=True)


def journal_path(output: Path, rank: int = 0) -> Path:
    """The journal of an output file: hidden, beside it."""
    return output.with_name(f".{output.stem}.search.{rank}.jsonl")


def siblings(path: Path) -> list[Path]:
    """The journals of all processes of a run, this one's among them."""
    stem = path.name.rsplit(".", 2)[0]
    found = path.parent.glob(f"{_literal(stem)}.*.jsonl")
    return sorted(one for one in found if one.name.rsplit(".", 2)[0] == stem and _rank(one) >= 0)


def _rank(path: Path) -> int:
    number = path.name.rsplit(".", 2)[1]
    return int(number) if number.isdecimal() else -1


def _literal(text: str) -> str:
    return "".join(f"[{character}]" if character in "*?[" else character for character in text)
