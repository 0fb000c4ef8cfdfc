"""Java programs on this machine: a runtime from a wheel, and jars from Maven Central, each with its SHA-256."""
