"""The named studies and benchmarks: what to run, what the papers report, what it costs."""
