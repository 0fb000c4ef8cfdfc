"""What `springtide up` offers of the parts that it keeps alive. Pure."""

from __future__ import annotations

from deploy.watch.scrape import Scrape

OFTEN = 2


def dying(up: Scrape) -> dict[str, float]:
    r"""The parts that die again and again, and how often they did, the worst first.

    >>> from deploy.watch.scrape import parsed
    >>> series = "springtide_up_deaths_in_a_row"
    >>> dying(Scrape(parsed(f'{series}{{part="trainer"}} 3\n{series}{{part="stream"}} 0\n{series}{{part="applier"}} 1')))
    {'trainer': 3.0}
    """
    found = up.by("springtide_up_deaths_in_a_row", "part")
    often = {part: count for part, count in found.items() if count >= OFTEN}
    return dict(sorted(often.items(), key=lambda one: -one[1]))


def runs_shoppers(up: Scrape) -> bool:
    r"""Whether synthetic shoppers are among them.

    >>> from deploy.watch.scrape import parsed
    >>> runs_shoppers(Scrape(parsed('springtide_up_starts_total{part="shoppers"} 1'))), runs_shoppers(Scrape())
    (True, False)
    """
    return "shoppers" in up.by("springtide_up_starts_total", "part")
