"""The Grafana dashboards: `dashboards.yml` is the source, `dashboards/*.json` is what Grafana reads."""
