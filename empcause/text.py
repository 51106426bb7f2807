"""Text from outside (dialogues, answers, file names, messages of libraries), made safe to show."""

import regex

# Characters that control a terminal or the direction of writing, invisible ones, line separators, lone surrogates. The joiner
# within an emoji stays: without it one picture would become several.
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
    """The message of an error, often several lines, in one line of at most `longest` characters (and "..." if it was cut)."""
    text = " ".join(str(error).split())
    return text if len(text) <= longest else f"{text[:longest]}..."


def markdown(text: str) -> str:
    """The visible text, escaped for Markdown and its tables: nothing in it acts as a link, an image, HTML, code or a formula."""
    return _MARKDOWN.sub(r"\\\g<0>", visible(text)).strip()


def code(text: str) -> str:
    """The visible text as inline code in Markdown, outside of tables; for names of files and models."""
    text = visible(text)
    ticks = "`" * (1 + max(map(len, regex.findall("`+", text)), default=0))
    space = " " if "`" in text else ""
    return f"{ticks}{space}{text}{space}{ticks}"
