"""Java programs on this machine: a Java runtime from a wheel, and jars from Maven Central verified by SHA-256."""
