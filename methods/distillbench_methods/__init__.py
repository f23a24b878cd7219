"""Reference implementations, one file a method."""
