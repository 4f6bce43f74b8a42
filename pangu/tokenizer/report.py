"""What a vocabulary is made of and how it serves each domain: beside the model as JSON, and as a table."""

import dataclasses
import hashlib
import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from rich.table import Table

from pangu.tokenizer.balance import Merged
from pangu.tokenizer.pieces import BYTE_PIECES, SPECIAL_PIECES
from pangu.tokenizer.sampling import Sample
from pangu.tokenizer.vocabulary import Probabilities


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
    """On the held-out documents, as are the next two."""
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
    worst_domain: str
    """The one with the fewest bytes per token under the single-corpus tokenizer."""
    worst_domain_improved: bool | None
    """Whether it has more under the merged one. None for a single domain."""
    domains: dict[str, DomainReport]
    fingerprint: str
    """sha256 of the model file."""

    def json(self) -> str:
        return json.dumps(dataclasses.asdict(self), indent=2, ensure_ascii=False) + "\n"


def make_report(
    learned: Mapping[str, Probabilities],
    samples: Mapping[str, Sample],
    merged: Merged,
    single_corpus: Mapping[str, float],
    own: Mapping[str, float],
    model: bytes,
) -> Report:
    """`single_corpus`, `own`: bytes per token of those tokenizers on each domain's held-out documents."""
    pieces, unshared = _origins(learned, merged)
    size = merged.vocabulary.size
    candidates = sum(map(len, learned.values()))
    worst = min(single_corpus, key=lambda name: single_corpus[name])
    improved = merged.bytes_per_token[worst] > single_corpus[worst]
    return Report(
        vocab_size=size,
        special_pieces=len(SPECIAL_PIECES),
        byte_pieces=len(BYTE_PIECES),
        candidates=candidates,
        duplicates=candidates - len(set().union(*learned.values())),
        unreachable=merged.vocabulary.unreachable,
        worst_domain=worst,
        worst_domain_improved=improved if len(learned) > 1 else None,
        domains={
            name: DomainReport(
                documents=samples[name].documents,
                bytes=samples[name].bytes,
                training_bytes=sum(len(text.encode()) for text in samples[name].training),
                held_out_bytes=sum(len(text.encode()) for text in samples[name].held_out),
                weight=merged.weights[name],
                candidates=len(learned[name]),
                pieces=pieces[name],
                share=pieces[name] / size,
                pieces_of_no_other_domain=unshared[name],
                bytes_per_token=merged.bytes_per_token[name],
                single_corpus_bytes_per_token=single_corpus[name],
                own_bytes_per_token=own[name],
            )
            for name in learned
        },
        fingerprint=hashlib.sha256(model).hexdigest(),
    )


def table(report: Report) -> Table:
    """Pieces by origin, as in Pangu Ultra's table 1, and bytes per token on held-out documents."""
    result = Table(caption=_caption(report), caption_justify="left")
    result.add_column("Domain")
    for heading in ("Pieces", "%", "Only here", "Weight", "Bytes/token", "Single corpus", "Change", "Own"):
        result.add_column(heading, justify="right")
    for name, domain in report.domains.items():
        result.add_row(
            name,
            f"{domain.pieces:,}",
            f"{100 * domain.share:.2f}",
            f"{domain.pieces_of_no_other_domain:,}",
            f"{domain.weight:.3f}",
            f"{domain.bytes_per_token:.3f}",
            f"{domain.single_corpus_bytes_per_token:.3f}",
            f"{domain.bytes_per_token / domain.single_corpus_bytes_per_token - 1:+.1%}",
            f"{domain.own_bytes_per_token:.3f}",
        )
    for name, pieces in (("bytes", report.byte_pieces), ("special", report.special_pieces)):
        result.add_row(name, f"{pieces:,}", f"{100 * pieces / report.vocab_size:.2f}")
    result.add_section()
    result.add_row("total", f"{report.vocab_size:,}", "100.00")
    return result


def _origins(learned: Mapping[str, Probabilities], merged: Merged) -> tuple[Counter[str], Counter[str]]:
    """Number of pieces to which each domain contributes most (the first of equals), and which it alone has."""
    pieces: Counter[str] = Counter()
    unshared: Counter[str] = Counter()
    for piece in merged.vocabulary.scores:
        proposing = [name for name in learned if piece in learned[name]]
        contributions = {name: merged.weights[name] * learned[name][piece] for name in proposing}
        pieces[max(contributions, key=lambda name: contributions[name])] += 1
        if len(contributions) == 1:
            unshared.update(contributions.keys())
    return pieces, unshared


def _caption(report: Report) -> str:
    lines = [
        f"{report.candidates:,} candidates, {report.duplicates:,} duplicates, {report.unreachable:,} unreachable.",
        "Bytes per token on held-out documents; single corpus, own: of tokenizers",
        "trained on the concatenation of all domains, and on the domain alone.",
    ]
    if report.worst_domain_improved is not None:
        single = {n: d.single_corpus_bytes_per_token / d.own_bytes_per_token for n, d in report.domains.items()}
        merged = {n: d.bytes_per_token / d.own_bytes_per_token for n, d in report.domains.items()}
        (least, before), (least_now, now) = (min(s.items(), key=lambda item: item[1]) for s in (single, merged))
        lines += [
            f"Fewest by the single corpus: {report.worst_domain}, "
            f"{'improved' if report.worst_domain_improved else 'not improved'}.",
            f"Furthest below its own: {least} by the single corpus, at {before:.1%}; merged {least_now}, at {now:.1%}.",
        ]
    return "\n".join(lines)
