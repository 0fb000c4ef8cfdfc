"""Examples: settings for public data sets, a custom model, custom rankers and a custom decoder."""
