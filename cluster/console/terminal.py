"""The console of a command: what it prints stands there as it is, without markup, keys or control characters."""

from collections.abc import Iterable
from typing import IO, Any

from rich.console import Console, RenderableType
from rich.segment import Segment
from rich.text import Text

from cluster.console.printable import PrintableStream, printable


class Terminal(Console):
    """A console of rich that takes no text for markup or emoji, and shows it as `printable` does.

    A name such as `[/b]` or `:x:` is a name. Style is given by `rich.text.Text` and by tables.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(markup=False, emoji=False, **options)

    @property
    def file(self) -> IO[str]:
        """The stream itself, for what is drawn here is printable already, and a live line moves the cursor."""
        found: Any = Console.file.fget(self)  # type: ignore[attr-defined]
        return found.stream if isinstance(found, PrintableStream) else found

    @file.setter
    def file(self, new: IO[str]) -> None:
        self._file = new

    def render_str(self, text: str, **options: Any) -> Text:
        """Of every text, those in tables too, before it is cut into lines."""
        return super().render_str(printable(text, lines=True), **options)

    def render(self, renderable: RenderableType, options: Any = None) -> Iterable[Segment]:
        """Of what was made elsewhere; the console's own control sequences stay."""
        for segment in super().render(renderable, options):
            yield segment if segment.control else segment._replace(text=printable(segment.text, lines=True))
