"""The report of a comparison: tables as CSV, text, Markdown and HTML, and two pictures."""

from __future__ import annotations

import base64
import dataclasses
import html
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

from mclfast._base.files import write_text
from mclfast._base.settings import field_types
from mclfast.compare.design import BASELINE, Design
from mclfast.compare.published import Published, differing_settings, published
from mclfast.compare.runs import Finished, Run
from mclfast.compare.summary import Summary, summarize, summary_rows, tidy_rows
from mclfast.config import TrainConfig
from mclfast.methods import method_class
from mclfast.train import history as metrics
from mclfast.train import plots
from mclfast.train.state import FREE_SETTINGS

TABLE, SUMMARY = "table.csv", "summary.csv"
REPORT, PAGE = "report.md", "report.html"
ACCURACY, CURVES = "accuracy.png", "curves.png"
#: Descriptions of the pictures for readers who cannot see them.
_PICTURES = {ACCURACY: "mean of peers", CURVES: "accuracy against epoch"}
#: Settings named at the head of a report even if they are the defaults.
_SHOWN = (
    "data",
    "cohort",
    "topology",
    "epochs",
    "batch_size",
    "sampler",
    "lr",
    "schedule",
    "weight_decay",
)


@dataclass(frozen=True)
class Table:
    """A table with notes.

    Attributes:
        title: heading of the table.
        header: titles of the columns.
        rows: cells of each row.
        notes: sentences that explain the table, shown below it.
    """

    title: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    notes: Sequence[str] = ()

    @property
    def numeric(self) -> list[bool]:
        """Whether each column holds only numbers, which are aligned right."""
        columns = zip(*self.rows, strict=True)
        return [all(re.match(r"([-+]?\d[^(]*|-)$", cell) for cell in column) for column in columns]


@dataclass(frozen=True)
class Report:
    """Content of a report, in the order in which it is shown.

    Attributes:
        title: heading of the report.
        command: command line that made the comparison.
        about: settings, versions and commits, a line each.
        tables: tables of the report.
    """

    title: str
    command: str
    about: Sequence[str]
    tables: Sequence[Table]


def write_report(
    folder: Path,
    design: Design,
    finished: Sequence[Finished],
    failed: Mapping[Run, str],
    command: str,
) -> Report:
    """Writes the report of a comparison; at least one of its runs must be finished.

    Args:
        folder: folder that the files are written into.
        design: design of the comparison.
        finished: finished runs of the comparison.
        failed: failed runs of the comparison, with the reasons.
        command: command line that made the comparison.

    Returns:
        The content of the report.
    """
    summaries = summarize(design, finished)
    report = Report(
        _title(design),
        command,
        [*_settings(design), *_machines(finished)],
        [
            _accuracies(design, summaries),
            _peers(summaries),
            _costs(summaries, finished),
            *([_failures(failed)] if failed else []),
        ],
    )
    metrics.write_csv(folder / TABLE, tidy_rows(finished))
    metrics.write_csv(folder / SUMMARY, summary_rows(summaries))
    plots.accuracy_bars(
        {
            s.label: plots.Bar(
                s.values["mean_of_peers"], s.values["ensemble"], s.values.get("gain")
            )
            for s in summaries
        },
        folder / ACCURACY,
        report.title,
        _reference(design, summaries),
    )
    plots.accuracy_bands({s.label: s.histories for s in summaries}, folder / CURVES, report.title)
    write_text(folder / REPORT, markdown(report))
    write_text(folder / PAGE, page(report, [folder / ACCURACY, folder / CURVES]))
    return report


def _title(design: Design) -> str:
    data = " and ".join(dict.fromkeys(c.data for c in design.configs.values()))
    cohorts = list(dict.fromkeys(_networks(c.cohort) for c in design.configs.values()))
    several = f"{len(cohorts)} cohorts of networks"
    return f"Training methods on {data}: {' or '.join(cohorts) if len(cohorts) < 4 else several}"


def _networks(cohort: Sequence[str]) -> str:
    """Names of networks as a sum; three or more equal ones in a row are written as a multiple."""
    groups = [(name, len(list(group))) for name, group in groupby(cohort)]
    return " + ".join(
        " + ".join([name] * count) if count < 3 else f"{count} x {name}" for name, count in groups
    )


def _reference(design: Design, summaries: Sequence[Summary]) -> str | None:
    """The baseline that gains are measured against, in words; None if there are no gains."""
    found = dict.fromkeys(design.baseline_of(s.label) for s in summaries if "gain" in s.values)
    if not found:
        return None
    return next(iter(found)) if len(found) == 1 else "the baseline of the same networks"


def _settings(design: Design) -> list[str]:
    """Lines with the settings that most entries share, then with those of single entries."""
    values = {label: c.to_values() for label, c in design.configs.items()}
    usual = TrainConfig().to_values()
    fields = [n for n in field_types(TrainConfig) if n not in FREE_SETTINGS | {"seed", "method"}]
    most = {n: _most_frequent([v[n] for v in values.values()]) for n in fields}
    differing = {n for n in fields if any(v[n] != most[n] for v in values.values())}
    shown = [n for n in fields if n in differing or n in _SHOWN or most[n] != usual[n]]
    text = ", ".join(f"{name} {_shown(most[name])}" for name in shown)
    lines = [text + ("; unless stated otherwise" if differing else "")]
    for label, entry in values.items():
        options = design.configs[label].options
        unusual = dataclasses.asdict(type(options)())
        own = [n for n in fields if entry[n] != most[n]]
        own += [n for n, default in unusual.items() if entry[n] != default]
        method = [f"method {entry['method']}"] if entry["method"] != label else []
        if each := [*method, *(f"{name} {_shown(entry[name])}" for name in own)]:
            lines.append(f"{label}: {', '.join(each)}")
    return [*lines, f"seeds {', '.join(map(str, design.seeds))}; all settings are in plan.yaml"]


def _most_frequent(values: Sequence[Any]) -> Any:
    """The most frequent value; the first of them if several are equally frequent."""
    return max(values, key=values.count)


def _shown(value: Any) -> str:
    return "+".join(map(str, value)) if isinstance(value, list) else str(value)


def _machines(finished: Sequence[Finished]) -> list[str]:
    """A line of versions and commits, with several if earlier runs were made by other code."""
    about = [f.environment for f in finished]
    versions = _distinct(f"mclfast {a['mclfast']['version']}" for a in about)
    commits = _distinct(str(a["mclfast"]["git"] or "unknown") for a in about)
    torches = _distinct(f"torch {a['torch']['version']}" for a in about)
    return [f"{versions} (commit {commits}), {torches}"]


def _distinct(values: Iterable[str]) -> str:
    return ", ".join(dict.fromkeys(values))


def _accuracies(design: Design, summaries: Sequence[Summary]) -> Table:
    known = {s.label: found for s in summaries if (found := published(s.config))}
    gains = any("gain" in s.values for s in summaries)
    header = [
        "method",
        "seeds",
        "mean of peers",
        *(["gain"] if gains else []),
        "ensemble",
        "published protocol",
        *(["published"] if known else []),
    ]
    rows = [
        [
            s.label,
            _count(s, design),
            s.text("mean_of_peers"),
            *([s.text("gain", sign="+")] if gains else []),
            s.text("ensemble"),
            s.text("published_protocol"),
            *([_published(known.get(s.label))] if known else []),
        ]
        for s in summaries
    ]
    notes = [
        "Test accuracy in percent, mean ± standard deviation over seeds. Mean of peers and "
        "ensemble: at the last epoch, with each network's own classifier.",
        "Published protocol: the best of all classifiers, networks and epochs on the test set. It "
        "selects on the test set and is for comparison with published numbers only.",
    ]
    if gains:
        notes.append(
            f"Gain: points over {_reference(design, summaries)}, mean of peers, run by run with "
            f"the same seed.{_other_cohorts(design, summaries)}"
        )
    if unlabelled := [s.label for s in summaries if not method_class(s.config.method).supervised]:
        notes.append(
            f"{', '.join(unlabelled)}: trained without labels. The classifiers are class means of "
            "features of labelled images; `mclfast transfer --published` trains one on an exported "
            "backbone."
        )
    if known:
        notes += _sources(known)
    notes += _other_settings(summaries)
    return Table("Accuracy", header, rows, notes)


def _count(summary: Summary, design: Design) -> str:
    done, all_ = len(summary.seeds), len(design.seeds)
    return str(done) if done == all_ else f"{done} of {all_}"


def _other_cohorts(design: Design, summaries: Sequence[Summary]) -> str:
    others = [
        s.label
        for s in summaries
        if s.config.method != BASELINE and design.baseline_of(s.label) is None
    ]
    return f" None for {', '.join(others)}: other networks." if others else ""


def _published(found: Published | None) -> str:
    if found is None:
        return "-"
    text = " & ".join(f"{accuracy:.2f}" for accuracy in found.peers)
    if found.spread is not None:
        text += f" ± {found.spread:.2f}"
    more = {"ensemble": found.ensemble, "alone": found.baseline}
    inside = ", ".join(f"{name} {value:.2f}" for name, value in more.items() if value is not None)
    return f"{text} ({inside})" if inside else text


def _sources(known: Mapping[str, Published]) -> list[str]:
    notes = [
        "Published: of a peer, or of each; in brackets of the ensemble and of one network trained "
        "alone, where the same source gives them. Only where all settings that decide the outcome "
        "are those of the published runs."
    ]
    sources: dict[str, list[str]] = {}
    for label, found in known.items():
        sources.setdefault(found.source, []).append(label)
    return notes + [f"{', '.join(labels)}: {source}." for source, labels in sources.items()]


def _other_settings(summaries: Sequence[Summary]) -> list[str]:
    """Notes on entries whose settings differ from the published ones of the same networks."""
    differing: dict[str, list[str]] = {}
    for s in summaries:
        other = [
            f"{name} {_shown(here)} (published {_shown(there)})"
            for name, (here, there) in differing_settings(s.config).items()
        ]
        if other:
            differing.setdefault(", ".join(other), []).append(s.label)
    return [
        f"{', '.join(labels)}: the published number is not shown, as its settings differ: {text}."
        for text, labels in differing.items()
    ]


def _peers(summaries: Sequence[Summary]) -> Table:
    most = max(len(s.config.cohort) for s in summaries)
    header = ["method", *(f"peer {i}" for i in range(most))]
    rows = []
    for s in summaries:
        cells = []
        for i in range(most):
            gain = s.text(f"gain_peer{i}", sign="+")
            text = s.text(f"peer{i}")
            cells.append(text if gain == "-" else f"{text} ({gain})")
        rows.append([s.label, *cells])
    labels: dict[str, list[str]] = {}
    for s in summaries:
        labels.setdefault(_networks(s.config.cohort), []).append(s.label)
    each = [f"{cohort} ({', '.join(of)})" for cohort, of in labels.items()]
    notes = [f"Networks: {'; '.join(each if len(each) > 1 else labels)}."]
    if any("gain" in s.values for s in summaries):
        notes.append(
            "In brackets: points over the same peer of the baseline with the same seed, which "
            "starts from the same weights (but for parts that are shared)."
        )
    return Table("Each peer", header, rows, notes)


def _costs(summaries: Sequence[Summary], finished: Sequence[Finished]) -> Table:
    measured = any("peak_memory_mib" in s.values for s in summaries)
    header = [
        "method",
        "training time (s)",
        *(["peak memory (MiB)"] if measured else []),
        "parameters of the peers",
        "parameters in training",
    ]
    rows = []
    for s in summaries:
        cost = next((f.cost for f in finished if f.run.label == s.label and f.cost), None)
        counts = ["-", "-"]
        if cost:
            peers = dict.fromkeys(f"{n:,}" for n in cost["parameters"])
            counts = [" & ".join(peers), f"{cost['parameters_in_training']:,}"]
        memory = [s.text("peak_memory_mib", digits=0)] if measured else []
        rows.append([s.label, s.text("seconds", digits=1), *memory, *counts])
    notes = [
        "Training time: epochs with their evaluation, all parts of resumed runs together. "
        "Parameters of a peer: the network as deployed; in training: all networks, shared parts "
        "once, with heads and modules of the method."
    ]
    devices = _distinct(
        f"{f.cost['device']} ({_threads(f.cost['threads'])})" for f in finished if f.cost
    )
    if devices:
        same = "" if "), " not in devices else "; times and memory of different ones do not compare"
        notes.append(f"Made on: {devices}{same}.")
    if measured:
        notes.append(
            "Peak memory: on a GPU, allocated by torch; on a CPU, resident memory of the run's "
            "process, libraries included."
        )
    else:
        notes.append("Peak memory is measured only where each run has a process of its own.")
    return Table("Cost", header, rows, notes)


def _threads(count: int) -> str:
    return f"{count} thread{'s' if count > 1 else ''}"


def _failures(failed: Mapping[Run, str]) -> Table:
    rows = [[run.label, str(run.seed), reason] for run, reason in failed.items()]
    notes = [
        "Where it failed: failure.txt in the folder of the run. A setting of one method alone: "
        "--set METHOD.SETTING=X, or the plan file."
    ]
    return Table("Failed runs", ["method", "seed", "reason"], rows, notes)


def text(table: Table) -> str:
    """A table for a terminal, with aligned columns."""
    lines = [table.header, *table.rows]
    widths = [max(len(line[i]) for line in lines) for i in range(len(table.header))]
    return "\n".join(
        "  ".join(
            cell.rjust(width) if right else cell.ljust(width)
            for cell, width, right in zip(line, widths, table.numeric, strict=True)
        ).rstrip()
        for line in lines
    )


def markdown(report: Report) -> str:
    """The report as Markdown, with links to the pictures beside it."""
    about = [_code(report.command), *map(_plain, report.about)]
    parts = [f"# {report.title}", "\n".join(f"- {line}" for line in about)]
    for number, table in enumerate(report.tables):
        rule = ["---:" if right else "---" for right in table.numeric]
        rows = [[_cell(cell) for cell in row] for row in (table.header, *table.rows)]
        parts.append(f"## {table.title}")
        parts.append("\n".join(f"| {' | '.join(row)} |" for row in (rows[0], rule, *rows[1:])))
        parts += map(_plain, table.notes)
        if number == 0:
            parts += [f"![{shown}]({name})" for name, shown in _PICTURES.items()]
    return "\n\n".join(parts) + "\n"


def _cell(value: str) -> str:
    return _plain(value).replace("|", "\\|")


def _code(value: str) -> str:
    """A command in one line as Markdown code, within backticks that it does not contain."""
    longest = max(map(len, re.findall("`+", value)), default=0)
    fence, space = "`" * (longest + 1), " " if longest else ""
    return f"{fence}{space}{' '.join(value.split())}{space}{fence}"


def _plain(value: str) -> str:
    """Text in which Markdown finds no HTML tag."""
    return re.sub(r"<(?=[A-Za-z/!?])", "&lt;", value)


_STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem;
  color: #1b1b1b; }
table { border-collapse: collapse; margin: 0.6rem 0; font-variant-numeric: tabular-nums; }
th, td { padding: 0.25rem 0.9rem 0.25rem 0; text-align: left; border-bottom: 1px solid #ddd; }
.n { text-align: right; white-space: nowrap; }
th { border-bottom: 2px solid #888; }
p.note { color: #555; font-size: 0.9em; margin: 0.3rem 0; }
code { overflow-wrap: anywhere; }
img { max-width: 100%; }
"""


def page(report: Report, pictures: Sequence[Path]) -> str:
    """The report as one HTML file, with the pictures inside.

    Args:
        report: content of the report.
        pictures: PNG files named as in ``_PICTURES``.
    """
    e = html.escape
    body = [f"<h1>{e(report.title)}</h1>", f"<ul>\n<li><code>{e(report.command)}</code></li>"]
    body += [f"<li>{e(line)}</li>" for line in report.about]
    body.append("</ul>")
    for number, table in enumerate(report.tables):
        body.append(f"<h2>{e(table.title)}</h2>\n<table>")
        classes = [' class="n"' if right else "" for right in table.numeric]
        for kind, row in (("th", table.header), *(("td", row) for row in table.rows)):
            cells = zip(classes, row, strict=True)
            body.append(
                "<tr>" + "".join(f"<{kind}{c}>{e(cell)}</{kind}>" for c, cell in cells) + "</tr>"
            )
        body.append("</table>")
        body += [f'<p class="note">{e(note)}</p>' for note in table.notes]
        if number == 0:
            for picture in pictures:
                content = base64.b64encode(picture.read_bytes()).decode()
                shown = _PICTURES[picture.name]
                body.append(f'<p><img alt="{shown}" src="data:image/png;base64,{content}"></p>')
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{e(report.title)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n"
        + "\n".join(body)
        + "\n</body>\n</html>\n"
    )
