"""Text out of HTML, manual pages and Metamath databases."""

from pangu.data.markup import html_to_text, metamath_sections, roff_to_text


def test_html_keeps_blocks_tables_and_preformatted_text_apart() -> None:
    page = """<html><head><title>Not text</title><style>p {}</style></head><body>
    <div class="navheader"><table><tr><td>Prev</td></tr></table><br></div>
    <h1>APT &amp; co</h1><p>One <b>paragraph</b>
      over two lines.</p><ul><li>first</li><li>second</li></ul>
    <table><tr><th><p>name</p></th><th>size</th></tr><tr><td>a</td><td>1</td></tr></table>
    <pre>$ ls
      indented</pre>after<br/>a break<script>no()</script>
    <ul class="docnav"><li>Next</li></ul></body></html>"""
    assert html_to_text(page) == (
        "APT & co\n\nOne paragraph over two lines.\n\nfirst\nsecond\n\nname size\na 1\n\n"
        "$ ls\n      indented\n\nafter\na break"
    )


def test_manual_pages_lose_their_macros() -> None:
    page = r""".\" a comment
.de Sp
.if t .sp .5v
..
.TH LS 1 2022年9月 "GNU coreutils" 用户命令
.SH "名 称"
ls \- 列出目录内容 \" the name
.PP
\fBls\fP [\fI\,选项\/\fP]... \(em a\ b \*(L"quoted\*(R" \s-1SMALL\s0 C:\e
.IP "tag" 4
.BR cat (1),
.B bold words
.TS
tab(@);
.TE
.nf
"""
    assert roff_to_text(page) == (
        '名 称\nls - 列出目录内容\n\nls [选项]... — a b "quoted" SMALL C:\\\n\ntag\ncat(1),\nbold words'
    )


def test_pages_that_only_point_elsewhere_or_use_mdoc_have_no_text() -> None:
    assert roff_to_text(".so man1/ls.1\n") == ""
    assert roff_to_text(".Dd May 1\n.Sh NAME\n.Nm ls\n") == ""


def test_metamath_statements_come_by_section_without_proofs() -> None:
    rule = "#*#*" * 20
    database = f"""$( Change log. $)
$(
{rule}
  Logic
{rule}
$)
  $( Modus ponens. $)
  ax-mp $a |- ps $.
  $( Identity. $)
  id $p |- ( ph -> ph ) $= ( wi ax-mp ) AAABCD
    EFG $.

$(
{rule}
  Only words
{rule}
$)
"""
    (section,) = metamath_sections(database)
    assert "Logic" in section
    assert "$( Identity. $)\n  id $p |- ( ph -> ph ) $." in section
    assert "EFG" not in section
