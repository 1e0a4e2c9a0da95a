"""What people see on a terminal: progress, tables, messages. Rich draws it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from nbvision.errors import MissingExtraError

__all__ = ["Console"]


class Console:
    """Progress bars and tables on the terminal; plain lines where output is no terminal.

    Text is printed as it is: a file may be called ``[red].jpg``.

    Raises
    ------
    MissingExtraError
        Without Rich.
    """

    def __init__(self, *, file: Any = None) -> None:
        try:
            import rich.console
        except ImportError as error:
            raise MissingExtraError("rich", extra="cli", needed_for="progress bars and tables") from error
        self._rich = rich.console.Console(file=file)

    def print(self, text: str) -> None:
        """One line, never broken: it may hold a path that somebody wants to copy."""
        self._rich.print(_printable(text), highlight=False, markup=False, emoji=False, soft_wrap=True)

    @contextlib.contextmanager
    def status(self, text: str) -> Iterator[None]:
        """A spinner while something without steps happens; where output is no terminal, a line before it."""
        self._announce(text)
        with self._rich.status(text):
            yield

    @contextlib.contextmanager
    def progress(self, text: str, total: int) -> Iterator[Callable[[], None]]:
        """A bar of ``total`` steps; call what is yielded after each. Where output is no terminal, a line before it."""
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

        self._announce(text)
        columns = (TextColumn("{task.description:<22}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        with Progress(*columns, console=self._rich) as bar:
            task = bar.add_task(text, total=total)
            yield lambda: bar.advance(task)

    def _announce(self, text: str) -> None:
        """Say what begins to a file or a pipe, which Rich's moving lines reach only when they have come to rest."""
        if not self._rich.is_terminal:
            self.print(f"{text} ...")

    def table(self, title: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        """A table; all columns but the first are right-aligned, and no cell is cut off."""
        from rich.table import Table
        from rich.text import Text

        table = Table()
        for position, name in enumerate(header):
            table.add_column(name, justify="left" if position == 0 else "right", overflow="fold")
        for row in rows:
            table.add_row(*(Text(_printable(cell)) for cell in row))
        self.print(title)
        self._rich.print(table)


def _printable(text: str) -> str:
    """The text with question marks for what no terminal can show: bytes of a file name that are no UTF-8."""
    return text.encode(errors="replace").decode()
