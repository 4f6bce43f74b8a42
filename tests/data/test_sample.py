"""The corpus that `pangu data sample` makes of this machine's files. Debian's packages are made here, not fetched."""

import gzip
import json
import os
from pathlib import Path

import pytest

from pangu.data import sample as sample_module
from pangu.data.corpus import read_documents
from pangu.data.sample import DomainSize, sample
from pangu.errors import DataError


@pytest.fixture
def small_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A standard library of a few files."""
    library = tmp_path / "python"
    documented = f'"""Module. {"Long. " * 50}"""\n\nclass A:\n    """Class."""\n    def f(self):\n        "Do."\n'
    for name, source in {
        "json/decoder.py": documented,
        "copy.py": documented,
        "plain.py": "x = '盘古'\n",
        "broken.py": "def (\n",
        "latin.py": b"# \xe9\n",
        "test/test_json.py": "assert True\n",
        "site-packages/other.py": "other = 1\n",
    }.items():
        path = library / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(source.encode() if isinstance(source, str) else source)
    monkeypatch.setattr(sample_module.sysconfig, "get_path", lambda name: str(library))
    monkeypatch.setattr(sample_module, "_DOCUMENTED_PACKAGES", ())
    return library


def _sources(path: Path) -> dict[str, str]:
    return {document.fields["source"]: document.text for document in read_documents([path])}


def test_sources_are_code_and_documentation_is_english(small_library: Path, tmp_path: Path) -> None:
    sizes = sample(tmp_path / "out", show_progress=False)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["code.jsonl", "english.jsonl"]
    code, english = _sources(tmp_path / "out" / "code.jsonl"), _sources(tmp_path / "out" / "english.jsonl")
    assert sorted(code) == ["broken.py", "copy.py", "plain.py"]  # json/decoder.py has the text of copy.py
    assert code["plain.py"] == "x = '盘古'\n"
    assert english["copy.py"].startswith("Module. Long")
    assert english["copy.py"].endswith("\n\nA\nClass.\n\nA.f\nDo.")
    assert any(source.startswith("pydoc_data/topics.py:") for source in english)
    assert sizes == {
        "code": DomainSize(3, sum(len(text.encode()) for text in code.values())),
        "english": DomainSize(len(english), sum(len(text.encode()) for text in english.values())),
    }


def test_the_same_machine_gives_the_same_files(small_library: Path, tmp_path: Path) -> None:
    for name in ("a", "b"):
        sample(tmp_path / name, max_bytes_per_domain=100_000, show_progress=False)
    for path in (tmp_path / "a").iterdir():
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes()


def test_a_limited_sample_is_a_part_of_the_whole_in_its_order(small_library: Path, tmp_path: Path) -> None:
    sample(tmp_path / "whole", show_progress=False)
    sizes = sample(tmp_path / "part", max_bytes_per_domain=50_000, show_progress=False)
    whole, part = (list(_sources(tmp_path / name / "english.jsonl").items()) for name in ("whole", "part"))
    assert 25_000 < sizes["english"].bytes <= 50_000
    assert part == [item for item in whole if item in part]
    assert part != whole[: len(part)]


def test_a_python_without_sources_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sample_module.sysconfig, "get_path", lambda name: str(tmp_path))
    with pytest.raises(DataError, match="has no sources of its standard library"):
        sample(tmp_path / "out", show_progress=False)


def _debian_tree(root: Path) -> None:
    share = root / "usr/share"
    chinese = "盘古是一个训练框架。" * 10
    files = {
        "doc/debian-handbook/html/en-US/apt.html": "<p>English handbook</p>",
        "doc/debian-handbook/html/zh-CN/apt.html": f"<p>{chinese}</p>",
        "doc/debian-handbook/html/zh-CN/untranslated.html": "<p>English handbook, again</p>",
        "debian-reference/ch01.en.html": "<p>English reference</p>",
        "debian-reference/ch01.zh-cn.html": f"<p>参考{chinese}</p>",
        "games/fortunes/tang300": f"\x1b[32m《感遇》\x1b[m\n{chinese}\n%\n床前明月光\n%\n",
        "games/fortunes/tang300.dat": "\0",
    }
    for name in sample_module._METAMATH_DATABASES:
        files[f"metamath/databases/{name}"] = f"$( {name} $)\n  id $p |- ph $= AB $.\n"
    for name, text in files.items():
        (share / name).parent.mkdir(parents=True, exist_ok=True)
        (share / name).write_text(text, encoding="utf-8")
    (share / "man/zh_CN/man1").mkdir(parents=True)
    (share / "man/zh_CN/man1/ls.1.gz").write_bytes(gzip.compress(f".SH 名称\n{chinese}\n".encode()))


def test_debian_packages_add_chinese_and_mathematics(
    small_library: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """apt-get and dpkg-deb are stood in for by scripts that put the files where the real ones would."""
    _debian_tree(tmp_path / "tree")
    _command(tmp_path, "apt-get", 'touch "debian.deb"')
    _command(tmp_path, "dpkg-deb", f'cp -r {tmp_path}/tree "$3"')
    monkeypatch.setenv("PATH", f"{tmp_path}/bin:{os.environ['PATH']}")
    sizes = sample(tmp_path / "out", apt=True, show_progress=False)
    assert sorted(sizes) == ["chinese", "code", "english", "mathematics"]
    chinese, english = _sources(tmp_path / "out" / "chinese.jsonl"), _sources(tmp_path / "out" / "english.jsonl")
    assert sorted(chinese) == [
        "debian-reference/ch01.zh-cn.html",
        "doc/debian-handbook/html/zh-CN/apt.html",
        "games/fortunes/tang300:0",
        "games/fortunes/tang300:1",
        "man/zh_CN/man1/ls.1.gz",
    ]
    assert chinese["games/fortunes/tang300:1"] == "床前明月光"
    assert "\x1b" not in (tmp_path / "out" / "chinese.jsonl").read_text()
    assert english["doc/debian-handbook/html/en-US/apt.html"] == "English handbook"
    assert _sources(tmp_path / "out" / "mathematics.jsonl")["set.mm:0"] == "$( set.mm $)\n  id $p |- ph $."


def test_a_package_that_cannot_be_fetched_is_named(
    small_library: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _command(tmp_path, "apt-get", 'echo "W: no sandbox" >&2; echo "E: Unable to locate package x" >&2; exit 100')
    _command(tmp_path, "dpkg-deb", "exit 1")
    monkeypatch.setenv("PATH", f"{tmp_path}/bin")
    with pytest.raises(DataError, match="apt-get: E: Unable to locate package x; run apt-get update first"):
        sample(tmp_path / "out", apt=True, show_progress=False)
    (tmp_path / "bin" / "apt-get").unlink()
    with pytest.raises(DataError, match="apt-get is not on this machine"):
        sample(tmp_path / "out", apt=True, show_progress=False)
    assert not (tmp_path / "out").exists()


def _command(folder: Path, name: str, script: str) -> None:
    path = folder / "bin" / name
    path.parent.mkdir(exist_ok=True)
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)


def test_nothing_is_left_of_a_corpus_that_cannot_be_written(
    small_library: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sample_module, "sync", _full_disk)
    with pytest.raises(DataError, match=r"the corpus cannot be written \(No space left on device\)"):
        sample(tmp_path / "out", show_progress=False)
    assert list((tmp_path / "out").iterdir()) == []


def _full_disk(path: Path) -> None:
    raise OSError(28, "No space left on device")


def test_every_line_is_one_document_with_its_source(small_library: Path, tmp_path: Path) -> None:
    sample(tmp_path / "out", show_progress=False)
    for line in (tmp_path / "out" / "code.jsonl").read_text(encoding="utf-8").splitlines():
        assert set(json.loads(line)) == {"text", "source"}
