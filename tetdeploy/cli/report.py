"""`tetdeploy report`."""

from __future__ import annotations

from pathlib import Path

import click

from tetdeploy.cli.options import check_distinct, checked_output, runs_option
from tetdeploy.cli.terminal import console, print_notes
from tetdeploy.storage.files import atomic_write, check_writable
from tetdeploy.storage.run_folder import newest_run
from tetdeploy.system.extras import import_extra


@click.command(
    epilog="""\b
Examples:
  tetdeploy report                                        the newest run
  tetdeploy report runs/sdt runs/tet runs/ann             side by side, in report.html
  tetdeploy report a.sweep.json b.sweep.json --name SDT --name TET -o sdt-tet.html
  tetdeploy report runs/tet --markdown report.md
"""
)
@click.argument("paths", nargs=-1, metavar="[RUN_OR_JSON]...", type=click.Path(path_type=Path))
@click.option(
    "--name", "names", multiple=True, help="What to call the first result, the second, ... [default: its folder]"
)
@click.option("--title", help="Of the report. [default: the names]")
@click.option(
    "--out",
    "-o",
    type=click.Path(path_type=Path, dir_okay=False),
    help="The page. [default: RUN/report.html; of several, or of a JSON, report.html]",
)
@click.option(
    "--markdown",
    type=click.Path(path_type=Path, dir_okay=False),
    callback=checked_output,
    help="Also write tables and text, without the plots, to this file as Markdown.",
)
@runs_option
def report(
    paths: tuple[Path, ...],
    names: tuple[str, ...],
    title: str | None,
    out: Path | None,
    markdown: Path | None,
    runs: Path,
) -> None:
    """One HTML page on trained and measured models, alone or side by side.

    RUN_OR_JSON is a run folder, with whatever sweeps, validations and early exits lie in it, a folder of several seeds,
    compared by their means, or a result file of sweep, validate, bench or early-exit; the newest run by default. The
    page shows what was found: settings, training curves, accuracy against T and energy, the Pareto front, layers,
    latency, early exit, agreement, classes, hashes. It works offline.
    """
    for package in ("matplotlib", "jinja2"):
        import_extra(package, "report")
    from tetdeploy.report.page import document_of
    from tetdeploy.report.sources import read_results
    from tetdeploy.report.writers import to_html, to_markdown

    paths = paths or (newest_run(runs),)
    out = out or (paths[0] / "report.html" if len(paths) == 1 and paths[0].is_dir() else Path("report.html"))
    check_writable(out, begins=b"<", remedy="choose another with --out")
    check_distinct({"--out": out, "--markdown": markdown})
    if out.suffix.lower() not in ("", ".html", ".htm"):
        raise ValueError(f"a report is a page, and {out} has no name of one; choose another with --out, in .html")
    results = read_results(paths, names)
    document = document_of(results, title)
    texts = {out: to_html(document)} | ({markdown: to_markdown(document)} if markdown else {})
    for path, text in texts.items():
        with atomic_write(path) as temporary:
            temporary.write_text(text, encoding="utf-8", errors="replace")  # names of files may be no UTF-8
    print_notes(results.notes)
    console.print(f"{len(document.sections)} sections: {', '.join(s.title for s in document.sections)}")
    console.print("   ".join(map(str, texts)))
    console.print(f"next: open {out} in a browser")
