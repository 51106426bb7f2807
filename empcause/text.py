"""Text from outside (dialogues, answers, file names, messages of libraries), made safe to show."""

import regex

# Controls (of terminals, and of the direction of writing), invisible characters, separators of lines, lone surrogates. The joiner
# within an emoji is seen: without it one picture becomes several.
_HIDDEN = regex.compile(
    r"(?<=[\p{Extended_Pictographic}\p{Emoji_Modifier}\uFE0F])\u200D(?=\p{Extended_Pictographic})(*SKIP)(*FAIL)"
    r"|[\p{Cc}\p{Cf}\p{Cs}\p{Zl}\p{Zp}]"
)
_MARKDOWN = regex.compile(r"[\\`*_\[\]<>|~&$]")


def visible(text: str) -> str:
    """The text in one line, with every character that does something instead of being seen written as its escape.

    A terminal's escape sequence becomes `\\x1b[31m`, a new line `\\n`, an override of the direction of writing `\\u202e`, a byte
    that was not UTF-8 `\\udcff`.
    """
    return _HIDDEN.sub(lambda match: match.group().encode("unicode_escape").decode(), text)


def one_line(error: BaseException | str, longest: int = 300) -> str:
    """What a library says, usually in several lines, as one; cut where it is longer than a sentence."""
    text = " ".join(str(error).split())
    return text if len(text) <= longest else f"{text[:longest]}..."


def markdown(text: str) -> str:
    """The visible text for Markdown, also in a table's cell: nothing in it is a link, an image, HTML, code or a formula."""
    return _MARKDOWN.sub(r"\\\g<0>", visible(text)).strip()


def code(text: str) -> str:
    """The visible text as code in Markdown, outside of tables: names of files and of models."""
    text = visible(text)
    ticks = "`" * (1 + max(map(len, regex.findall("`+", text)), default=0))
    space = " " if "`" in text else ""
    return f"{ticks}{space}{text}{space}{ticks}"
