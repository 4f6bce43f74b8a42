"""A real corpus of several domains out of what a machine has: Python's own files and, on request, Debian packages."""

import ast
import gzip
import hashlib
import importlib.metadata
import importlib.util
import json
import re
import shutil
import subprocess
import sysconfig
import tempfile
import warnings
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from pydoc_data import topics

from rich.console import Console
from rich.progress import track

from pangu.data.markup import html_to_text, metamath_sections, roff_to_text
from pangu.errors import DataError
from pangu.files import sync

_DOCUMENTED_PACKAGES = ("matplotlib", "numpy")
"""Installed with Pangu, and with much to read in their docstrings."""
_NOT_SOURCES = frozenset(("dist-packages", "idle_test", "pydoc_data", "site-packages", "test", "tests"))
_SHORTEST_DOCUMENTATION = 200
_LEAST_CHINESE = 0.2

_DEBIAN_PACKAGES = (
    "debian-handbook",
    "debian-reference-en",
    "debian-reference-zh-cn",
    "fortunes-zh",
    "manpages-zh",
    "metamath-databases",
)
_METAMATH_DATABASES = ("set.mm", "hol.mm", "ql.mm")
"""The package's others repeat set.mm in large part."""


@dataclass(frozen=True)
class DomainSize:
    documents: int
    bytes: int
    """Of text in UTF-8."""


@dataclass(frozen=True)
class _Text:
    source: str
    text: str

    @property
    def digest(self) -> bytes:
        return hashlib.sha256(self.text.encode()).digest()


def sample(
    output: str | Path, apt: bool = False, max_bytes_per_domain: int | None = None, show_progress: bool = True
) -> dict[str, DomainSize]:
    """Write `OUTPUT/DOMAIN.jsonl`, one `{"text", "source"}` per line, and return how much there is of each domain.

    `code`: the sources of Python's standard library. `english`: its documentation, and that of installed packages. With
    `apt` also the text of a few Debian packages, fetched but not installed: handbooks in English and Chinese, Chinese
    manual pages and poems (`chinese`), and Metamath's set theory (`mathematics`). Duplicates are dropped. Above
    `max_bytes_per_domain` an arbitrary but fixed choice of documents stays. The same machine gives the same files.

    Raises `DataError` when Python's sources are not there, a package cannot be fetched, or `output` cannot be written.
    """
    domains: dict[str, dict[bytes, _Text]] = defaultdict(dict)
    with tempfile.TemporaryDirectory() as scratch:
        texts = [_python_texts(show_progress)]
        if apt:
            texts.append(_debian_texts(_unpack_packages(Path(scratch))))
        for source in texts:
            for domain, text in source:
                domains[domain].setdefault(text.digest, text)
    kept = {domain: _limit(list(texts.values()), max_bytes_per_domain) for domain, texts in sorted(domains.items())}
    _write(Path(output), kept)
    return {
        domain: DomainSize(len(texts), sum(len(text.text.encode()) for text in texts)) for domain, texts in kept.items()
    }


def _python_texts(show_progress: bool) -> Iterator[tuple[str, _Text]]:
    library = Path(sysconfig.get_path("stdlib"))
    sources = _sources(library)
    if not sources:
        raise DataError(f"{library}: this Python has no sources of its standard library; use another installation")
    documented = [(library, path) for path in sources]
    for name in _DOCUMENTED_PACKAGES:
        spec = importlib.util.find_spec(name)
        for folder in map(Path, spec.submodule_search_locations or ()) if spec else ():
            documented += [(folder.parent, path) for path in _sources(folder)]

    console = Console(stderr=True)
    for root, path in track(documented, "reading Python's files", console=console, disable=not show_progress):
        name = path.relative_to(root).as_posix()
        try:
            source = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        if root == library:
            yield "code", _Text(name, source)
        documentation = _docstrings(source)
        if len(documentation) >= _SHORTEST_DOCUMENTATION:
            yield "english", _Text(name, documentation)
    for topic, text in sorted(topics.topics.items()):
        yield "english", _Text(f"pydoc_data/topics.py:{topic}", text)
    # Of two installations under one name the first is the one that is imported.
    distributions = {found.name: found for found in reversed([*importlib.metadata.distributions()]) if found.name}
    for name, distribution in sorted(distributions.items()):
        description = str(distribution.metadata.json.get("description", ""))
        if len(description) >= _SHORTEST_DOCUMENTATION:
            yield "english", _Text(f"{name}/METADATA", description)


def _sources(folder: Path) -> list[Path]:
    return [path for path in sorted(folder.rglob("*.py")) if not _NOT_SOURCES & set(path.relative_to(folder).parts)]


def _docstrings(source: str) -> str:
    """Every docstring of a module under the name of what it describes; nothing for what this Python cannot parse."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            module = ast.parse(source)
        except (SyntaxError, ValueError):
            return ""
    # A docstring may spell half of a surrogate pair by an escape; UTF-8 cannot.
    return "\n\n".join(_documented(module, "")).encode(errors="replace").decode()


def _documented(node: ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef, name: str) -> Iterator[str]:
    """Docstrings of a module's classes and functions in order, each below its dotted name."""
    docstring = ast.get_docstring(node)
    if docstring:
        yield f"{name}\n{docstring}" if name else docstring
    for child in node.body:
        if isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield from _documented(child, f"{name}.{child.name}" if name else child.name)


def _unpack_packages(folder: Path) -> Path:
    """Fetch and unpack the Debian packages without installing them; the root of their files."""
    for command in ("apt-get", "dpkg-deb"):
        if not shutil.which(command):
            raise DataError(f"{command} is not on this machine; --apt needs Debian or Ubuntu")
    _run(["apt-get", "download", "--quiet", *_DEBIAN_PACKAGES], folder)
    for package in sorted(folder.glob("*.deb")):
        _run(["dpkg-deb", "--extract", package.name, "root"], folder)
    return folder / "root"


def _run(command: list[str], folder: Path) -> None:
    result = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    if result.returncode:
        problems = [line for line in result.stderr.splitlines() if line.startswith("E:")] or [result.stderr.strip()]
        raise DataError(f"{command[0]}: {' '.join(problems)}; run apt-get update first, and check the network")


def _debian_texts(root: Path) -> Iterator[tuple[str, _Text]]:
    share = root / "usr/share"
    for path in sorted(share.glob("doc/debian-handbook/html/en-US/*.html")) + _reference(share, "en"):
        yield "english", _Text(path.relative_to(share).as_posix(), html_to_text(path.read_text(encoding="utf-8")))
    for text in _chinese_texts(share):
        # Translations are unfinished: some pages are still English.
        if len(re.findall("[\u4e00-\u9fff]", text.text)) > _LEAST_CHINESE * len(text.text):
            yield "chinese", text
    for name in _METAMATH_DATABASES:
        database = (share / "metamath/databases" / name).read_text(encoding="utf-8")
        for number, section in enumerate(metamath_sections(database)):
            yield "mathematics", _Text(f"{name}:{number}", section)


def _reference(share: Path, language: str) -> list[Path]:
    return sorted(share.glob(f"debian-reference/*.{language}.html"))


def _chinese_texts(share: Path) -> Iterator[_Text]:
    for path in sorted(share.glob("doc/debian-handbook/html/zh-CN/*.html")) + _reference(share, "zh-cn"):
        yield _Text(path.relative_to(share).as_posix(), html_to_text(path.read_text(encoding="utf-8")))
    for path in sorted(share.glob("man/zh_CN/man*/*.gz")):
        page = gzip.decompress(path.read_bytes()).decode("utf-8", errors="ignore")
        yield _Text(path.relative_to(share).as_posix(), roff_to_text(page))
    for path in sorted(share.glob("games/fortunes/*")):
        if path.suffix == "":
            colourless = re.sub(r"\x1b\[[\d;]*m", "", path.read_text(encoding="utf-8"))
            for number, fortune in enumerate(re.split(r"^%$", colourless, flags=re.MULTILINE)):
                yield _Text(f"{path.relative_to(share).as_posix()}:{number}", fortune.strip())


def _limit(texts: list[_Text], max_bytes: int | None) -> list[_Text]:
    """As many documents as fit, chosen by their hash so that no source is preferred, in their old order."""
    if max_bytes is None:
        return texts
    chosen = set()
    total = 0
    for text in sorted(texts, key=lambda text: text.digest):
        total += len(text.text.encode())
        if total > max_bytes:
            break
        chosen.add(text)
    return [text for text in texts if text in chosen]


def _write(output: Path, domains: dict[str, list[_Text]]) -> None:
    """All files or none."""
    temporary = {output / f"{domain}.jsonl": output / f"{domain}.jsonl.tmp" for domain in domains}
    try:
        output.mkdir(parents=True, exist_ok=True)
        for texts, path in zip(domains.values(), temporary.values(), strict=True):
            with path.open("w", encoding="utf-8") as file:
                for text in texts:
                    file.write(json.dumps({"text": text.text, "source": text.source}, ensure_ascii=False) + "\n")
            sync(path)
        for final, path in temporary.items():
            path.replace(final)
        sync(output)
    except OSError as error:
        problem = f"{output}: the corpus cannot be written ({error.strerror})"
        raise DataError(f"{problem}; free some space or choose another folder") from error
    finally:
        for path in temporary.values():
            path.unlink(missing_ok=True)
