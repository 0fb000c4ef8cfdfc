"""Makes Grafana's JSON of a board, with the types of `grafana-foundation-sdk`."""

from __future__ import annotations

import string
from collections.abc import Mapping, Sequence

from grafana_foundation_sdk.builders import bargauge, common, dashboard, prometheus, stat, statetimeline, timeseries
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models import common as options
from grafana_foundation_sdk.models import dashboard as model

from deploy.grafana.marks import MARKS, Mark
from deploy.grafana.panel import Board, Panel, PanelKind, PanelQuery

TAG = "springtide"
SOURCE_UID = "springtide-prometheus"
"""Of the datasource in `provisioning`, which `$datasource` begins with."""
SOURCE = model.DataSourceRef(type_val="prometheus", uid="${datasource}")
COLUMNS = 24
"""Of Grafana's grid."""
DASHED: list[model.DynamicConfigValue] = [
    model.DynamicConfigValue("custom.lineStyle", {"fill": "dash", "dash": [8, 8]}),
    model.DynamicConfigValue("custom.fillOpacity", 0),
]
Builder = timeseries.Panel | stat.Panel | statetimeline.Panel | bargauge.Panel


class PrometheusAnnotation(model.AnnotationQuery):
    """An annotation with the fields that Prometheus' plugin reads and the SDK's model lacks."""

    def __init__(self, mark: Mark) -> None:
        super().__init__(mark.name, SOURCE, enable=mark.shown, icon_color=mark.colour, expr=mark.expr)
        self.title = mark.title

    def to_json(self) -> dict[str, object]:
        """The payload; `step` is as fine as scrapes, so that what lasts for seconds is met."""
        return {**super().to_json(), "titleFormat": self.title, "step": "5s"}


def as_json(board: Board) -> str:
    """The file that Grafana reads.

    Args:
        board: What it shows.
    """
    return JSONEncoder(indent=1, sort_keys=True).encode(built(board)) + "\n"


def built(board: Board) -> model.Dashboard:
    """Grafana's own object: panels in a grid of 24 columns, numbered from 1.

    Args:
        board: What it shows.
    """
    made = (
        dashboard.Dashboard(board.title)
        .uid(board.uid)
        .description(board.says)
        .tags([TAG])
        .timezone("browser")
        .refresh("5s")
        .time("now-15m", "now")
        .tooltip(model.DashboardCursorSync.CROSSHAIR)
        .with_variable(
            dashboard.DatasourceVariable("datasource")
            .label("Prometheus")
            .type("prometheus")
            .current(model.VariableOption(selected=True, text="Prometheus", value=SOURCE_UID))
        )
        .link(
            dashboard.DashboardLink("Springtide")
            .type(model.DashboardLinkType.DASHBOARDS)
            .tags([TAG])
            .keep_time(True)
            .include_vars(True)
        )
    )
    number = 0
    for group in board.groups:
        number += 1
        made.with_row(dashboard.Row(group.title).id(number))
        for panel, width in zip(group.panels, filled_lines([panel.width for panel in group.panels]), strict=True):
            number += 1
            made.with_panel(_panel(panel).span(width).id(number))
    found = made.build()
    found.annotations = model.AnnotationContainer([PrometheusAnnotation(mark) for mark in MARKS])
    return found


def filled_lines(widths: Sequence[int]) -> list[int]:
    """The widths of panels side by side, where the last one of each line takes what is left of it.

    Args:
        widths: As they were asked for, of `COLUMNS` at most.

    >>> filled_lines([8, 8, 8, 6, 12, 12, 8])
    [8, 8, 8, 6, 18, 12, 12]
    """
    found: list[int] = []
    used = 0
    for width in widths:
        if used + width > COLUMNS:
            found[-1] += COLUMNS - used
            used = 0
        found.append(width)
        used += width
    return [*found[:-1], found[-1] + COLUMNS - used]


def _panel(panel: Panel) -> Builder:
    made = _drawn(panel)
    made.title(panel.title).description(panel.description).datasource(SOURCE)
    made.height(panel.height).unit(panel.unit).thresholds(_thresholds(panel))
    for letter, target in zip(string.ascii_uppercase, panel.targets, strict=False):
        made.with_target(_target(letter, target, panel.kind))
        if target.dashed:
            made.override_by_query(letter, DASHED)
    if panel.states:
        made.mappings([_mapping(panel.states)])
    return made


def _drawn(panel: Panel) -> Builder:
    """The plugin's panel, with how it draws."""
    reduced = common.ReduceDataOptions().calcs(["lastNotNull"]).values(False)
    if panel.kind is PanelKind.STAT:
        coloured = panel.alarm is not None or panel.goal is not None or panel.states
        mode = options.BigValueColorMode.VALUE if coloured else options.BigValueColorMode.NONE
        return stat.Panel().graph_mode(options.BigValueGraphMode.AREA).color_mode(mode).reduce_options(reduced)
    if panel.kind is PanelKind.BARS:
        horizontal = options.VizOrientation.HORIZONTAL
        return bargauge.Panel().orientation(horizontal).reduce_options(reduced).min(0).max(1)
    legend = common.VizLegendOptions().show_legend(True).placement(options.LegendPlacement.BOTTOM)
    if panel.kind is PanelKind.STATES:
        made = statetimeline.Panel().legend(legend.show_legend(False)).row_height(0.8)
        return made.show_value(options.VisibilityMode.AUTO).line_width(0).fill_opacity(70)
    legend.display_mode(options.LegendDisplayMode.LIST).calcs(["lastNotNull"])
    drawn = timeseries.Panel().legend(legend).fill_opacity(8).show_points(options.VisibilityMode.NEVER)
    tooltip = common.VizTooltipOptions().mode(options.TooltipDisplayMode.MULTI)
    drawn.tooltip(tooltip.sort(options.SortOrder.DESCENDING))
    if panel.alarm is not None or panel.goal is not None:
        line = common.GraphThresholdsStyleConfig().mode(options.GraphTresholdsStyleMode.DASHED)
        drawn.thresholds_style(line)
    return drawn


def _target(letter: str, target: PanelQuery, kind: PanelKind) -> prometheus.Dataquery:
    made = prometheus.Dataquery().ref_id(letter).expr(target.expr).legend_format(target.legend or "__auto")
    made.datasource(SOURCE)
    return made.instant() if kind is PanelKind.BARS else made.range()


def _thresholds(panel: Panel) -> dashboard.ThresholdsConfig:
    """Green, orange from `goal` on, red from `alarm` on; the other way round where low is bad."""
    limits = [(panel.goal, "orange"), (panel.alarm, "red")]
    known = [(limit, colour) for limit, colour in limits if limit is not None]
    if panel.falling:
        colours = [colour for _, colour in reversed(known)] + ["green"]
        steps = list(zip([None, *(limit for limit, _ in reversed(known))], colours, strict=True))
    else:
        steps = [(None, "green"), *known]
    return (
        dashboard.ThresholdsConfig()
        .mode(model.ThresholdsMode.ABSOLUTE)
        .steps([model.Threshold(limit, colour) for limit, colour in steps])
    )


def _mapping(states: Mapping[int, tuple[str, str]]) -> model.ValueMap:
    return model.ValueMap(
        {str(number): model.ValueMappingResult(text=text, color=colour) for number, (text, colour) in states.items()}
    )
