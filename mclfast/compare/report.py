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
from mclfast.compare.design import BASELINE, Plan
from mclfast.compare.published import Published, differing_settings, published
from mclfast.compare.runner import Finished, Run
from mclfast.compare.summary import Summary, summarize, summary_rows, tidy_rows
from mclfast.config import TrainConfig
from mclfast.methods import method_class
from mclfast.train import history as metrics
from mclfast.train import plots
from mclfast.train.state import FREE_SETTINGS

TABLE, SUMMARY = "table.csv", "summary.csv"
REPORT, PAGE = "report.md", "report.html"
ACCURACY, CURVES = "accuracy.png", "curves.png"
#: What a reader who cannot see the pictures is told.
_PICTURES = {ACCURACY: "mean of peers", CURVES: "accuracy against epoch"}
#: Settings named at the head of a report even where they are the defaults.
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
    """A table, and what a reader must know about it."""

    title: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    notes: Sequence[str] = ()

    @property
    def numeric(self) -> list[bool]:
        """Whether each column holds numbers alone, which are set flush right."""
        columns = zip(*self.rows, strict=True)
        return [all(re.match(r"([-+]?\d[^(]*|-)$", cell) for cell in column) for column in columns]


@dataclass(frozen=True)
class Report:
    """Everything that is shown, in the order it is shown."""

    title: str
    command: str
    about: Sequence[str]
    tables: Sequence[Table]


def write_report(
    folder: Path, plan: Plan, finished: Sequence[Finished], failed: Mapping[Run, str], command: str
) -> Report:
    """Writes all files of a comparison of which at least one run is finished.

    Args:
        folder: where they go.
        plan: what was to be done.
        finished: its finished runs.
        failed: its failed runs, with the reasons.
        command: the command line.

    Returns:
        What the report says, for the terminal.
    """
    summaries = summarize(plan, finished)
    report = Report(
        _title(plan),
        command,
        [*_settings(plan), *_machines(finished)],
        [
            _accuracies(plan, summaries),
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
        _reference(plan, summaries),
    )
    plots.accuracy_bands({s.label: s.histories for s in summaries}, folder / CURVES, report.title)
    write_text(folder / REPORT, markdown(report))
    write_text(folder / PAGE, page(report, [folder / ACCURACY, folder / CURVES]))
    return report


def _title(plan: Plan) -> str:
    data = " and ".join(dict.fromkeys(c.data for c in plan.configs.values()))
    cohorts = list(dict.fromkeys(_networks(c.cohort) for c in plan.configs.values()))
    several = f"{len(cohorts)} cohorts of networks"
    return f"Training methods on {data}: {' or '.join(cohorts) if len(cohorts) < 4 else several}"


def _networks(cohort: Sequence[str]) -> str:
    """Networks as a sum, equal ones that follow one another counted where they are many."""
    groups = [(name, len(list(group))) for name, group in groupby(cohort)]
    return " + ".join(
        " + ".join([name] * count) if count < 3 else f"{count} x {name}" for name, count in groups
    )


def _reference(plan: Plan, summaries: Sequence[Summary]) -> str | None:
    """What the gains are over, in words; None where there are none."""
    found = dict.fromkeys(plan.baseline_of(s.label) for s in summaries if "gain" in s.values)
    if not found:
        return None
    return next(iter(found)) if len(found) == 1 else "the baseline of the same networks"


def _settings(plan: Plan) -> list[str]:
    """What most entries have, then what each has of its own, a line each."""
    values = {label: c.to_values() for label, c in plan.configs.items()}
    usual = TrainConfig().to_values()
    fields = [n for n in field_types(TrainConfig) if n not in FREE_SETTINGS | {"seed", "method"}]
    most = {n: _most_frequent([v[n] for v in values.values()]) for n in fields}
    differing = {n for n in fields if any(v[n] != most[n] for v in values.values())}
    shown = [n for n in fields if n in differing or n in _SHOWN or most[n] != usual[n]]
    text = ", ".join(f"{name} {_shown(most[name])}" for name in shown)
    lines = [text + ("; where nothing else is said" if differing else "")]
    for label, entry in values.items():
        options = plan.configs[label].options
        unusual = dataclasses.asdict(type(options)())
        own = [n for n in fields if entry[n] != most[n]]
        own += [n for n, default in unusual.items() if entry[n] != default]
        method = [f"method {entry['method']}"] if entry["method"] != label else []
        if each := [*method, *(f"{name} {_shown(entry[name])}" for name in own)]:
            lines.append(f"{label}: {', '.join(each)}")
    return [*lines, f"seeds {', '.join(map(str, plan.seeds))}; all settings are in plan.yaml"]


def _most_frequent(values: Sequence[Any]) -> Any:
    """The first of them, where several are as frequent."""
    return max(values, key=values.count)


def _shown(value: Any) -> str:
    return "+".join(map(str, value)) if isinstance(value, list) else str(value)


def _machines(finished: Sequence[Finished]) -> list[str]:
    """Versions and commits; several where earlier runs were made by other code."""
    about = [f.environment for f in finished]
    versions = _distinct(f"mclfast {a['mclfast']['version']}" for a in about)
    commits = _distinct(str(a["mclfast"]["git"] or "unknown") for a in about)
    torches = _distinct(f"torch {a['torch']['version']}" for a in about)
    return [f"{versions} (commit {commits}), {torches}"]


def _distinct(values: Iterable[str]) -> str:
    return ", ".join(dict.fromkeys(values))


def _accuracies(plan: Plan, summaries: Sequence[Summary]) -> Table:
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
            _count(s, plan),
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
            f"Gain: points over {_reference(plan, summaries)}, mean of peers, run by run with the "
            "same seed." + _other_cohorts(plan, summaries)
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


def _count(summary: Summary, plan: Plan) -> str:
    done, all_ = len(summary.seeds), len(plan.seeds)
    return str(done) if done == all_ else f"{done} of {all_}"


def _other_cohorts(plan: Plan, summaries: Sequence[Summary]) -> str:
    others = [
        s.label
        for s in summaries
        if s.config.method != BASELINE and plan.baseline_of(s.label) is None
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
    """Why there is no published number beside runs of networks that have one."""
    differing: dict[str, list[str]] = {}
    for s in summaries:
        other = [
            f"{name} {_shown(here)} (published {_shown(there)})"
            for name, (here, there) in differing_settings(s.config).items()
        ]
        if other:
            differing.setdefault(", ".join(other), []).append(s.label)
    return [
        f"{', '.join(labels)}: the published number is not shown, its settings are others: {text}."
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
    """For a terminal: columns of equal width."""
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
    """A command in one line, with a fence that it does not hold."""
    longest = max(map(len, re.findall("`+", value)), default=0)
    fence, space = "`" * (longest + 1), " " if longest else ""
    return f"{fence}{space}{' '.join(value.split())}{space}{fence}"


def _plain(value: str) -> str:
    """Text that Markdown takes for no tag of HTML."""
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
    """The report as one HTML file that needs no other."""
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
