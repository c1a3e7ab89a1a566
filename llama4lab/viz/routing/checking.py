"""Whether a table can be drawn at all."""

import pandas as pd


def check(table: pd.DataFrame, *columns: str) -> None:
    """Makes sure that a table has lines and columns.

    Raises:
        ValueError: if it has no line, or lacks one of the columns.
    """
    missing = [column for column in columns if column not in table]
    if missing:
        found = ", ".join(map(str, table.columns)) or "none"
        raise ValueError(f"The plot needs the column {missing[0]!r}; the table has the columns {found}.")
    if table.empty:
        raise ValueError("There is nothing to draw: the table has no line.")
