"""Results to a document: a title and the sections that have something to show."""

from __future__ import annotations

from tetdeploy.report.document import Document
from tetdeploy.report.results import Results
from tetdeploy.report.sections import SECTIONS
from tetdeploy.wording import shorten

_FEW = 4  # as many names stand in the title


def document_of(results: Results, title: str | None = None) -> Document:
    """The report on some results.

    Args:
        title: by default the names of the sources.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    names = [source.name for source in results.sources]
    sections = [section for make in SECTIONS if (section := make(results)) is not None]
    return Document(title or shorten(names, _FEW), _subtitle(results), tuple(sections))


def _subtitle(results: Results) -> str:
    networks = {str(source.run.network.get("model")) for source in results.trained if source.run}
    images = {m.images for m in results.measurements}
    data = images or {str(source.run.data.get("name")) for source in results.trained if source.run}
    network = f"{', '.join(sorted(networks))} on " if networks else "measured on "
    return f"Spiking networks: {network}{', '.join(sorted(data))}"
