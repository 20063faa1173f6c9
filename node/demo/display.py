"""What a person sees while the demonstration runs.

On a terminal: headings, tables, a spinner while something is awaited, and one live panel while the job trains,
with lines of note above it. Elsewhere the same content as plain lines, the panel as one line now and then. With
``quiet`` nothing but what ``always`` prints. Nothing is decided here.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

from rich.box import SIMPLE_HEAD
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.markup import escape
from rich.padding import Padding
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

BARS = "▁▂▃▄▅▆▇█"
PLAIN_WIDTH = 120
PLAIN_EVERY_PERCENT = 10
LOSS_WIDTH = 48
BAR_WIDTH = 52
PANEL_WIDTH = 92
INDENT = 3

OK = "[green]✓[/]"
NO = "[red]✗[/]"


@dataclass(slots=True)
class TrainingView:
    """What the live panel shows; the story changes it as it goes."""

    of: int
    step: int = 0
    losses: list[float] = field(default_factory=list)
    refused: int = 0
    reasons: list[str] = field(default_factory=list)
    rollbacks: int = 0
    grant: str = "none yet"
    nodes: dict[str, str] = field(default_factory=dict)
    """Member name to ``up``, ``down`` or ``back``."""
    height: int = 0
    log_size: int = 0
    finality_ms: float = 0.0
    base_first: int = 0
    base_step: int = 0
    base_of: int = 0

    @property
    def percent(self) -> int:
        """Share of steps done."""
        return 100 * self.step // self.of if self.of else 0


class Display:
    """Prints to a ``rich`` console."""

    def __init__(self, console: Console | None = None, quiet: bool = False) -> None:
        if console is None:
            console = Console(highlight=False)
        if not console.is_terminal:
            console = Console(highlight=False, file=console.file, width=PLAIN_WIDTH, no_color=True)
        self._console = console
        self._quiet = quiet
        self._printed_percent = -1

    @property
    def lively(self) -> bool:
        """Whether things may move."""
        return self._console.is_terminal and not self._quiet

    def title(self, heading: str, sentence: str) -> None:
        """The very first lines."""
        self._print()
        self.line(f"[bold]{heading}[/]")
        self.line(f"[dim]{sentence}[/]")

    def act(self, number: int, heading: str, sentence: str) -> None:
        """The heading of an act."""
        self._print()
        self._print(Text.from_markup(f"[bold cyan]{number}[/]  [bold]{heading}[/]  [dim]{sentence}[/]"))

    def line(self, markup: str = "", indent: int = INDENT) -> None:
        """A line inside an act."""
        self._print(Padding(Text.from_markup(markup), (0, 0, 0, indent), expand=False))

    def done(self, markup: str) -> None:
        """Something that came out well."""
        self.line(f"{OK} {markup}")

    def table(self, headings: Sequence[str], rows: Sequence[Sequence[str]], right: Sequence[int] = ()) -> None:
        """A small table; columns numbered in ``right`` are aligned to the right. Cells are markup."""
        headed = any(headings)
        table = Table(box=SIMPLE_HEAD if headed else None, header_style="dim", pad_edge=False, show_header=headed)
        table.show_edge = False
        for number, heading in enumerate(headings):
            table.add_column(heading, justify="right" if number in right else "left", overflow="fold")
        for row in rows:
            table.add_row(*row)
        self._print(Padding(table, (0, 0, 0, INDENT), expand=False))

    def verbatim(self, text: str) -> None:
        """A command to copy: one line, however long, never wrapped or coloured inside."""
        if not self._quiet:
            self._console.print(Text(text, style="cyan"), soft_wrap=True)

    @contextmanager
    def waiting(self, sentence: str) -> Iterator[None]:
        """A spinner while something is awaited."""
        if not self.lively:
            yield
            return
        with self._console.status(f"[dim]{sentence}[/]", spinner="dots"):
            yield

    @contextmanager
    def training(self, view: TrainingView) -> Iterator[None]:
        """The live panel over ``view``."""
        if not self.lively:
            yield
            return
        with Live(
            get_renderable=lambda: training_panel(view), console=self._console, refresh_per_second=8, transient=True
        ):
            yield

    def trained(self, view: TrainingView) -> None:
        """The view moved on: without a panel, say so now and then."""
        if self._quiet or self.lively:
            return
        if view.percent // PLAIN_EVERY_PERCENT > self._printed_percent // PLAIN_EVERY_PERCENT:
            self._printed_percent = view.percent
            loss = f"loss {view.losses[-1]:.3f}" if view.losses else "no loss yet"
            self.line(
                f"step {view.step}/{view.of}  {loss}  refused {view.refused} examples  ledger block {view.height}"
            )

    def base_trained(self, view: TrainingView) -> None:
        """The base model moved on: without a panel, say so at its beginning and end."""
        if not self._quiet and not self.lively and view.base_step in (view.base_first, view.base_of):
            self.line(f"base model, trained once and kept: step {view.base_step}/{view.base_of}")

    def always(self, text: str) -> None:
        """Printed even when quiet; plain text."""
        self._console.print(Text(text), soft_wrap=True)

    def _print(self, content: RenderableType = "") -> None:
        if self._quiet:
            return
        if self._console.is_terminal:
            self._console.print(content)
            return
        with self._console.capture() as captured:
            self._console.print(content)
        for line in captured.get().splitlines():
            self._console.print(Text(line.rstrip()), soft_wrap=True)


def training_panel(view: TrainingView) -> RenderableType:
    """The live panel."""
    rows = Table.grid(padding=(0, 2))
    rows.add_column(style="dim", justify="right", min_width=8)
    rows.add_column()
    if view.base_step < view.base_of:
        rows.add_row("base", _bar(view.base_step, view.base_of))
        rows.add_row("", Text("the base model is trained once and kept for the next run", style="dim"))
    rows.add_row("step", _bar(view.step, view.of))
    loss = f"{view.losses[0]:.2f} → {view.losses[-1]:.2f}" if view.losses else "–"
    rows.add_row("loss", Text.assemble((f"{loss}  ", "bold"), (sparkline(view.losses, LOSS_WIDTH), "green")))
    reasons = f": {', '.join(view.reasons)}" if view.reasons else ""
    rows.add_row("refused", Text(f"{view.refused} examples{reasons}", style="yellow"))
    rows.add_row(
        "undone", Text(f"{view.rollbacks} steps, rolled back bit for bit", style="red" if view.rollbacks else "")
    )
    rows.add_row("grant", Text(view.grant))
    ledger = f"ledger block {view.height} · {view.log_size} events final"
    if view.finality_ms:
        ledger += f" · finality {view.finality_ms:.0f} ms (median)"
    rows.add_row("log", Text(ledger))
    colours = {"up": "green", "back": "green", "down": "bold red"}
    marks = {"up": "●", "back": "●", "down": "✗"}
    nodes = Text()
    for name, state in view.nodes.items():
        nodes.append(f"{marks[state]} {name}  ", colours[state])
    rows.add_row("nodes", nodes)
    return Padding(Panel(Group(rows), border_style="dim", width=PANEL_WIDTH, padding=(0, 1)), (0, 0, 0, INDENT))


def _bar(done: int, of: int) -> Table:
    progress = Table.grid(padding=(0, 1))
    progress.add_row(Text(f"{done:>4}/{of}"), ProgressBar(total=max(of, 1), completed=done, width=BAR_WIDTH))
    return progress


def sparkline(values: Sequence[float], width: int) -> str:
    """``values`` as one line of at most ``width`` bars, each the mean of its stretch."""
    if not values:
        return ""
    columns = min(width, len(values))
    means = []
    for column in range(columns):
        first = column * len(values) // columns
        stretch = values[first : max(first + 1, (column + 1) * len(values) // columns)]
        means.append(sum(stretch) / len(stretch))
    low, high = min(means), max(means)
    span = (high - low) or 1.0
    return "".join(BARS[min(len(BARS) - 1, int((mean - low) / span * len(BARS)))] for mean in means)


def safe(text: str) -> str:
    """Somebody else's words, as markup that says them and nothing more."""
    return escape("".join(character if character.isprintable() else " " for character in text))
