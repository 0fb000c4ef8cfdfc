"""Generates the reference pages from the code: `.venv/bin/python -m docs.generate`."""

from __future__ import annotations

import argparse
import functools
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import markdown
import yaml
from prometheus_client import CollectorRegistry

from deploy import capacity, cli
from deploy.command_line import OWN_HELP, PROCESSES, parser
from state import metrics
from state.events.decoding import Reason

OFFERED = {
    metrics.KernelMetrics: "Each process that uses compiled kernels: stream, trainer, applier, worker, validation, segments.",
    metrics.StreamMetrics: "The stream, on `stream.metrics_port`.",
    metrics.TrainerMetrics: "The trainer, on `trainer.metrics_port`.",
    metrics.ApplierMetrics: "The applier of a serving host, on `serving.metrics_port`.",
    metrics.WorkerMetrics: "A worker of a serving host, on `serving.port`; each of several workers exports the sums of all.",
    metrics.ValidationMetrics: "The validation process, on `up.metrics_port` + 2.",
    metrics.SegmentMetrics: "`springtide segments run`, on `up.metrics_port` + 4.",
    metrics.SupervisorMetrics: "`springtide up`, on `up.metrics_port`.",
    metrics.ConsoleMetrics: "The console, on `console.port`.",
    metrics.ProbeMetrics: "`springtide probe --continuously`, on `up.metrics_port` + 1.",
    metrics.TrialMetrics: "`springtide up`, on `up.metrics_port`, or the process that runs experiments without it, on `up.metrics_port` + 5, while an experiment runs.",
    metrics.RolloutMetrics: "`springtide up`, on `up.metrics_port`, during a rollout.",
    metrics.RetrainMetrics: "`springtide up`, on `up.metrics_port`, if `retrain.every` is set.",
    metrics.StorageMetrics: "Each process that stores data on disk.",
    metrics.SharedMetrics: "The trainer, its workers on other machines and the applier, if `paths.shared_registry` is set.",
    metrics.BuildMetrics: "Each process.",
}
"""By metrics class, which process exports them, and on which port."""


def metrics_page() -> str:
    """Returns the page about all metrics."""
    lines = [
        "# Metrics",
        "",
        "Generated from `state/metrics.py`. The series of a counter ends in "
        "`_total`; a histogram has `_bucket`, `_sum` and `_count`. No label contains an id, and label values are bounded.",
    ]
    for process in (*metrics.PROCESSES, *metrics.OF_EACH_PROCESS):
        description = OFFERED[process]
        lines += ["", f"## {process.__name__.removesuffix('Metrics')}", "", description, "", *_metric_rows(process)]
    lines += ["", "## Any process", "", "Each process, under the standard names of Prometheus clients.", ""]
    lines += ["| name | description |", "|---|---|"]
    lines += [f"| `{name}` | {description} |" for name, description in metrics.OF_ANY_PROCESS.items()]
    return "\n".join(lines) + "\n"


def _metric_rows(process: type[metrics.Metrics]) -> Sequence[str]:
    registry = CollectorRegistry()
    instance = process(registry)
    labels = {metric._name: metric._labelnames for metric in vars(instance).values() if hasattr(metric, "_labelnames")}
    lines = ["| name | kind | labels | description |", "|---|---|---|---|"]
    for family in registry.collect():
        named = ", ".join(f"`{label}`" for label in labels[family.name])
        description = family.documentation.replace("|", "\\|")
        lines.append(f"| `{family.name}` | {family.type} | {named} | {description} |")
    return lines


ROOT = Path(__file__).parents[1]
SEVERITIES = {
    "critical": "Pages somebody: answers, accounts or durability are at risk.",
    "warning": "Can wait until the morning.",
    "info": "For the record.",
}

REFUSED = {
    Reason.UNDECODABLE: "The decoder cannot read it: with the default decoder, it is not JSON.",
    Reason.MISSING_FIELD: "A field that `[events]` names is absent or null.",
    Reason.WRONG_TYPE: "A field has another type than expected, or the record is not a JSON object.",
    Reason.EMPTY_ID: "A user, item or category id is an empty string.",
    Reason.NOT_FINITE: "A number is NaN, infinite or too large for a double.",
    Reason.IMPLAUSIBLE_TIME: "The event time differs from the Kafka timestamp by more than `events.max_future_s` or "
    "`events.max_age_s`, or is before 1970.",
    Reason.TOO_LARGE: "It is larger than 1,000,000 bytes.",
    Reason.UNKNOWN_ACTION: "Its action is not in `events.actions`.",
    Reason.CORRUPT_RECORD: "Kafka's record batch fails its checksum or cannot be read. Each of its offsets is one dead letter.",
}

DEAD_LETTER_TOPIC = """\
A dead letter is a record of `kafka.dead_letters_topic`, which has one partition:

| part | content |
|---|---|
| key | position of the refused record: `TOPIC_ID:PARTITION:OFFSET`. Its topic is that of the clicks or of attributes |
| value | empty, not null. The refused record stays in its topic |
| headers | `reason`, `topic_id`, `partition`, `offset`, as text |

The refused record's own key and value are not copied, because they contain a user's id.

**Delivery.** Each dead letter is written at least once, and always with the same key:

| writer | a dead letter occurs more than once |
|---|---|
| local runner, clicks | if a crash or an outage of Kafka hides whether its transaction ended. A clean stop repeats nothing |
| Flink or another distributed runner, clicks | if the job resumes from a checkpoint: what was written since then is written again |
| attributes, each runner | if the process dies between the dead letter and its progress |

A reader that takes each key once has each dead letter once. Read with `isolation.level=read_committed`. Release 0.1.0 wrote no keys: build the key from the headers `topic_id`, `partition` and `offset`. No part of Springtide reads the topic; `springtide status` counts refused records by their positions, each once.

**Compaction.** The topic is created with `retention.ms` of `kafka.retention_h`, and without compaction. Every key is new, except after a restart, so compaction saves little space and `compact` alone would keep dead letters forever. If your readers cannot remember keys, add compaction to the retention:

```
kafka-configs.sh --bootstrap-server HOST:PORT --alter --entity-type topics --entity-name springtide.clicks.v1.dlq \\
  --add-config 'cleanup.policy=[compact,delete]'
```

Compaction removes repeated dead letters later, not at once, and never in the open segment. It also removes records without a key, those of 0.1.0.
""".splitlines()


def alerts() -> str:
    """Returns the page of all alerts, the worst severity first."""
    rules: dict[str, list[dict[str, Any]]] = {severity: [] for severity in SEVERITIES}
    for file in sorted((ROOT / "deploy/prometheus/rules").glob("*.yml")):
        for group in yaml.safe_load(file.read_text())["groups"]:
            for rule in group["rules"]:
                if "alert" in rule:
                    rules[rule["labels"]["severity"]].append(rule)
    lines = [
        "# Alerts",
        "",
        "Generated from `deploy/prometheus/rules`. N is the measured value. "
        "[Monitoring](monitoring.md) shows how to run Prometheus with these rules.",
    ]
    for severity, meaning in SEVERITIES.items():
        lines += ["", f"## {severity.capitalize()}", "", meaning, "", "| alert | after | summary | runbook |"]
        lines += ["|---|---|---|---|", *map(_alert, sorted(rules[severity], key=lambda rule: rule["alert"]))]
    return "\n".join(lines) + "\n"


def _alert(rule: Mapping[str, Any]) -> str:
    notes = rule["annotations"]
    section = notes["runbook"].partition("#")[2]
    title = section.replace("-", " ")
    # Prometheus's templates: a label by its name in code, the value as N.
    summary = re.sub(r"\{\{ \$labels\.(\w+) \}\}", r"`\1`", notes["summary"].strip())
    summary = re.sub(r"\{\{[^}]*\$value[^}]*\}\}", "N", summary)
    return f"| `{rule['alert']}` | {rule['for']} | {summary} | [{title}](runbook.md#{section}) |"


def commands() -> str:
    """Returns the page of all commands with their options."""
    (verbs,) = (action for action in parser()._actions if isinstance(action, argparse._SubParsersAction))
    lines = [
        "# Command line",
        "",
        "Generated from `state/process/commands.toml`. Every command accepts settings as flags (`--kafka.port 9192`) and "
        "`--config FILE`; [Configure](../how-to/configure.md) describes them. `--help` after a command prints this text.",
    ]
    for name, command in verbs.choices.items():
        lines += ["", f"## {name}", "", _escaped(str(command.description).strip())]
        if name in OWN_HELP:
            lines += ["", "```", own_helps()[name].strip(), "```"]
        elif rows := list(_options(command)):
            lines += ["", "| option | meaning |", "|---|---|", *rows]
    return "\n".join(lines) + "\n"


_HELP = """
import contextlib, importlib, io, json, sys
helps = {}
for command, module in json.loads(sys.argv[1]).items():
    with contextlib.redirect_stdout(io.StringIO()) as printed, contextlib.suppress(SystemExit):
        importlib.import_module(module).main(["--help"])
    helps[command] = printed.getvalue()
print(json.dumps(helps))
"""


@functools.cache
def own_helps() -> dict[str, str]:
    """Returns what `--help` prints for each command that defines its own options; one process imports all of them."""
    modules = json.dumps({name: PROCESSES[name] for name in OWN_HELP})
    environment = {**os.environ, "COLUMNS": "110"}
    program = [sys.executable, "-c", _HELP, modules]
    done = subprocess.run(program, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
    helps: dict[str, str] = json.loads(done.stdout)
    return helps


def _escaped(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;")


def _options(command: argparse.ArgumentParser) -> Iterator[str]:
    for action in command._actions:
        if action.dest == "help":
            continue
        word = ", ".join(action.option_strings) or str(action.metavar or action.dest).upper()
        if action.option_strings and action.nargs != 0:
            word += f" {action.metavar or '{' + ','.join(map(str, action.choices or ('VALUE',))) + '}'}"
        yield f"| `{word.replace('|', chr(92) + '|')}` | {_escaped(str(action.help))} |"


def dead_letters() -> str:
    """Returns the page of the reasons of dead letters."""
    lines = [
        "# Dead-letter reasons",
        "",
        "Generated from `state/events/decoding.py`. A record that cannot be read as an event goes to "
        "`kafka.dead_letters_topic`, with reason, partition and offset in its headers. "
        "[The runbook](../operate/runbook.md#dead-letters) explains what to do.",
        "",
        "| reason | the record |",
        "|---|---|",
    ]
    lines += [f"| `{reason}` | {REFUSED[reason]} |" for reason in Reason]
    lines += ["", "## The topic", "", *DEAD_LETTER_TOPIC]
    return "\n".join(lines) + "\n"


def runbook() -> str:
    """Returns the runbook as a page of the console; links to pages that the console does not have become text."""
    text = (ROOT / "docs/operate/runbook.md").read_text()
    text = re.sub(r"\[([^\]]+)\]\((?!#)[^)]+\)", r"\1", text)
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n<title>Runbook of Springtide</title>\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<link rel="icon" href="icon.svg" type="image/svg+xml">\n<link rel="stylesheet" href="page.css">\n</head>\n'
        '<body class="document">\n<main>\n<p><a href="./" class="tap">Back to the console</a></p>\n'
        f"{markdown.markdown(text, extensions=['tables', 'fenced_code', 'toc'])}\n</main>\n</body>\n</html>\n"
    )


PAGES: Mapping[str, Callable[[], str]] = {
    "deploy/console/static/runbook.html": runbook,
    "docs/operate/alerts.md": alerts,
    "docs/operate/capacity.md": lambda: capacity.page() + "\n",
    "docs/reference/commands.md": commands,
    "docs/reference/dead-letters.md": dead_letters,
    "docs/reference/metrics.md": metrics_page,
    "docs/reference/settings.md": lambda: cli.as_markdown() + "\n",
}
"""By file, the function that returns its text."""


if __name__ == "__main__":
    for path, text in PAGES.items():
        (ROOT / path).write_text(text())
