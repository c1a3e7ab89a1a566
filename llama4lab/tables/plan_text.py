"""The tables of a memory plan as a reader wants them: sizes in round numbers, as text or HTML."""

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

import pandas as pd

UNITS = (("GB", 10**9), ("MB", 10**6), ("kB", 10**3))


@dataclass(frozen=True)
class Block:
    """A table of texts.

    Attributes:
        header: Of each column.
        rows: The cells.
        words: Which columns are words; the others are numbers, which end below each other.
    """

    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    words: Sequence[int] = (0,)


def size_text(nbytes: float | int) -> str:
    """Gives a size as "64.92 GB"."""
    unit, each = next(((unit, each) for unit, each in UNITS if abs(nbytes) >= each), ("B", 1))
    return f"{nbytes / each:,.{2 if each > 1 else 0}f} {unit}"


def rate_text(rate: float) -> str:
    """Gives a rate as "7.00 GB/s"."""
    return f"{size_text(rate)}/s" if rate == rate else "an unknown rate"


def component_block(table: pd.DataFrame) -> Block:
    """Gives the parts of the model, and their sum."""
    numbers = ["parameters", "bytes_stored", "bytes_in_memory"]
    total = {"component": "total", "device": "", **{name: sum(table[name].tolist()) for name in numbers}}
    rows = [
        [row["component"], f"{row['parameters']:,}", *(size_text(row[name]) for name in numbers[1:]), row["device"]]
        for row in [*_records(table), total]
    ]
    return Block(["component", "parameters", "on disk", "in memory", "device"], rows, (0, 4))


def device_block(devices: pd.DataFrame) -> Block:
    """Gives the devices."""
    sizes = ["budget", "weights", "working_memory", "kept", "left"]
    rows = [
        [row["device"], *(size_text(row[name]) for name in sizes), _slots(row["expert_slots"], row["share"])]
        for row in _records(devices)
    ]
    return Block(["device", "budget", "weights", "set aside", "kept", "left", "expert slots"], rows)


def working_block(working: pd.DataFrame) -> Block:
    """Gives what is set aside."""
    rows = [[row["device"], row["what"], size_text(row["nbytes"]), row["note"]] for row in _records(working)]
    return Block(["device", "for", "bytes", "which is"], rows, (0, 1, 3))


def time_block(times: pd.DataFrame) -> Block:
    """Gives what passes wait for."""
    sizes = ["bytes_used", "bytes_from_device", "bytes_from_ram", "bytes_from_disk"]
    rows = [
        [
            f"{row['tokens']:,}",
            f"{row['experts_per_layer']:.1f}",
            *(size_text(row[name]) for name in sizes),
            _seconds(row["seconds"]),
            _seconds(row["seconds_first"]),
        ]
        for row in _records(times)
    ]
    header = ["tokens", "experts a layer", "used", "on device", "from RAM", "from disk", "seconds", "first time"]
    return Block(header, rows, ())


def _records(table: pd.DataFrame) -> list[dict[str, Any]]:
    return [{str(name): value for name, value in row.items()} for row in table.to_dict("records")]


def as_text(report: Sequence[str | Block]) -> str:
    """Gives sentences and tables for a terminal."""
    return "\n\n".join(part if isinstance(part, str) else _lines(part) for part in report)


def as_html(report: Sequence[str | Block]) -> str:
    """Gives the same for a notebook."""
    return "".join(f"<p>{escape(part)}</p>" if isinstance(part, str) else _html(part) for part in report)


def _slots(slots: int, share: float) -> str:
    return f"{slots:,} ({share:.0%})" if slots else "-"


def _seconds(seconds: float) -> str:
    return f"{seconds:,.3g}" if seconds == seconds else "?"


def _lines(block: Block) -> str:
    table = [block.header, *block.rows]
    widths = [max(len(row[column]) for row in table) for column in range(len(block.header))]
    lines = [
        "  ".join(cell.ljust(width) if column in block.words else cell.rjust(width)
                  for column, (cell, width) in enumerate(zip(row, widths, strict=True))).rstrip()
        for row in table
    ]  # fmt: skip
    return "\n".join(lines)


def _html(block: Block) -> str:
    def cell(tag: str, column: int, text: str) -> str:
        return f"<{tag} style='text-align:{'left' if column in block.words else 'right'}'>{escape(text)}</{tag}>"

    rows = [
        "<tr>" + "".join(cell(tag, column, text) for column, text in enumerate(row)) + "</tr>"
        for tag, row in [("th", block.header), *(("td", row) for row in block.rows)]
    ]
    return f"<table>{''.join(rows)}</table>"
