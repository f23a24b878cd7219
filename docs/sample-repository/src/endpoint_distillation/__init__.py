"""One method for distillbench, found through an entry point."""
