"""What the commands print: metrics as a table, replies with the cause words highlighted."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from empcause.text import visible

if TYPE_CHECKING:
    from empcause.generator import Reply


class _Console(Console):
    def on_broken_pipe(self) -> None:
        """Tell the command that nobody reads its output any more; rich itself would end the process."""
        raise BrokenPipeError


console = _Console()

# A word with at least the first cause probability is highlighted, with at least the second one strongly.
CAUSE_THRESHOLDS = (0.25, 0.5)


def hide_file_progress() -> None:
    """Hide transformers' progress bars for reading and writing weight files; those of our own work remain."""
    from transformers.utils import logging

    logging.disable_progress_bar()


def print_metrics(metrics: Mapping[str, Any], caption: str) -> None:
    """Print the numbers among `metrics` as a two-column table with `caption` below."""
    table = Table("metric", "value")
    table.columns[1].justify = "right"
    for name, value in metrics.items():
        if isinstance(value, int | float) and not isinstance(value, bool):
            table.add_row(name, f"{value:.4g}" if isinstance(value, float) else str(value))
    console.print(table)
    console.print(Text(visible(caption)), soft_wrap=True)


def highlight(reply: "Reply") -> Text:
    """The dialogue that the extractor read, its cause words marked by their probability."""
    text, end = Text(), 0
    for word, probability in reply.causes:
        style = "underline yellow" if probability >= CAUSE_THRESHOLDS[0] else ""
        if probability >= CAUSE_THRESHOLDS[1]:
            style = "bold black on yellow"
        text.append(visible(reply.text[end : word.start]))
        text.append(visible(reply.text[word.start : word.end]), style)
        end = word.end
    return text.append(visible(reply.text[end:]))


def print_reply(reply: "Reply") -> None:
    """Print emotion with probability, the dialogue with its causes, the causes by probability, and the response."""
    console.print(
        Text("emotion   ", style="dim"), Text(reply.emotion, style="bold"), f" ({reply.probability:.0%})", sep=""
    )
    console.print(Text("dialogue  ", style="dim"), highlight(reply), sep="")
    ranked = sorted(reply.causes, key=lambda cause: -cause[1])
    causes = ", ".join(f"{visible(word.text)} ({probability:.0%})" for word, probability in ranked[:5])
    console.print(Text("causes    ", style="dim"), causes, sep="", highlight=False, markup=False)
    console.print(Text("response  ", style="dim"), Text(visible(reply.response), style="bold green"), sep="")
    if reply.unread_turns:
        console.print(
            f"The {reply.unread_turns} oldest turns did not fit into the models and were not read.", style="dim"
        )
