"""`Verification`: what was found, as tables and as a few lines of text."""

# pandas declares what it gives as wide unions.
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportReturnType=false

from dataclasses import dataclass
from html import escape
from pathlib import Path

import pandas as pd

from llama4lab.checkpoint.spelling import listed
from llama4lab.tables.verification.coverage import FOR_ACTIVATIONS

MOST_SHOWN = 8


@dataclass(repr=False, eq=False)
class Verification:
    """What `verify` found. `print` it, or let a notebook show it.

    Attributes:
        folder: The checkpoint.
        tensors: Every tensor on disk, and what reads it.
        matrices: Numbers that the model uses, beside those of a second decoder.
        parity: How far residual stream and logits are from the reference, by layer; None without a reference.
        routing: How far the routers choose alike, by layer; None without a reference, or without routers.
        drift: The same by the reference's margin; None like `routing`.
        tokens: How many tokens model and reference were compared on.
    """

    folder: Path
    tensors: pd.DataFrame
    matrices: pd.DataFrame
    parity: pd.DataFrame | None = None
    routing: pd.DataFrame | None = None
    drift: pd.DataFrame | None = None
    tokens: int = 0

    @property
    def unread(self) -> list[str]:
        """Tensors on disk that nothing reads, although they are no scales of activations."""
        return self.tensors.loc[self.tensors["read_by"] == "", "tensor"].tolist()

    @property
    def wrong(self) -> pd.DataFrame:
        """The lines of `matrices` whose numbers are not those on disk."""
        return self.matrices[~self.matrices["ok"]]

    @property
    def ok(self) -> bool:
        """Whether every tensor on disk is read, and all numbers that were looked at are those on disk.

        Numbers that were rounded while loading (`quantize=`) may be as far away as rounding explains. How far a
        reference is does not count: that is a measurement, not a fault.
        """
        return not self.unread and self.wrong.empty

    def __str__(self) -> str:
        verdict = "in order" if self.ok else "NOT in order"
        lines = [f"Verification of {self.folder}: {verdict}", *self._disk(), *self._numbers(), *self._reference()]
        return "\n".join(lines)

    __repr__ = __str__

    def _repr_html_(self) -> str:
        head, *lines = map(escape, str(self).split("\n"))
        html = f"<b>{head}</b><pre>{chr(10).join(lines)}</pre>"
        named = {"Different": self.wrong.head(MOST_SHOWN), "By layer": self.parity, "Routers": self.routing}
        for title, table in named.items():
            if table is not None and len(table):
                filled = table.astype(object).where(table.notna(), "")
                shown = filled.to_html(index=False, float_format=lambda number: f"{number:.3g}")
                html += f"<details><summary>{title}</summary>{shown}</details>"
        return html

    def _disk(self) -> list[str]:
        roles = ", ".join(f"{count} {role}" for role, count in self.tensors["role"].value_counts().items())
        unused = int((self.tensors["read_by"] == FOR_ACTIVATIONS).sum())
        count, files = len(self.tensors), self.tensors["file"].nunique()
        size = int(self.tensors["bytes"].sum()) / 1e9
        lines = [f"  on disk   {count:,} tensors, {size:,.3g} GB, {_plural(files, 'file')}: {roles}"]
        if unused:
            lines.append(f"            {_plural(unused, 'scale')} of activations among them, not used: weights only")
        if self.unread:
            lines.append(f"            read by NOTHING: {listed(self.unread)}")
        return lines

    def _numbers(self) -> list[str]:
        table = self.matrices
        experts, rounded = int(table["expert"].notna().sum()), table[table["rounded_to"] != ""]
        equal = int(table["equal"].sum())
        lines = [
            f"  numbers   {_plural(len(table), 'tensor')} decoded a second time ({experts} of experts): {equal} equal"
            + (f", {len(self.wrong)} DIFFERENT" if len(self.wrong) else "")
        ]
        if len(rounded):
            methods = listed(rounded["rounded_to"].unique())
            usual, largest = rounded["relative_error"].median(), rounded["relative_error"].max()
            lines.append(f"            {len(rounded)} rounded while loading, to {methods}:")
            lines.append(f"            relative error {usual:.2g} (median), {largest:.2g} (largest)")
        for line in self.wrong.head(MOST_SHOWN).to_dict("records"):
            expert = "" if pd.isna(line["expert"]) else f", expert {line['expert']}"
            apart = f"off by up to {line['max_abs_difference']:.3g}, relative error {line['relative_error']:.2g}"
            lines.append(f"            {line['name']}{expert} ({line['scheme']}): {apart}")
        if len(self.wrong) > MOST_SHOWN:
            lines.append(f"            ... and {len(self.wrong) - MOST_SHOWN} more; see .wrong")
        return lines

    def _reference(self) -> list[str]:
        if self.parity is None:
            return []
        layers, logits = self.parity.iloc[:-1], self.parity.iloc[-1]
        last, worst = layers.iloc[-1], layers.loc[layers["relative_error"].idxmax()]
        lines = [
            f"  against the reference, {_plural(self.tokens, 'token')}",
            f"  residual  relative error {last['relative_error']:.2g} after the last layer; "
            f"largest after layer {worst['layer']}: {worst['relative_error']:.2g}",
            f"  logits    KL {logits['kl_mean']:.2g} nats (mean), {logits['kl_max']:.2g} (largest); same best token "
            f"{logits['top1_agreement']:.1%}; off by up to {logits['max_abs_difference']:.2g}",
        ]
        return lines if self.routing is None else [*lines, self._routes(self.routing)]

    def _routes(self, routing: pd.DataFrame) -> str:
        choices, flips = int(routing["tokens"].sum()), int(routing["flips"].sum())
        agreement = float((routing["agreement"] * routing["tokens"]).sum()) / choices
        text = f"  routing   {agreement:.1%} of the experts are the same; {flips} of {choices} choices differ"
        if flips:
            usual, largest = routing["margin"].median(), routing["largest_flip"].max()
            text += f",\n            at margins up to {largest:.2g} (the usual margin is {usual:.2g})"
        return text


def _plural(count: int, noun: str) -> str:
    return f"{count:,} {noun}{'' if count == 1 else 's'}"
