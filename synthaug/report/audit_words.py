"""What the audit measured of a class in words, the same in the card and in the report."""

from __future__ import annotations

from synthaug.records import ClassAudit
from synthaug.report.verdict_words import UNAVAILABLE, share


def coverage_words(audit: ClassAudit | None) -> str:
    """'0.70 of 0.90': coverage of the real images, and what equal distributions would reach at these counts."""
    if audit is None or not audit.n_candidates:
        return "–"
    if audit.coverage is None:
        return UNAVAILABLE
    return f"{share(audit.coverage, 2)} of {share(audit.coverage_expected, 2)}"
