"""Startup of the loop on one machine: checks, hints, upgrades and Prometheus for `springtide up`."""
