"""Plain text out of the markup that Debian's documentation comes in: HTML, manual pages, Metamath databases."""

import re
from html.parser import HTMLParser

_PARAGRAPH_TAGS = frozenset(("h1", "h2", "h3", "h4", "h5", "h6", "p", "pre", "table"))
_CELLS = frozenset(("td", "th"))
_BLOCKS = _PARAGRAPH_TAGS | _CELLS | {"blockquote", "br", "dd", "div", "dl", "dt", "hr", "li", "ol", "tr", "ul"}
_VOID = frozenset(("area", "base", "br", "col", "hr", "img", "input", "link", "meta", "wbr"))
_WITHOUT_TEXT = frozenset(("head", "script", "style"))
_NAVIGATION = frozenset(("banner", "docnav", "navfooter", "navheader", "toc"))
"""Classes and ids of DocBook's and Publican's page furniture."""

_HEADINGS = frozenset(("SH", "SS"))
_PARAGRAPHS = frozenset(("HP", "LP", "P", "PP", "RS", "sp"))
_TEXT_MACROS = frozenset(("B", "I", "SB", "SM"))
_ALTERNATING_MACROS = frozenset(("BI", "BR", "IB", "IR", "RB", "RI"))
_BLOCK_ENDS = {"de": "..", "ig": "..", "TS": ".TE"}
_ROFF_ESCAPE = re.compile(
    r"""\\(?: ".* | [fmMsk](?:\(..|\[[^]]*\]|[+-]?\d|.) | [hvwzbD]'[^']*' | n(?:\(..|\[[^]]*\]|.)
      | \*(?:\((?P<string>..)|\[[^]]*\]|.) | \((?P<character>..) | \[(?P<name>[^]]*)\] | (?P<other>.) )""",
    re.VERBOSE,
)
_ROFF_CHARACTERS = {"em": "—", "en": "–", "bu": "•", "co": "©", "rg": "®", "aq": "'", "cq": "’", "oq": "‘", "dq": '"'}
_ROFF_CHARACTERS |= {"lq": "“", "rq": "”", "mu": "×", "->": "→", "<=": "≤", ">=": "≥", "ti": "~", "ha": "^", "rs": "\\"}

_METAMATH_PROOF = re.compile(r"\$=.*?\$\.", re.DOTALL)
_METAMATH_SECTION = re.compile(r"\n(?=\$\(\n(?:#\*#\*|=-=-|-\.-\.))")


def html_to_text(page: str) -> str:
    """The text of a page without scripts and navigation: blocks and table rows on lines of their own, `<pre>` as is."""
    parser = _TextOfHtml()
    parser.feed(page)
    parser.close()
    return _tidy("".join(parser.pieces))


class _TextOfHtml(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.pieces: list[str] = []
        self.skipped_depth = 0
        self.pre_depth = 0
        self.cell_depth = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        names = {name for key, value in attrs if key in ("class", "id") for name in (value or "").split()}
        if tag not in _VOID and (self.skipped_depth or tag in _WITHOUT_TEXT or names & _NAVIGATION):
            self.skipped_depth += 1
        self._break_line(tag)
        self.pre_depth += tag == "pre"
        self.cell_depth += tag in _CELLS

    def handle_endtag(self, tag: str) -> None:
        if tag not in _VOID and self.skipped_depth:
            self.skipped_depth -= 1
        self.pre_depth -= tag == "pre"
        self.cell_depth -= tag in _CELLS
        self._break_line(tag)

    def handle_data(self, data: str) -> None:
        if self.skipped_depth:
            return
        if not self.pre_depth:
            data = re.sub(r"\s+", " ", data)
            data = data.lstrip() if not self.pieces or self.pieces[-1].endswith(("\n", " ")) else data
        if data:
            self.pieces.append(data)

    def _break_line(self, tag: str) -> None:
        if tag not in _BLOCKS or not self.pieces or self.skipped_depth:
            return
        if self.cell_depth or tag in _CELLS:
            if not self.pieces[-1].endswith((" ", "\n")):
                self.pieces.append(" ")
        elif tag in _PARAGRAPH_TAGS:
            self.pieces.append("\n\n")
        elif not self.pieces[-1].endswith("\n"):
            self.pieces.append("\n")


def roff_to_text(page: str) -> str:
    """The text of a manual page written with the man macros (not mdoc); empty for one that only points to another."""
    if re.search(r"^\.Dd ", page, re.MULTILINE):
        return ""
    lines: list[str] = []
    block_end = None
    for line in page.splitlines():
        if block_end:
            block_end = None if line.startswith(block_end) else block_end
        elif line.startswith((".", "'")):
            macro, _, rest = line[1:].strip().partition(" ")
            block_end = _BLOCK_ENDS.get(macro)
            lines += _roff_macro(macro, [quoted or bare for quoted, bare in re.findall(r'"([^"]*)"|(\S+)', rest)])
        else:
            lines.append(line)
    return _tidy("\n".join(_ROFF_ESCAPE.sub(_roff_escape, line) for line in lines))


def _roff_macro(macro: str, arguments: list[str]) -> list[str]:
    """The lines a macro adds to the text; most only set how it looks."""
    if macro in _HEADINGS:
        return ["", " ".join(arguments)]
    if macro in _TEXT_MACROS:
        return [" ".join(arguments)]
    if macro in _ALTERNATING_MACROS:
        return ["".join(arguments)]
    if macro == "IP":
        return ["", *arguments[:1]]
    return [""] if macro in _PARAGRAPHS else []


def _roff_escape(match: re.Match[str]) -> str:
    if match["string"]:
        return '"' if match["string"] in ('L"', 'R"') else ""
    if match["character"] or match["name"]:
        return _ROFF_CHARACTERS.get(match["character"] or match["name"], "")
    return {"-": "-", "e": "\\", "\\": "\\", " ": " ", "~": " ", "0": " ", "'": "'", "`": "`", ".": "."}.get(
        match["other"] or "", ""
    )


def metamath_sections(database: str) -> list[str]:
    """Statements and their explanations, by section. Compressed proofs are left out: they are codes, not text."""
    sections = _METAMATH_SECTION.split(_METAMATH_PROOF.sub("$.", database))
    return [section.strip() for section in sections if " $a " in section or " $p " in section]


def _tidy(text: str) -> str:
    return re.sub(r"\n{3,}", "\n\n", re.sub(r"[ \t]+\n", "\n", text)).strip()
