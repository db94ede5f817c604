"""What synthetic images must not be taken for: the same in the card and in the report."""

from __future__ import annotations


def limit_lines(include_real: bool) -> list[str]:
    """The limits of every release, in sentences."""
    return [
        "The generator learned from the real training images, and no more than they show. What they lack or get "
        "wrong, the synthetic images lack and get wrong too.",
        "This is not differential privacy and not anonymity: whatever the audit dropped, a synthetic image can still "
        "give away something about the images that the generator was trained on.",
        "The audit keeps what a classifier trained on the same real images agrees with. That drops mistakes, and it "
        "drops some of what is unusual and true: the accepted samples are more typical than the class is.",
        "Measure on real images only. "
        + (
            "Validation and test hold nothing else."
            if include_real
            else "None are in this release; use the source's own validation and test."
        ),
        "Synthetic images must not be used as evidence about a person, a finding or how often something occurs.",
    ]
