"""A page of text, tables and figures, told to the terminal as it grows.

What is written is one HTML file that needs nothing else, and the figures as PNG beside it.
"""

import base64
from collections.abc import Sequence
from html import escape
from pathlib import Path

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.axes import Axes
from rich.console import Console
from rich.table import Table

STYLE = """
:root { color-scheme: light dark; --line: #8884; --soft: #8882; }
body { font: 16px/1.55 system-ui, "DejaVu Sans", sans-serif; max-width: 62rem; margin: 2.5rem auto; padding: 0 1.2rem }
h1 { line-height: 1.2; margin-bottom: .2em } h2 { margin-top: 2.4em; border-bottom: 1px solid var(--line) }
p { max-width: 46rem } .lead { font-size: 1.1em } nav a { margin-right: 1.1em }
.finding { border-left: .25rem solid #0072b2; padding: .3rem 0 .3rem .9rem }
.scroll { overflow-x: auto } figure { margin: 1.2rem 0 } figcaption { font-size: .88em; opacity: .8; max-width: 46rem }
img { max-width: 100%; height: auto; background: #fff; border-radius: 4px }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .9em; margin: .4rem 0 .8rem }
caption { text-align: left; opacity: .8; padding-bottom: .2rem }
th, td { padding: .22rem .7rem; text-align: right; border-bottom: 1px solid var(--soft); white-space: pre }
th { border-bottom: 1px solid var(--line) }
"""


class Page:
    """Collects sections and writes them.

    Args:
        title: The heading.
        lead: A sentence below it.
        folder: Where `index.html` and the figures go; made if it is not there.
        console: Where text, tables and findings are printed as they come.
    """

    def __init__(self, title: str, lead: str, folder: Path, console: Console):
        self.title = title
        self.folder = folder
        self.console = console
        self._sections: list[str] = []
        self._head = f"<h1>{escape(title)}</h1><p class='lead'>{escape(lead)}</p>"
        self._body: list[str] = []
        folder.mkdir(parents=True, exist_ok=True)

    def section(self, title: str) -> None:
        """Begins a section."""
        self._sections.append(title)
        self._body.append(f"<h2 id='s{len(self._sections)}'>{escape(title)}</h2>")
        self.console.print(f"\n[bold]{title}[/bold]")

    def text(self, text: str) -> None:
        """Adds a paragraph."""
        self._body.append(f"<p>{escape(text)}</p>")
        self.console.print(text, highlight=False, markup=False)

    def finding(self, text: str) -> None:
        """Adds a paragraph that stands out."""
        self._body.append(f"<p class='finding'>{escape(text)}</p>")
        self.console.print(f"→ {text}", highlight=False, markup=False, style="cyan")

    def table(self, title: str, table: pd.DataFrame, columns: Sequence[str]) -> None:
        """Adds some columns of a table; numbers get three significant digits, and token strings are quoted."""
        rows = [[_cell(record[column]) for column in columns] for record in table.to_dict("records")]
        self.console.print(title, highlight=False, markup=False, style="bold")
        printed = Table(*columns, box=None, header_style="dim")
        for row in rows:
            printed.add_row(*row)
        self.console.print(printed)
        html = pd.DataFrame(rows, columns=list(columns)).to_html(index=False, border=0)
        html = html.replace("<thead>", f"<caption>{escape(title)}</caption><thead>", 1)
        self._body.append(f"<div class='scroll'>{html}</div>")

    def figure(self, axes: Axes, name: str, caption: str) -> None:
        """Writes the figure of some axes as `name.png`, adds it with its caption, and closes it."""
        figure = axes.get_figure(root=True)
        assert figure is not None
        path = self.folder / f"{name}.png"
        figure.savefig(path, dpi=150, bbox_inches="tight", facecolor="white")
        plt.close(figure)
        data = base64.b64encode(path.read_bytes()).decode()
        picture = f"<img alt='{escape(caption, quote=True)}' src='data:image/png;base64,{data}'>"
        self._body.append(f"<figure>{picture}<figcaption>{escape(caption)}</figcaption></figure>")

    def write(self) -> Path:
        """Writes the page and gives its path."""
        links = "".join(f"<a href='#s{i}'>{escape(title)}</a>" for i, title in enumerate(self._sections, 1))
        head = f"<!doctype html><html lang='en'><meta charset='utf-8'><title>{escape(self.title)}</title>"
        head += f"<meta name='viewport' content='width=device-width, initial-scale=1'><style>{STYLE}</style>"
        path = self.folder / "index.html"
        path.write_text(f"{head}<body>{self._head}<nav>{links}</nav>{''.join(self._body)}</body></html>", "utf-8")
        return path


def _cell(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.3g}"
    # Tokens are quoted where their spaces and line ends would be lost.
    return repr(value) if isinstance(value, str) and value != value.strip() else str(value)
