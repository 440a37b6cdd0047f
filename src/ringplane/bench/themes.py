"""The colours of plots, for light pages and for dark ones."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ringplane.bench.results import FIO, QSD, Subject


@dataclass(frozen=True, slots=True)
class Theme:
    """Colours of the page, its text, less important text, ringplane's variants, and the other back ends."""

    page: str
    text: str
    quiet: str
    ours: Sequence[str]
    others: Sequence[str]

    def colours(self, subjects: Sequence[Subject]) -> dict[str, str]:
        """A colour for each back end, by name: strong for ringplane, grey for the others."""
        others = [subject for subject in subjects if subject.family in (QSD, FIO)]
        ours = [subject for subject in subjects if subject not in others]
        return {
            subject.name: palette[number % len(palette)]
            for group, palette in ((ours, self.ours), (others, self.others))
            for number, subject in enumerate(group)
        }


# GitHub's colours.
LIGHT = Theme(
    "#ffffff", "#1f2328", "#656d76", ("#0969da", "#1a7f37", "#8250df", "#bf3989"), ("#6e7781", "#9ba4ae", "#c6ccd3")
)
DARK = Theme(
    "#0d1117", "#e6edf3", "#8d96a0", ("#4493f8", "#3fb950", "#ab7df8", "#db61a2"), ("#8d96a0", "#646c76", "#434a53")
)
