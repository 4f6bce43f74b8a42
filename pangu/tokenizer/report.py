"""What a vocabulary is made of and how it serves each domain: beside the model as JSON, and as a table."""

import dataclasses
import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from rich.table import Table

from pangu.tokenizer.pieces import BYTE_PIECES, SPECIAL_PIECES
from pangu.tokenizer.sampling import Sample
from pangu.tokenizer.vocabulary import Probabilities, Vocabulary


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
    own_bytes_per_token: float | None
    """Of a tokenizer of the same size trained on this domain alone; None when it has too few pieces for one."""


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
    seed: int
    fingerprint: str
    """sha256 of the model file."""

    def json(self) -> str:
        return json.dumps(dataclasses.asdict(self), indent=2, ensure_ascii=False) + "\n"


def make_report(
    learned: Mapping[str, Probabilities],
    samples: Mapping[str, Sample],
    weights: Mapping[str, float],
    merged: Vocabulary,
    measured: Mapping[str, Mapping[str, float]],
    fingerprint: str,
    seed: int,
) -> Report:
    """`measured`: for each domain bytes per token of "merged", "single_corpus" and, if there is one, "own"."""
    vocab_size = len(SPECIAL_PIECES) + len(BYTE_PIECES) + len(merged.scores)
    pieces, unshared = _origins(learned, weights, merged)
    candidates = sum(map(len, learned.values()))
    worst = min(measured, key=lambda name: measured[name]["single_corpus"])
    improved = measured[worst]["merged"] > measured[worst]["single_corpus"]
    return Report(
        vocab_size=vocab_size,
        special_pieces=len(SPECIAL_PIECES),
        byte_pieces=len(BYTE_PIECES),
        candidates=candidates,
        duplicates=candidates - len(set().union(*learned.values())),
        unreachable=merged.unreachable,
        worst_domain=worst,
        worst_domain_improved=improved if len(learned) > 1 else None,
        domains={
            name: DomainReport(
                documents=samples[name].documents,
                bytes=samples[name].bytes,
                training_bytes=sum(len(text.encode()) for text in samples[name].training),
                held_out_bytes=sum(len(text.encode()) for text in samples[name].held_out),
                weight=weights[name],
                candidates=len(learned[name]),
                pieces=pieces[name],
                share=pieces[name] / vocab_size,
                pieces_of_no_other_domain=unshared[name],
                bytes_per_token=measured[name]["merged"],
                single_corpus_bytes_per_token=measured[name]["single_corpus"],
                own_bytes_per_token=measured[name].get("own"),
            )
            for name in learned
        },
        seed=seed,
        fingerprint=fingerprint,
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
            "-" if domain.own_bytes_per_token is None else f"{domain.own_bytes_per_token:.3f}",
        )
    for name, pieces in (("bytes", report.byte_pieces), ("special", report.special_pieces)):
        result.add_row(name, f"{pieces:,}", f"{100 * pieces / report.vocab_size:.2f}")
    result.add_section()
    result.add_row("total", f"{report.vocab_size:,}", "100.00")
    return result


def _origins(
    learned: Mapping[str, Probabilities], weights: Mapping[str, float], merged: Vocabulary
) -> tuple[Counter[str], Counter[str]]:
    """Number of pieces to which each domain contributes most (the first of equals), and which it alone has."""
    pieces: Counter[str] = Counter()
    unshared: Counter[str] = Counter()
    for piece in merged.scores:
        contributions = {name: weights[name] * learned[name][piece] for name in learned if piece in learned[name]}
        pieces[max(contributions, key=contributions.__getitem__)] += 1
        if len(contributions) == 1:
            unshared.update(contributions.keys())
    return pieces, unshared


def _caption(report: Report) -> str:
    lines = [
        "Bytes per token on held-out documents. Single corpus, own: tokenizers of the same size trained on the",
        "concatenation of the corpora, and on the domain alone.",
        f"{report.candidates:,} candidates, {report.duplicates:,} duplicates, {report.unreachable:,} unreachable.",
    ]
    if report.worst_domain_improved is not None:
        verdict = "is served better" if report.worst_domain_improved else "is NOT served better; give it a larger weight"
        lines.append(f"The domain that the single corpus serves worst, {report.worst_domain}, {verdict}.")
    return "\n".join(lines)
