"""What a vocabulary is made of and how it serves each domain: beside the model as JSON, and as a table."""

import dataclasses
import hashlib
import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from rich import box
from rich.console import Console
from rich.table import Table

from pangu.tokenizer.balance import Domain, Merged, poorest
from pangu.tokenizer.pieces import BYTE_PIECES, SPECIAL_PIECES
from pangu.tokenizer.sampling import Sample


@dataclass(frozen=True)
class DomainReport:
    documents: int
    """Of the corpus; a very long one counts as several."""
    bytes: int
    """Of the corpus."""
    training_bytes: int
    """Drawn from the corpus for the frequency analysis."""
    held_out_bytes: int
    """Drawn from the corpus for measuring, and not learned from."""
    weight: float
    """Share in the mixture of domains."""
    candidates: int
    """Pieces of the domain's own vocabulary."""
    pieces: int
    """Pieces of the merged vocabulary that owe this domain more of their probability than any other."""
    share: float
    """`pieces` over the size of the merged vocabulary."""
    pieces_of_no_other_domain: int
    """Pieces of the merged vocabulary that are in this domain's own and in no other's."""
    bytes_per_token: float
    """On the held-out documents, as are the next two. They have a say in the weights, when these are not given."""
    single_corpus_bytes_per_token: float
    """Of a tokenizer of the same size trained on the concatenation of the corpora."""
    own_bytes_per_token: float
    """Of a tokenizer of the same size (if there are as many pieces) trained on this domain alone."""


@dataclass(frozen=True)
class Report:
    vocab_size: int
    special_pieces: int
    byte_pieces: int
    candidates: int
    """Pieces of all domains' vocabularies."""
    duplicates: int
    """How many of them repeat another's."""
    unreachable: int
    """Candidates likely enough, but left out because no text would be encoded with them."""
    poorest_domain: str
    """The one with the fewest bytes per token under the single-corpus tokenizer, of those that could have more."""
    poorest_improved: bool
    """Whether it has more under the merged one."""
    neglected_domain: str
    """The one whose bytes per token are furthest below its own tokenizer's under the single-corpus tokenizer."""
    neglected_improved: bool
    """Whether no domain is that far below its own under the merged one."""
    domains: dict[str, DomainReport]
    fingerprint: str
    """sha256 of the model file."""

    def json(self) -> str:
        return json.dumps(dataclasses.asdict(self), indent=2, ensure_ascii=False) + "\n"


def make_report(
    domains: Mapping[str, Domain],
    samples: Mapping[str, Sample],
    merged: Merged,
    single_corpus: Mapping[str, float],
    own: Mapping[str, float],
    model: bytes,
) -> Report:
    """`single_corpus`, `own`: bytes per token of those tokenizers on each domain's held-out documents."""
    pieces, unshared = _origins(domains, merged)
    size = merged.vocabulary.size
    candidates = sum(len(domain.probabilities) for domain in domains.values())
    poor = poorest(single_corpus, own)
    neglected = min(single_corpus, key=lambda name: single_corpus[name] / own[name])
    least_share = min(merged.bytes_per_token[name] / own[name] for name in own)
    return Report(
        vocab_size=size,
        special_pieces=len(SPECIAL_PIECES),
        byte_pieces=len(BYTE_PIECES),
        candidates=candidates,
        duplicates=candidates - len(set().union(*(domain.probabilities for domain in domains.values()))),
        unreachable=merged.vocabulary.unreachable,
        poorest_domain=poor,
        poorest_improved=merged.bytes_per_token[poor] > single_corpus[poor],
        neglected_domain=neglected,
        neglected_improved=least_share > single_corpus[neglected] / own[neglected],
        domains={
            name: DomainReport(
                documents=samples[name].documents,
                bytes=samples[name].bytes,
                training_bytes=sum(len(text.encode()) for text in samples[name].training),
                held_out_bytes=sum(len(text.encode()) for text in samples[name].held_out),
                weight=merged.weights[name],
                candidates=len(domains[name].probabilities),
                pieces=pieces[name],
                share=pieces[name] / size,
                pieces_of_no_other_domain=unshared[name],
                bytes_per_token=merged.bytes_per_token[name],
                single_corpus_bytes_per_token=single_corpus[name],
                own_bytes_per_token=own[name],
            )
            for name in domains
        },
        fingerprint=hashlib.sha256(model).hexdigest(),
    )


def print_report(report: Report) -> None:
    """Pieces by origin, as in Pangu Ultra's table 1, and bytes per token on held-out documents."""
    console = Console()
    console.print(_table(report))
    console.print(_summary(report), highlight=False)


def _table(report: Report) -> Table:
    table = Table("Domain", box=box.SIMPLE_HEAD)
    for heading in ("Pieces", "%", "Weight", "Merged", "Single", "Change", "Own"):
        table.add_column(heading, justify="right")
    for name, domain in report.domains.items():
        table.add_row(
            name,
            f"{domain.pieces:,}",
            f"{100 * domain.share:.2f}",
            f"{domain.weight:.3f}",
            f"{domain.bytes_per_token:.3f}",
            f"{domain.single_corpus_bytes_per_token:.3f}",
            f"{domain.bytes_per_token / domain.single_corpus_bytes_per_token - 1:+.1%}",
            f"{domain.own_bytes_per_token:.3f}",
        )
    for name, pieces in (("bytes", report.byte_pieces), ("special", report.special_pieces)):
        table.add_row(name, f"{pieces:,}", f"{100 * pieces / report.vocab_size:.2f}")
    table.add_section()
    table.add_row("total", f"{report.vocab_size:,}", "100.00")
    return table


def _summary(report: Report) -> str:
    lines = [
        "Merged, single, own: bytes per token on held-out documents by this tokenizer,",
        "by one of the concatenation of all domains, and by one of the domain alone.",
        f"{report.candidates:,} candidates, {report.duplicates:,} duplicates, {report.unreachable:,} unreachable.",
    ]
    if len(report.domains) > 1:
        single = {n: d.single_corpus_bytes_per_token / d.own_bytes_per_token for n, d in report.domains.items()}
        merged = {n: d.bytes_per_token / d.own_bytes_per_token for n, d in report.domains.items()}
        now = min(merged, key=lambda name: merged[name])
        poor, neglected = report.domains[report.poorest_domain], report.neglected_domain
        lines += [
            f"Poorest by the single: {report.poorest_domain}, {poor.single_corpus_bytes_per_token:.3f}; "
            f"merged: {poor.bytes_per_token:.3f}.",
            f"Furthest below its own by the single: {neglected}, at {single[neglected]:.1%}; "
            f"merged: {now}, {merged[now]:.1%}.",
        ]
    return "\n".join(lines)


def _origins(domains: Mapping[str, Domain], merged: Merged) -> tuple[Counter[str], Counter[str]]:
    """Number of pieces to which each domain contributes most (the first of equals), and which it alone has."""
    pieces: Counter[str] = Counter()
    unshared: Counter[str] = Counter()
    for piece in merged.vocabulary.scores:
        shares = {
            name: merged.weights[name] * domain.probabilities[piece]
            for name, domain in domains.items()
            if piece in domain.probabilities
        }
        pieces[max(shares, key=lambda name: shares[name])] += 1
        if len(shares) == 1:
            unshared.update(shares.keys())
    return pieces, unshared
