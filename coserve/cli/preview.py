"""`coserve finetune DATA --preview`: what is trained on, coloured in a terminal, else in brackets."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from coserve.cli.connection import channel, metadata
from coserve.cli.failure import CommandFailed

if TYPE_CHECKING:
    from rich.console import Console

MAX_BYTES = 16 * 2**20  # of a file that are sent to be looked at
_BRACKETS = ("\u27e6", "\u27e7")
_PLAIN_BRACKETS = ("[[", "]]")
# Control characters as their pictures, lest a file steers the terminal.
_PICTURES = {code: 0x2400 + code for code in range(32) if code not in (9, 10)} | {127: 0x2421}


def preview_file(given: Mapping[str, Any], path: Path, training: Mapping[str, Any]) -> None:
    """Show the first lines of a file as the server would train on them; `given` are the command's flags.

    Raises CommandFailed, with its reason where no server answers.
    """
    from rich.console import Console

    from coserve.cli.stubs import fine_tuning

    try:
        with channel(given["grpc_address"], given["ca_cert"], given["client_cert"]) as opened:
            pb, stub = fine_tuning(opened)
            request = pb.PreviewDatasetRequest(
                data=first_lines(path, given["limit"]),
                model=given["model"],
                training=pb.TrainingConfig(**training),
                limit=given["limit"],
            )
            answer = stub.PreviewDataset(request, metadata=metadata(given["api_key"]))
    except CommandFailed as failed:
        if str(failed).startswith("no server answers"):
            reason = "a preview needs the model's tokenizer, which the server has"
            raise CommandFailed(f"{failed} ({reason})") from None
        raise
    show(answer, Console())


def first_lines(path: Path, count: int) -> bytes:
    """The file's first `count` lines, or as many whole ones as fit into one message; at least the beginning
    of the first."""
    taken: list[bytes] = []
    left = MAX_BYTES
    with path.open("rb") as file:
        while len(taken) < count and (line := file.readline(left + 1)):
            if len(line) > left:
                return b"".join(taken) if taken else line
            taken.append(line)
            left -= len(line)
    return b"".join(taken)


def show(answer: Any, console: Console) -> None:
    """Print a PreviewDatasetResponse."""
    from rich.text import Text

    opening, closing = _brackets(console)
    for row in answer.rows:
        console.print(Text(_heading(row), style="bold"), soft_wrap=True)
        text = Text()
        for span in row.spans:
            shown = span.text.translate(_PICTURES)
            if not span.trained:
                text.append(shown, style="dim")
            else:
                text.append(shown if console.is_terminal else opening + shown + closing, style="green")
        console.print(text, soft_wrap=True)
    how = "in green" if console.is_terminal else f"in {opening}{closing}"
    console.print(
        Text(f"--- {_summary(answer)}; what is trained on stands {how}", style="bold"), soft_wrap=True
    )


def _heading(row: Any) -> str:
    trained = sum(label != -100 for label in row.labels[1:])
    words = [f"--- line {row.line}{f' ({row.answer})' if row.answer else ''}: {len(row.token_ids)} tokens"]
    words.append(f"{trained} of them trained on")
    if row.cut_tokens:
        words.append(f"{row.cut_tokens} more cut off")
    if row.dropped:
        words.append(f"left out: {row.dropped}")
    return ", ".join(words)


def _summary(answer: Any) -> str:
    counts = answer.counts
    words = [
        f"{counts.rows} rows ({answer.kind or 'none'}), {counts.examples} examples, {counts.tokens} tokens, "
        f"{counts.trained_tokens} trained on, the longest {counts.longest}"
    ]
    if counts.truncated:
        words.append(f"{counts.truncated} cut by {counts.cut_tokens} tokens")
    words += [f"{rows} dropped ({reason})" for reason, rows in sorted(counts.dropped.items())]
    return ", ".join(words)


def _brackets(console: Console) -> tuple[str, str]:
    try:
        "".join(_BRACKETS).encode(console.encoding)
    except (UnicodeEncodeError, LookupError):
        return _PLAIN_BRACKETS
    return _BRACKETS
