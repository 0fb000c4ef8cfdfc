"""The trainer: does it learn as fast as clicks come, do versions go out, and has its guard said no."""

from __future__ import annotations

from deploy.grafana import headlines
from deploy.grafana.panel import Board, Panel, PanelKind, PanelQuery, PanelRow, both, rate

LEARNING = (
    Panel(
        "Steps",
        (PanelQuery(rate("springtide_trainer_steps_total"), "steps"),),
        "cps",
        "Training steps a second; one record of the training log is one step.",
        "as many as micro-batches are written; many more while it catches up.",
        "none: see whether it is held below, then its log.",
        "no-new-version",
    ),
    Panel(
        "Rows by outcome",
        (PanelQuery(rate("springtide_trainer_rows_total", "outcome"), "{{outcome}}"),),
        "cps",
        "Rows of the training log a second, by what the trainer did with them.",
        "trained. Duplicates after a crash, masked ones after a rollback.",
        "skipped: the guard refused whole steps, see its verdicts below.",
        "training-is-held",
    ),
    Panel(
        "Records that wait",
        (PanelQuery("max(springtide_trainer_lag_records)", "training log"),),
        "short",
        "Positions of the training log that the trainer has not read.",
        "near 0; falling after a restart or a rollback.",
        "if it grows, steps take too long: see their time.",
        "no-new-version",
    ),
    Panel(
        "Time of a step",
        both("springtide_trainer_step_seconds"),
        "s",
        "One training step, without publishing.",
        "a few milliseconds, growing with the rows of a record.",
        "see the machine's load; another process on its cores slows it first.",
        "no-new-version",
    ),
    headlines.LOG_LOSS,
    Panel(
        "Caught up",
        (PanelQuery("max(springtide_trainer_caught_up)", "read to the end"),),
        "none",
        "Whether this epoch has read the training log to its end.",
        "yes; no after a rollback or a restart, until it has.",
        "if it stays at no, see records that wait: they must fall.",
        "no-new-version",
        kind=PanelKind.STATES,
        states={0: ("no", "orange"), 1: ("yes", "green")},
    ),
)

PUBLISHING = (
    Panel(
        "Time to publish",
        both("springtide_trainer_publish_seconds"),
        "s",
        "Until a version is there for those who follow.",
        "some milliseconds.",
        "a slow disk or a full one: see the storage on the overview.",
        "the-disk-is-full",
    ),
    Panel(
        "Stall of the steps",
        both("springtide_trainer_publish_stall_seconds"),
        "s",
        "Time that a publication kept the steps waiting.",
        "around a millisecond.",
        "publishing does not keep up with steps: see the time to publish and the disk.",
        "no-new-version",
    ),
    Panel(
        "Time to be durable",
        both("springtide_trainer_save_seconds"),
        "s",
        "From there until a durable version is durable.",
        "some tens of milliseconds, once in registry.durable_s.",
        "a slow disk or a full one; after a crash more is learned again.",
        "the-disk-is-full",
    ),
    headlines.VERSIONS,
    headlines.HOLDS,
    Panel(
        "Epoch",
        (
            PanelQuery("max(springtide_trainer_epoch)", "trainer"),
            PanelQuery("max(springtide_serving_epoch)", "answers"),
        ),
        "none",
        "The epoch in which the trainer works, and that of the version that answers.",
        "both the same; they part between a rollback and the first version after it.",
        "if they stay apart, the trainer has published nothing since: see its log.",
        "no-new-version",
    ),
)

GUARD = (
    Panel(
        "Verdicts of the guard",
        (PanelQuery(rate("springtide_trainer_guard_total", "verdict"), "{{verdict}}"),),
        "cps",
        "Steps a second, by what the guard said of them: accept, skip, hold.",
        "accept.",
        "skip leaves one record out; many in a row hold training. The trainer's log has offset and loss.",
        "training-is-held",
    ),
    Panel(
        "How near a hold",
        (PanelQuery("max by (rule) (springtide_trainer_guard_ratio)", "{{rule}}"),),
        "percentunit",
        "How near each rule about windows of log time is to a hold, which is 100 %.",
        "0 %, and a little above it now and then.",
        "from 50 % on versions wait for the next window's word; look at what is clicked now.",
        "training-is-held",
    ),
    Panel(
        "Account of rows",
        (PanelQuery("sum by (outcome) (springtide_accounting_rows)", "{{outcome}}"),),
        "short",
        "Rows of the training log since this line began; `rows` is all of them.",
        "the other lines add up to `rows`.",
        "`springtide status` says which account is wrong and by how many.",
        "an-account-is-wrong",
    ),
    Panel(
        "Faults",
        (PanelQuery("sum(springtide_accounting_trainer_faults)", "accounts"),),
        "none",
        "Accounts of the trainer that do not balance.",
        "0, always.",
        "`springtide status` says which one and by how many.",
        "an-account-is-wrong",
        kind=PanelKind.STAT,
        alarm=1,
        alerts=("SpringtideAccountWrong",),
        width=2,
    ),
    Panel(
        "Gaps",
        (PanelQuery("sum(increase(springtide_trainer_gaps_accepted_total[1d]))", "gaps"),),
        "none",
        "Gaps in the training log that operators said are lost, in the last day.",
        "0.",
        "the topic's retention is shorter than the trainer was away: raise it.",
        "a-gap-clicks-deleted-unread",
        kind=PanelKind.STAT,
        goal=1,
        width=3,
    ),
    Panel(
        "Left out",
        (PanelQuery("sum(increase(springtide_trainer_records_left_out_total[1d]))", "records"),),
        "none",
        "Records of the training log that operators left out because nobody could learn from them, in the last day.",
        "0.",
        "see who else writes to that topic.",
        "one-bad-record-in-the-training-log",
        kind=PanelKind.STAT,
        goal=1,
        width=3,
    ),
    Panel(
        "Windows compared with",
        (PanelQuery("max(springtide_trainer_guard_windows)", "windows"),),
        "short",
        "Windows of log time with which the guard compares the newest one.",
        "120; after an upgrade or a hold it begins at 0, and judges nothing below guard.warm_up.",
        "if it stays low, few click: a window needs guard.window_rows.",
        "training-is-held",
    ),
    Panel(
        "Versions wait",
        (PanelQuery("max(springtide_trainer_withheld)", "for the guard"),),
        "none",
        "Whether versions wait because the newest window is far off its past.",
        "no; yes for 30 s of log time at most.",
        "if it comes often, traffic changes by leaps: see how near a hold, and by which rule.",
        "training-is-held",
        kind=PanelKind.STATES,
        states={0: ("no", "green"), 1: ("yes", "orange")},
    ),
)

TABLES = (
    Panel(
        "Rows of the tables",
        (
            PanelQuery("max by (table) (springtide_trainer_table_rows)", "{{table}}"),
            PanelQuery("max by (table) (springtide_trainer_table_rows_limit)", "{{table}}, limit", dashed=True),
        ),
        "short",
        "Embedding rows in use, by table, and how many there may be (dashed).",
        "rising to the limit, then level: the least used go first.",
        "at the limit while users and items are many: raise the table's rows where memory has room.",
        "look-first",
        width=12,
    ),
    Panel(
        "Tables, of their limit",
        (
            PanelQuery(
                "max by (table) (springtide_trainer_table_rows / springtide_trainer_table_rows_limit)", "{{table}}"
            ),
        ),
        "percentunit",
        "Rows in use of the most that there may be.",
        "anything up to 100 %.",
        "at 100 % rows that are needed may have left: raise the limit.",
        "look-first",
        kind=PanelKind.BARS,
        goal=0.95,
        width=12,
    ),
)

BOARD = Board(
    "springtide-trainer",
    "Springtide: trainer",
    "Does it learn as fast as clicks come, do versions go out, and what did the guard say?",
    (
        PanelRow("Learning", LEARNING),
        PanelRow("Publishing", PUBLISHING),
        PanelRow("Guard and accounts", GUARD),
        PanelRow("Tables", TABLES),
    ),
)
