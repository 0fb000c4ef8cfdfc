"""The one long-lived process that learns: tables, model, step, versions."""
