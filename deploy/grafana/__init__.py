"""Grafana's dashboards, said in Python and written as JSON; only who changes them needs this package."""
